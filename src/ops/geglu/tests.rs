use candle_core::{DType, Device, Tensor};

use super::geglu;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

fn random(shape: &[usize]) -> Result<Tensor> {
    Address::new(6, "x").normal(shape, DType::F64, &Device::Cpu)
}

#[test]
fn values_equal_the_first_half_times_the_gelu_of_the_second() -> Result<()> {
    for shape in [&[2, 3, 10][..], &[700, 34], &[4]] {
        let x = random(shape)?;
        let halves = x.chunk(2, shape.len() - 1)?;
        let expected = (&halves[0] * halves[1].gelu_erf()?)?;
        let found = geglu(&x)?;
        assert_eq!(found.dims(), expected.dims());
        let difference = (found - expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(difference < 1e-13, "{shape:?}: {difference}");
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let check = check_gradients(&[random(&[2, 3, 8])?], |t| Ok(vec![geglu(&t[0])?]))?;
    assert!(check.worst() < 1e-8, "{check:?}");
    Ok(())
}

#[test]
fn single_precision_agrees_with_double() -> Result<()> {
    let x = random(&[50, 64])?.to_dtype(DType::F32)?;
    let difference = (geglu(&x)?.to_dtype(DType::F64)? - geglu(&x.to_dtype(DType::F64)?)?)?;
    let difference = difference.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(difference < 5e-6, "{difference}");
    Ok(())
}

#[test]
fn an_odd_number_of_channels_is_an_error() -> Result<()> {
    let error = geglu(&random(&[2, 5])?).unwrap_err().to_string();
    assert!(error.contains("2 * channels") && error.contains("[2, 5]"), "{error}");
    Ok(())
}

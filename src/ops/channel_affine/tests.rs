use candle_core::{DType, Device, Tensor};

use super::channel_affine;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

/// The same of candle's operations.
fn composed(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_mul(scale)?.broadcast_add(shift)?)
}

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(5, purpose).normal(shape, DType::F64, &Device::Cpu)
}

#[test]
fn values_equal_the_definition() -> Result<()> {
    for shape in [vec![2, 3, 5, 4], vec![700, 3], vec![4]] {
        let channels = [shape[shape.len() - 1]];
        let (x, scale, shift) = (random("x", &shape)?, random("scale", &channels)?, random("shift", &channels)?);
        let difference = (channel_affine(&x, &scale, &shift)? - composed(&x, &scale, &shift)?)?;
        assert!(difference.abs()?.max_all()?.to_scalar::<f64>()? < 1e-14);
    }
    Ok(())
}

#[test]
fn gradients_of_all_arguments_match_finite_differences() -> Result<()> {
    let inputs = [random("x", &[2, 3, 2, 3])?, random("scale", &[3])?, random("shift", &[3])?];
    let check = check_gradients(&inputs, |t| Ok(vec![channel_affine(&t[0], &t[1], &t[2])?]))?;
    assert!(check.worst() < 1e-7 && check.norms.iter().all(|norm| *norm > 0.1), "{check:?}");
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let (x, three, two) = (random("x", &[2, 3])?, random("s", &[3])?, random("s", &[2])?);
    assert!(channel_affine(&x, &two, &three).unwrap_err().to_string().contains("`scale`"));
    assert!(channel_affine(&x, &three, &two).unwrap_err().to_string().contains("`shift`"));
    assert!(channel_affine(&x, &three.to_dtype(DType::F32)?, &three).unwrap_err().to_string().contains("`scale`"));
    Ok(())
}

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::ops::{geglu, linear, linear_geglu};
use crate::random::Address;

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(5, purpose).normal(shape, DType::F64, &Device::Cpu)
}

#[test]
fn it_is_the_gated_gelu_of_the_linear_map() -> Result<()> {
    let (x, weight, bias) = (random("x", &[2, 3, 4])?, random("weight", &[10, 4])?, random("bias", &[10])?);
    for bias in [None, Some(&bias)] {
        let expected = geglu(&linear(&x, &weight, bias)?)?;
        let found = linear_geglu(&x, &weight, bias)?;
        assert_eq!(found.dims(), [2, 3, 5]);
        assert_eq!(found.flatten_all()?.to_vec1::<f64>()?, expected.flatten_all()?.to_vec1::<f64>()?);
    }
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_errors() -> Result<()> {
    let (x, weight) = (random("x", &[3, 4])?, random("weight", &[10, 4])?);
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    assert!(message(linear_geglu(&x, &random("weight", &[9, 4])?, None)).contains("weight"));
    assert!(message(linear_geglu(&random("x", &[3, 5])?, &weight, None)).contains("x"));
    assert!(message(linear_geglu(&x, &weight, Some(&random("bias", &[5])?))).contains("bias"));
    Ok(())
}

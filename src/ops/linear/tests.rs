use candle_core::{DType, Device, Tensor, Var};

use super::linear;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(5, purpose).normal(shape, DType::F64, &Device::Cpu)
}

#[test]
fn values_equal_a_plain_matrix_product() -> Result<()> {
    let (x, w, b) = (random("x", &[2, 3, 4])?, random("w", &[5, 4])?, random("b", &[5])?);
    let expected = x.reshape((6, 4))?.matmul(&w.t()?)?.broadcast_add(&b)?.reshape((2, 3, 5))?;
    let difference = (linear(&x, &w, Some(&b))? - expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(difference < 1e-12, "{difference}");
    Ok(())
}

#[test]
fn gradients_of_all_arguments_match_finite_differences() -> Result<()> {
    let inputs = [random("x", &[2, 3, 4])?, random("w", &[5, 4])?, random("b", &[5])?];
    let check = check_gradients(&inputs, |t| Ok(vec![linear(&t[0], &t[1], Some(&t[2]))?]))?;
    assert!(check.worst() < 1e-8, "{check:?}");
    Ok(())
}

#[test]
fn a_frozen_weight_gets_no_gradient() -> Result<()> {
    let (x, w, b) = (Var::from_tensor(&random("x", &[3, 4])?)?, random("w", &[5, 4])?, random("b", &[5])?);
    let gradients = linear(&x, &w, Some(&b))?.sum_all()?.backward()?;
    assert!(gradients.get(&x).is_some());
    assert!(gradients.get(&w).is_none() && gradients.get(&b).is_none());
    Ok(())
}

#[test]
fn a_wrong_inner_dimension_is_named() -> Result<()> {
    let error = linear(&random("x", &[3, 4])?, &random("w", &[5, 6])?, None).unwrap_err().to_string();
    assert!(error.contains("(..., 6)") && error.contains("[3, 4]"), "{error}");
    Ok(())
}

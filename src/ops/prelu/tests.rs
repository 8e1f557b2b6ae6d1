use candle_core::{DType, Device, Tensor};

use super::prelu;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

/// The same of candle's operations.
fn composed(x: &Tensor, slope: &Tensor) -> Result<Tensor> {
    Ok((x.relu()? - x.neg()?.relu()?.broadcast_mul(slope)?)?)
}

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(5, purpose).normal(shape, DType::F64, &Device::Cpu)
}

#[test]
fn negative_values_are_multiplied_by_their_channels_slope() -> Result<()> {
    let x = Tensor::new(&[[1.0, -2.0, 0.0], [-4.0, 5.0, -6.0]], &Device::Cpu)?;
    let y = prelu(&x, &Tensor::new(&[0.5, 0.25, -1.0], &Device::Cpu)?)?;
    assert_eq!(y.to_vec2::<f64>()?, [[1.0, -0.5, 0.0], [-2.0, 5.0, 6.0]]);
    let (x, slope) = (random("x", &[700, 3])?, random("slope", &[3])?);
    let difference = (prelu(&x, &slope)? - composed(&x, &slope)?)?.abs()?.max_all()?;
    assert!(difference.to_scalar::<f64>()? < 1e-14);
    Ok(())
}

#[test]
fn gradients_of_all_arguments_match_finite_differences() -> Result<()> {
    let inputs = [random("x", &[2, 3, 2, 3])?, random("slope", &[3])?];
    let check = check_gradients(&inputs, |t| Ok(vec![prelu(&t[0], &t[1])?]))?;
    assert!(check.worst() < 1e-7 && check.norms.iter().all(|norm| *norm > 0.1), "{check:?}");
    Ok(())
}

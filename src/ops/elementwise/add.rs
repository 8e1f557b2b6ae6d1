//! Sums of two tensors.

use candle_core::Tensor;

use super::scale::scaled;
use super::storage;
use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::ops::support::same_kind;
use crate::{Error, Result};

/// `a + b`, of one shape.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    add_scaled(a, b, 1.0)
}

/// `a + beta * b`, of one shape.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices differ.
pub fn add_scaled(a: &Tensor, b: &Tensor, beta: f64) -> Result<Tensor> {
    same_kind("add", a, "b", b)?;
    if a.shape() != b.shape() {
        return Err(Error::argument("add", "b", format!("{:?}", a.dims()), format!("{:?}", b.dims())));
    }
    apply(Add { beta }, &[a, b])
}

struct Add {
    beta: f64,
}

impl Function for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let (a, b) = (&inputs[0], &inputs[1]);
        #[cfg(feature = "cuda")]
        if super::cuda::takes(a) {
            return Ok(super::cuda::add_scaled(a, b, self.beta)?.into());
        }
        if super::cpu::takes(a) {
            return Ok(super::cpu::add_scaled(a, b, self.beta)?.into());
        }
        let scaled = if self.beta == 1.0 { b.clone() } else { (b * self.beta)? };
        Ok(storage::add("add", a, &scaled, scaled.layout())?.into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let gradient = context.gradient()?;
        let of_b = match context.needs[1] {
            true if self.beta == 1.0 => Some(gradient.clone()),
            true => Some(scaled(gradient, self.beta)?),
            false => None,
        };
        Ok(vec![Some(gradient.clone()), of_b])
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

/// `a + b` of gradients, which no graph follows.
pub(crate) fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.shape() == b.shape() && a.dtype() == b.dtype() && a.is_contiguous() && b.is_contiguous() {
        #[cfg(feature = "cuda")]
        if super::cuda::takes(a) {
            return Ok(super::cuda::add_scaled(a, b, 1.0)?.into_tensor());
        }
        if super::cpu::takes(a) {
            return Ok(super::cpu::add_scaled(a, b, 1.0)?.into_tensor());
        }
    }
    Ok(a.add(b)?)
}

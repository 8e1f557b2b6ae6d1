//! Multiplication by a number.

use candle_core::Tensor;

use super::storage;
use crate::Result;
use crate::autograd::{Backward, Forward, Function, Value, apply};

/// `x * factor`, for `x` of any shape. A factor of 1 returns `x` itself.
///
/// # Errors
/// [`Error::Candle`](crate::Error::Candle) for a dtype that cannot be multiplied.
pub fn scale(x: &Tensor, factor: f64) -> Result<Tensor> {
    match factor == 1.0 {
        true => Ok(x.clone()),
        false => apply(Scale { factor }, &[x]),
    }
}

struct Scale {
    factor: f64,
}

impl Function for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if super::cuda::takes(&inputs[0]) {
            return Ok(super::cuda::scale(&inputs[0], self.factor)?.into());
        }
        if super::cpu::takes(&inputs[0]) {
            return Ok(super::cpu::scale(&inputs[0], self.factor)?.into());
        }
        Ok(storage::scale("scale", &inputs[0], self.factor)?.into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(scaled(context.gradient()?, self.factor)?)])
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

/// `x * factor` of a contiguous gradient.
pub(super) fn scaled(x: &Tensor, factor: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::takes(x) {
        return super::cuda::scaled(x, factor);
    }
    if super::cpu::takes(x) && x.is_contiguous() {
        return Ok(super::cpu::scale(x, factor)?.into_tensor());
    }
    Ok((x * factor)?)
}

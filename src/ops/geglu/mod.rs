//! The gated GELU of transformer feed-forward blocks.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::support::{dispatch, on_cuda};
use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::{Error, Result};

/// `a * gelu(b)` where `a` and `b` are the first and the second half of the channels (diffusers: `GEGLU` after its
/// projection). The GELU is the exact one, by `erf`.
///
/// `x`: `(..., 2 * channels)`. Returns `(..., channels)`.
///
/// # Errors
/// [`Error::Argument`] where the last dimension is missing or odd, or the dtype is none of those supported.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    match x.dims().last() {
        Some(channels) if channels % 2 == 0 => apply(Geglu, &[x]),
        _ => Err(Error::argument("geglu", "x", "(..., 2 * channels)", format!("{:?}", x.dims()))),
    }
}

struct Geglu;

impl Function for Geglu {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(&inputs[0]));
        dispatch!("geglu", inputs[0], T => cpu::forward::<T>(&inputs[0]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(context));
        dispatch!("geglu", context.inputs[0], T => cpu::backward::<T>(context))
    }

    fn uses(&self, value: Value, _: &[bool]) -> bool {
        matches!(value, Value::Input(_))
    }
}

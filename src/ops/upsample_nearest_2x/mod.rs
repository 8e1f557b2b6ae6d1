//! Nearest-neighbour enlargement, channels last.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::support::{dispatch, on_cuda};
use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::{Error, Result};

/// Repeats every pixel twice in both directions (torch: `F.interpolate(scale_factor=2, mode="nearest")`; diffusers:
/// `Upsample2D` before its convolution).
///
/// `x`: `(batch, height, width, channels)`. Returns `(batch, 2 height, 2 width, channels)`. Gradient for `x`.
///
/// # Errors
/// [`Error::Argument`] where `x` has another rank or is empty.
pub fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    if x.rank() != 4 || x.elem_count() == 0 {
        let expected = "(batch, height, width, channels), none of them 0";
        return Err(Error::argument("upsample_nearest_2x", "x", expected, format!("{:?}", x.dims())));
    }
    apply(UpsampleNearest2x, &[x])
}

struct UpsampleNearest2x;

impl Function for UpsampleNearest2x {
    fn name(&self) -> &'static str {
        "upsample_nearest_2x"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(&inputs[0]));
        dispatch!("upsample_nearest_2x", inputs[0], T => cpu::forward::<T>(&inputs[0]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(context));
        dispatch!("upsample_nearest_2x", context.inputs[0], T => cpu::backward::<T>(context))
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

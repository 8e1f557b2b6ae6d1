//! The rectifier with a learnt slope for negative values (He et al. 2015).

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::channels::check_per_channel;
use super::support::{dispatch, on_cuda};
use crate::Result;
use crate::autograd::{Backward, Forward, Function, apply};

/// `x` where it is positive, else `slope * x`, with one slope a channel (torch: `F.prelu`).
///
/// `x`: `(..., channels)`; `slope`: `(channels,)`. Returns the shape of `x`. Gradients for every argument that is part
/// of a graph; at 0 the derivative is the slope, as in torch.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) where shapes, dtypes or devices do not fit.
pub fn prelu(x: &Tensor, slope: &Tensor) -> Result<Tensor> {
    check_per_channel("prelu", x, "slope", slope)?;
    apply(Prelu, &[x, slope])
}

struct Prelu;

impl Function for Prelu {
    fn name(&self) -> &'static str {
        "prelu"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(&inputs[0], &inputs[1]));
        dispatch!("prelu", inputs[0], T => cpu::forward::<T>(&inputs[0], &inputs[1]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(context));
        dispatch!("prelu", context.inputs[0], T => cpu::backward::<T>(context))
    }
}

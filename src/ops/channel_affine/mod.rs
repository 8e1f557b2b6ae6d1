//! A factor and a term for every channel.

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

/// `x * scale + shift`, channel by channel: batch normalisation as it is at inference.
///
/// `x`: `(..., channels)`; `scale`, `shift`: `(channels,)`. Returns the shape of `x`. Gradients for every argument that
/// is part of a graph.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) where shapes, dtypes or devices do not fit.
pub fn channel_affine(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    check_per_channel("channel_affine", x, "scale", scale)?;
    check_per_channel("channel_affine", x, "shift", shift)?;
    apply(ChannelAffine, &[x, scale, shift])
}

struct ChannelAffine;

impl Function for ChannelAffine {
    fn name(&self) -> &'static str {
        "channel_affine"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(&inputs[0], &inputs[1], &inputs[2]));
        dispatch!("channel_affine", inputs[0], T => cpu::forward::<T>(&inputs[0], &inputs[1], &inputs[2]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(context));
        dispatch!("channel_affine", context.inputs[0], T => cpu::backward::<T>(context))
    }
}

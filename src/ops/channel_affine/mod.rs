//! A factor and a term for every channel.

mod cpu;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::channels::check_per_channel;
use super::support::dispatch;
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
    match x.device().is_cpu() {
        true => apply(ChannelAffine, &[x, scale, shift]),
        false => composed(x, scale, shift),
    }
}

/// The same of candle's operations, for devices without a kernel.
fn composed(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_mul(scale)?.broadcast_add(shift)?)
}

struct ChannelAffine;

impl Function for ChannelAffine {
    fn name(&self) -> &'static str {
        "channel_affine"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        dispatch!("channel_affine", inputs[0], T => cpu::forward::<T>(&inputs[0], &inputs[1], &inputs[2]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        dispatch!("channel_affine", context.inputs[0], T => cpu::backward::<T>(context))
    }
}

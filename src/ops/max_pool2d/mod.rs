//! Maximum pooling, channels last.

mod cpu;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::channels::strided;
use super::support::dispatch;
use crate::autograd::{Backward, Forward, Function, apply};
use crate::{Error, Result};

/// The largest value of every window (torch: `F.max_pool2d` without padding, in channels-last layout).
///
/// `x`: `(batch, height, width, channels)`. Returns `(batch, out_height, out_width, channels)` with
/// `out = (in - kernel) / stride + 1`, rounded down. The gradient goes to the first of the largest values, as in torch.
/// A kernel of 1 takes every `stride`-th pixel.
///
/// # Errors
/// [`Error::Argument`] where `x` has another rank or is empty, kernel or stride is 0, or the kernel exceeds the image.
pub fn max_pool2d(x: &Tensor, kernel: usize, stride: usize) -> Result<Tensor> {
    if x.rank() != 4 || x.elem_count() == 0 {
        let expected = "(batch, height, width, channels), none of them 0";
        return Err(Error::argument("max_pool2d", "x", expected, format!("{:?}", x.dims())));
    }
    let (_, height, width, _) = x.dims4()?;
    if kernel == 0 || stride == 0 || kernel > height.min(width) {
        let expected = format!("1 to {}, and a stride of at least 1", height.min(width));
        return Err(Error::argument("max_pool2d", "kernel", expected, format!("{kernel}, stride {stride}")));
    }
    match x.device().is_cpu() {
        true => apply(MaxPool2d { kernel, stride }, &[x]),
        false => composed(x, kernel, stride),
    }
}

/// The same of candle's operations, for devices without a kernel: the maximum of the shifted images.
fn composed(x: &Tensor, kernel: usize, stride: usize) -> Result<Tensor> {
    let (_, height, width, _) = x.dims4()?;
    let (out_height, out_width) = ((height - kernel) / stride + 1, (width - kernel) / stride + 1);
    let mut largest: Option<Tensor> = None;
    for (dy, dx) in (0..kernel).flat_map(|dy| (0..kernel).map(move |dx| (dy, dx))) {
        let shifted = strided(&strided(x, 1, dy, stride, out_height)?, 2, dx, stride, out_width)?;
        largest = Some(match largest {
            Some(largest) => largest.maximum(&shifted)?,
            None => shifted,
        });
    }
    largest.ok_or_else(|| Error::argument("max_pool2d", "kernel", "at least 1", "0"))
}

struct MaxPool2d {
    kernel: usize,
    stride: usize,
}

impl Function for MaxPool2d {
    fn name(&self) -> &'static str {
        "max_pool2d"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        dispatch!("max_pool2d", inputs[0], T => cpu::forward::<T>(self, &inputs[0]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        dispatch!("max_pool2d", context.inputs[0], T => cpu::backward::<T>(self, context))
    }
}

//! Maximum pooling, channels last.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::support::{dispatch, on_cuda};
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
    apply(MaxPool2d { kernel, stride }, &[x])
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
        on_cuda!(inputs[0] => cuda::forward(self, &inputs[0]));
        dispatch!("max_pool2d", inputs[0], T => cpu::forward::<T>(self, &inputs[0]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(self, context));
        dispatch!("max_pool2d", context.inputs[0], T => cpu::backward::<T>(self, context))
    }
}

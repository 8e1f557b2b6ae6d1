//! Depthwise convolution, channels last: every channel has a kernel of its own.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::support::{dispatch, on_cuda, same_kind};
use crate::autograd::{Backward, Forward, Function, apply};
use crate::{Error, Result};

/// Cross-correlation of every channel with its own kernel (torch: `F.conv2d` with as many groups as channels).
///
/// `x`: `(batch, height, width, channels)`; `weight`: `(kernel_height, kernel_width, channels)`; `bias`: `(channels,)`.
/// `padding` zeros are put on every side. Returns `(batch, out_height, out_width, channels)` with
/// `out = (in + 2 padding - kernel) / stride + 1`, rounded down. Gradients for every argument that is part of a graph.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit, the stride is 0 or the kernel exceeds the padded
/// image.
pub fn depthwise_conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: usize,
) -> Result<Tensor> {
    const NAME: &str = "depthwise_conv2d";
    let wrong = |argument, expected: String, found: String| Err(Error::argument(NAME, argument, expected, found));
    let &[kernel_height, kernel_width, channels] = weight.dims() else {
        let expected = "(kernel_height, kernel_width, channels)".to_owned();
        return wrong("weight", expected, format!("{:?}", weight.dims()));
    };
    if x.rank() != 4 || x.dims()[3] != channels || x.elem_count() == 0 || weight.elem_count() == 0 {
        return wrong("x", format!("(batch, height, width, {channels}), not empty"), format!("{:?}", x.dims()));
    }
    same_kind(NAME, x, "weight", weight)?;
    if let Some(bias) = bias {
        same_kind(NAME, x, "bias", bias)?;
        if bias.dims() != [channels] {
            return wrong("bias", format!("({channels},)"), format!("{:?}", bias.dims()));
        }
    }
    let (height, width) = (x.dims()[1] + 2 * padding, x.dims()[2] + 2 * padding);
    if stride == 0 || kernel_height > height || kernel_width > width {
        let expected = format!("at least 1, and a kernel within {height} x {width}");
        return wrong("stride", expected, format!("{stride}, kernel {kernel_height} x {kernel_width}"));
    }
    match bias {
        Some(bias) => apply(DepthwiseConv2d { stride, padding }, &[x, weight, bias]),
        None => apply(DepthwiseConv2d { stride, padding }, &[x, weight]),
    }
}

struct DepthwiseConv2d {
    stride: usize,
    padding: usize,
}

impl Function for DepthwiseConv2d {
    fn name(&self) -> &'static str {
        "depthwise_conv2d"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(self, &inputs[0], &inputs[1], inputs.get(2)));
        dispatch!("depthwise_conv2d", inputs[0], T => cpu::forward::<T>(self, &inputs[0], &inputs[1], inputs.get(2)))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(self, context));
        dispatch!("depthwise_conv2d", context.inputs[0], T => cpu::backward::<T>(self, context))
    }
}

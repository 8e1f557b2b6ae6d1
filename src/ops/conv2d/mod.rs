//! Two-dimensional convolution, channels last.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
#[cfg(feature = "cuda")]
mod im2col;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::addends::{Addends, Places};
use super::elementwise::reshape;
use super::linear::linear_with;
use super::support::{dispatch, on_cuda, same_kind};
use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::{Error, Result};

/// Two-dimensional cross-correlation (torch: `F.conv2d`, in channels-last layout).
///
/// `x`: `(batch, height, width, in_channels)`; `weight`: `(out_channels, kernel_height, kernel_width, in_channels)`;
/// `bias`: `(out_channels,)`. `padding` zeros are put on every side. Returns `(batch, out_height, out_width,
/// out_channels)` with `out = (in + 2 padding - kernel) / stride + 1`, rounded down. Gradients for every argument that
/// is part of a graph, equal bit for bit between runs.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit, the stride is 0 or the kernel exceeds the padded
/// image.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Tensor> {
    conv2d_with(x, weight, &Addends::bias(bias), stride, padding)
}

/// [`conv2d`] with more added to the result: the bias, a vector a sample, and a residual.
///
/// # Errors
/// As [`conv2d`].
pub fn conv2d_with(
    x: &Tensor,
    weight: &Tensor,
    addends: &Addends<'_>,
    stride: usize,
    padding: usize,
) -> Result<Tensor> {
    conv2d_padded(x, weight, addends, stride, [padding; 2])
}

/// [`conv2d_with`] with a padding of its own on either side: zeros left and above, and zeros right and below.
///
/// # Errors
/// As [`conv2d`].
pub fn conv2d_padded(
    x: &Tensor,
    weight: &Tensor,
    addends: &Addends<'_>,
    stride: usize,
    padding: [usize; 2],
) -> Result<Tensor> {
    if padding[0] != padding[1] && !x.device().is_cuda() {
        // The CPU's takes one padding for all sides: what one side has more is put there in memory.
        let [start, end] = padding.map(|side| side - padding[0].min(padding[1]));
        let x = x.pad_with_zeros(1, start, end)?.pad_with_zeros(2, start, end)?;
        return conv2d_padded(&x, weight, addends, stride, [padding[0].min(padding[1]); 2]);
    }
    let [padding, padding_end] = padding;
    let wrong = |argument, expected: String, found: String| Err(Error::argument("conv2d", argument, expected, found));
    let &[out, kernel_height, kernel_width, channels] = weight.dims() else {
        let expected = "(out_channels, kernel_height, kernel_width, in_channels)".to_owned();
        return wrong("weight", expected, format!("{:?}", weight.dims()));
    };
    if weight.elem_count() == 0 {
        return wrong("weight", "no empty dimension".to_owned(), format!("{:?}", weight.dims()));
    }
    let &[batch, height, width, x_channels] = x.dims() else {
        return wrong("x", format!("(batch, height, width, {channels})"), format!("{:?}", x.dims()));
    };
    if x_channels != channels || x.elem_count() == 0 {
        return wrong("x", format!("(batch, height, width, {channels})"), format!("{:?}", x.dims()));
    }
    same_kind("conv2d", x, "weight", weight)?;
    if stride == 0 {
        return wrong("stride", "at least 1".to_owned(), "0".to_owned());
    }
    let (padded_height, padded_width) = (height + padding + padding_end, width + padding + padding_end);
    if kernel_height > padded_height || kernel_width > padded_width {
        let room = format!("at most the padded image, {padded_height} x {padded_width}");
        return wrong("weight", room, format!("a kernel of {kernel_height} x {kernel_width}"));
    }
    if (kernel_height, kernel_width, stride, padding, padding_end) == (1, 1, 1, 0, 0) {
        return linear_with(x, &reshape(weight, (out, channels))?, addends);
    }
    let size = |padded: usize, kernel: usize| (padded - kernel) / stride + 1;
    let shape = [batch, size(padded_height, kernel_height), size(padded_width, kernel_width), out];
    let mut inputs = vec![x, weight];
    let places = addends.place("conv2d", x, &shape, &mut inputs)?;
    apply(Conv2d { stride, padding, padding_end, places }, &inputs)
}

struct Conv2d {
    stride: usize,
    padding: usize,
    /// Right and below; on the CPU as `padding`.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    padding_end: usize,
    places: Places,
}

impl Function for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(self, inputs));
        dispatch!("conv2d", inputs[0], T => cpu::forward::<T>(self, inputs))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(self, context));
        dispatch!("conv2d", context.inputs[0], T => cpu::backward::<T>(self, context))
    }

    fn uses(&self, value: Value, needs: &[bool]) -> bool {
        // Each factor for the other's gradient.
        match value {
            Value::Input(0) => needs[1],
            Value::Input(1) => needs[0],
            _ => false,
        }
    }
}

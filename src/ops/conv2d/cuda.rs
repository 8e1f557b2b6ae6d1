//! Convolution on a GPU: a kernel for the narrow ends of networks, Hopper's implicit matrix product where it takes the
//! shapes; elsewhere the patches are laid out as a matrix.

use std::ffi::c_void;

use candle_core::Tensor;

use super::{Conv2d, im2col};
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, add_channels, avoids, cuda_device, dtype_code, pointer, stream, sum_rows, taken};
use crate::{Error, Result};

/// `LcmConv2d` of `conv2d.h`.
#[repr(C)]
struct ForwardArguments {
    x: *const c_void,
    weight: *const c_void,
    bias: *const c_void,
    per_sample_bias: *const c_void,
    residual: *const c_void,
    y: *mut c_void,
    geometry: Geometry,
}

/// `LcmConv2dInputGradient` of `conv2d.h`.
#[repr(C)]
struct InputGradientArguments {
    dy: *const c_void,
    weight: *const c_void,
    dx: *mut c_void,
    geometry: Geometry,
}

/// The numbers both argument blocks end with; height and width are the input's.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Geometry {
    pub batch: i32,
    pub height: i32,
    pub width: i32,
    pub input_channels: i32,
    pub output_channels: i32,
    pub kernel: i32,
    pub stride: i32,
    pub padding: i32,
    pub padding_end: i32,
    pub dtype: i32,
}

impl Geometry {
    /// Height and width of the output.
    fn out(&self) -> (usize, usize) {
        let out = |size: i32| ((size + self.padding + self.padding_end - self.kernel) / self.stride + 1) as usize;
        (out(self.height), out(self.width))
    }

    /// Pixels of the output, over the whole batch.
    pub fn rows(&self) -> usize {
        let (height, width) = self.out();
        self.batch as usize * height * width
    }

    /// Numbers under the kernel.
    pub fn patch(&self) -> usize {
        (self.kernel * self.kernel * self.input_channels) as usize
    }
}

unsafe extern "C" {
    fn lcm_conv2d_forward_narrow(arguments: *const ForwardArguments, stream: *mut c_void) -> i32;
    fn lcm_conv2d_input_gradient_narrow(arguments: *const InputGradientArguments, stream: *mut c_void) -> i32;
    fn lcm_conv2d_forward_hopper(arguments: *const ForwardArguments, stream: *mut c_void) -> i32;
    fn lcm_conv2d_input_gradient_hopper(arguments: *const InputGradientArguments, stream: *mut c_void) -> i32;
}

pub(super) const NAME: &str = "conv2d";
/// What `LCM_LOOKAHEAD_AVOID` calls the kernels.
const NARROW: &str = "narrow-conv";
const HOPPER: &str = "hopper-conv";

fn geometry(convolution: &Conv2d, x: &Tensor, weight: &Tensor) -> Result<Geometry> {
    let (batch, height, width, input_channels) = x.dims4()?;
    let (output_channels, kernel, kernel_width, _) = weight.dims4()?;
    if kernel != kernel_width {
        let found = format!("{kernel} x {kernel_width}");
        return Err(Error::argument(NAME, "weight", "a square kernel on a GPU", found));
    }
    Ok(Geometry {
        batch: batch as i32,
        height: height as i32,
        width: width as i32,
        input_channels: input_channels as i32,
        output_channels: output_channels as i32,
        kernel: kernel as i32,
        stride: convolution.stride as i32,
        padding: convolution.padding as i32,
        padding_end: convolution.padding_end as i32,
        dtype: dtype_code(NAME, x.dtype())?,
    })
}

pub(super) fn forward(convolution: &Conv2d, inputs: &[Tensor]) -> Result<Forward> {
    let (x, weight) = (&inputs[0], &inputs[1]);
    let places = convolution.places;
    let shape = geometry(convolution, x, weight)?;
    let device = cuda_device(NAME, x)?;
    let (height, width) = shape.out();
    let y = Buffer::new(&device, (x.dim(0)?, height, width, weight.dim(0)?), x.dtype())?;
    let at =
        |place: Option<usize>| place.map(|place| pointer(NAME, &inputs[place]).map(|p| p.cast_const())).transpose();
    let (bias, residual) = (at(places.bias)?, at(places.residual)?);
    let arguments = ForwardArguments {
        x: pointer(NAME, x)?,
        weight: pointer(NAME, weight)?,
        bias: bias.unwrap_or(std::ptr::null()),
        per_sample_bias: at(places.per_sample)?.unwrap_or(std::ptr::null()),
        residual: residual.unwrap_or(std::ptr::null()),
        y: y.pointer(),
        geometry: shape,
    };
    // SAFETY: the arguments point to tensors of the shapes they state, alive on this stream.
    let narrow = || unsafe { lcm_conv2d_forward_narrow(&raw const arguments, stream(&device)) };
    // SAFETY: as above.
    let hopper = || unsafe { lcm_conv2d_forward_hopper(&raw const arguments, stream(&device)) };
    if !tried(NARROW, narrow)? && !tried(HOPPER, hopper)? {
        im2col::forward(&shape, x, weight, (bias, residual), y.pointer())?;
        if let Some(place) = places.per_sample {
            return Ok(add_channels(y, &inputs[place])?.into_output().into());
        }
    }
    Ok(y.into_output().into())
}

/// Whether a family of kernels took the work.
fn tried(family: &str, launch: impl FnOnce() -> i32) -> Result<bool> {
    if avoids(family) { Ok(false) } else { taken(NAME, launch()) }
}

pub(super) fn backward(convolution: &Conv2d, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (&context.inputs[0], &context.inputs[1]);
    let gradient = context.gradient()?;
    let mut gradients = vec![None; context.inputs.len()];
    if context.needs[0] {
        gradients[0] = Some(input_gradient(convolution, x, weight, gradient)?);
    }
    if context.needs[1] {
        let shape = geometry(convolution, x, weight)?;
        gradients[1] = Some(im2col::weight_gradient(&shape, x, weight, gradient)?);
    }
    if let Some(bias) = convolution.places.bias.filter(|place| context.needs[*place]) {
        gradients[bias] = Some(sum_rows(gradient)?);
    }
    convolution.places.gradients(context, &mut gradients)?;
    Ok(gradients)
}

fn input_gradient(convolution: &Conv2d, x: &Tensor, weight: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let shape = geometry(convolution, x, weight)?;
    let device = cuda_device(NAME, x)?;
    let dx = Buffer::like(NAME, x)?;
    let arguments = InputGradientArguments {
        dy: pointer(NAME, gradient)?,
        weight: pointer(NAME, weight)?,
        dx: dx.pointer(),
        geometry: shape,
    };
    // SAFETY: the arguments point to tensors of the shapes they state, alive on this stream.
    let narrow = || unsafe { lcm_conv2d_input_gradient_narrow(&raw const arguments, stream(&device)) };
    // SAFETY: as above.
    let hopper = || unsafe { lcm_conv2d_input_gradient_hopper(&raw const arguments, stream(&device)) };
    if !tried(NARROW, narrow)? && !tried(HOPPER, hopper)? {
        im2col::input_gradient(&shape, weight, gradient, dx.pointer())?;
    }
    Ok(dx.into_tensor())
}

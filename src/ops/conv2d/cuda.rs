//! Convolution on a GPU: a kernel for the narrow ends of networks, Hopper's implicit matrix product where it takes the
//! shapes; elsewhere the patches are laid out as a matrix.

use std::ffi::c_void;

use candle_core::Tensor;

use super::{Conv2d, im2col};
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, add_channels, avoids, cuda_device, dtype_code, pointer, stream, sum_rows, taken};
use crate::ops::activation::cuda::{gate, rectify};
use crate::ops::elementwise::cuda::add_to;
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
    rectified: i32,
}

/// `LcmConv2dInputGradient` of `conv2d.h`.
#[repr(C)]
struct InputGradientArguments {
    dy: *const c_void,
    weight: *const c_void,
    residual: *const c_void,
    gate: *const c_void,
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

/// A convolution and what is done with its result as it is written.
#[derive(Clone, Copy)]
pub(crate) struct Convolution<'a> {
    pub x: &'a Tensor,
    pub weight: &'a Tensor,
    pub stride: usize,
    /// Left and above, right and below.
    pub padding: [usize; 2],
    pub bias: Option<&'a Tensor>,
    pub per_sample: Option<&'a Tensor>,
    pub residual: Option<&'a Tensor>,
    /// Whether what is negative becomes 0, after all sums.
    pub rectified: bool,
}

fn geometry(x: &Tensor, weight: &Tensor, stride: usize, padding: [usize; 2]) -> Result<Geometry> {
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
        stride: stride as i32,
        padding: padding[0] as i32,
        padding_end: padding[1] as i32,
        dtype: dtype_code(NAME, x.dtype())?,
    })
}

/// Where a tensor that may be missing begins.
fn at(tensor: Option<&Tensor>) -> Result<Option<*const c_void>> {
    tensor.map(|tensor| pointer(NAME, tensor).map(|pointer| pointer.cast_const())).transpose()
}

/// Whether a family of kernels took the work.
fn tried(family: &str, launch: impl FnOnce() -> i32) -> Result<bool> {
    if avoids(family) { Ok(false) } else { taken(NAME, launch()) }
}

impl Convolution<'_> {
    /// The result. The tensors are contiguous and fit each other.
    pub fn run(&self) -> Result<Buffer> {
        let (x, weight) = (self.x, self.weight);
        let shape = geometry(x, weight, self.stride, self.padding)?;
        let device = cuda_device(NAME, x)?;
        let (height, width) = shape.out();
        let y = Buffer::new(&device, (x.dim(0)?, height, width, weight.dim(0)?), x.dtype())?;
        let (bias, residual, null) = (at(self.bias)?, at(self.residual)?, std::ptr::null());
        let arguments = ForwardArguments {
            x: pointer(NAME, x)?,
            weight: pointer(NAME, weight)?,
            bias: bias.unwrap_or(null),
            per_sample_bias: at(self.per_sample)?.unwrap_or(null),
            residual: residual.unwrap_or(null),
            y: y.pointer(),
            geometry: shape,
            rectified: i32::from(self.rectified),
        };
        // SAFETY: the arguments point to tensors of the shapes they state, alive on this stream.
        let narrow = || unsafe { lcm_conv2d_forward_narrow(&raw const arguments, stream(&device)) };
        // SAFETY: as above.
        let hopper = || unsafe { lcm_conv2d_forward_hopper(&raw const arguments, stream(&device)) };
        if tried(NARROW, narrow)? || tried(HOPPER, hopper)? {
            return Ok(y);
        }
        im2col::forward(&shape, x, weight, (bias, residual), y.pointer())?;
        let y = match self.per_sample {
            Some(vectors) => add_channels(y, vectors)?,
            None => y,
        };
        if self.rectified { rectify(y, x.dtype(), &device) } else { Ok(y) }
    }
}

/// The gradient of a convolution's input, and what is done with it as it is written.
pub(crate) struct InputGradient<'a> {
    /// The input, of which only the shape counts.
    pub x: &'a Tensor,
    pub weight: &'a Tensor,
    pub stride: usize,
    pub padding: [usize; 2],
    /// Of the output.
    pub gradient: &'a Tensor,
    /// Added.
    pub residual: Option<&'a Tensor>,
    /// Instead of a residual: where this is not positive the gradient becomes 0. It is the input, where that is the
    /// result of a rectifier.
    pub gate: Option<&'a Tensor>,
}

impl InputGradient<'_> {
    /// The result. The tensors are contiguous and fit each other.
    pub fn run(&self) -> Result<Buffer> {
        let (x, weight, gradient) = (self.x, self.weight, self.gradient);
        let shape = geometry(x, weight, self.stride, self.padding)?;
        let device = cuda_device(NAME, gradient)?;
        let dx = Buffer::new(&device, x.shape().clone(), x.dtype())?;
        let arguments = InputGradientArguments {
            dy: pointer(NAME, gradient)?,
            weight: pointer(NAME, weight)?,
            residual: at(self.residual)?.unwrap_or(std::ptr::null()),
            gate: at(self.gate)?.unwrap_or(std::ptr::null()),
            dx: dx.pointer(),
            geometry: shape,
        };
        // SAFETY: the arguments point to tensors of the shapes they state, alive on this stream.
        let narrow = || unsafe { lcm_conv2d_input_gradient_narrow(&raw const arguments, stream(&device)) };
        // SAFETY: as above.
        let hopper = || unsafe { lcm_conv2d_input_gradient_hopper(&raw const arguments, stream(&device)) };
        if tried(NARROW, narrow)? || tried(HOPPER, hopper)? {
            return Ok(dx);
        }
        im2col::input_gradient(&shape, weight, gradient, dx.pointer())?;
        let dx = match self.residual {
            Some(residual) => add_to(dx, residual)?,
            None => dx,
        };
        match self.gate {
            Some(result) => gate(dx, result),
            None => Ok(dx),
        }
    }
}

pub(super) fn forward(convolution: &Conv2d, inputs: &[Tensor]) -> Result<Forward> {
    let places = convolution.places;
    let at = |place: Option<usize>| place.map(|place| &inputs[place]);
    let y = Convolution {
        x: &inputs[0],
        weight: &inputs[1],
        stride: convolution.stride,
        padding: [convolution.padding, convolution.padding_end],
        bias: at(places.bias),
        per_sample: at(places.per_sample),
        residual: at(places.residual),
        rectified: false,
    };
    Ok(y.run()?.into_output().into())
}

pub(super) fn backward(convolution: &Conv2d, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let (x, weight, gradient) = (&context.inputs[0], &context.inputs[1], context.gradient()?);
    let (stride, padding) = (convolution.stride, [convolution.padding, convolution.padding_end]);
    let mut gradients = vec![None; context.inputs.len()];
    if context.needs[0] {
        let dx = InputGradient { x, weight, stride, padding, gradient, residual: None, gate: None };
        gradients[0] = Some(dx.run()?.into_tensor());
    }
    if context.needs[1] {
        let shape = geometry(x, weight, stride, padding)?;
        gradients[1] = Some(im2col::weight_gradient(&shape, x, weight, gradient)?);
    }
    if let Some(bias) = convolution.places.bias.filter(|place| context.needs[*place]) {
        gradients[bias] = Some(sum_rows(gradient)?);
    }
    convolution.places.gradients(context, &mut gradients)?;
    Ok(gradients)
}

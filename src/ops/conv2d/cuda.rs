//! Convolution on a GPU: Hopper's implicit matrix product where it takes the shapes; elsewhere the patches are laid out
//! as a matrix (im2col) for cuBLASLt.

use std::ffi::c_void;

use candle_core::Tensor;

use super::Conv2d;
use crate::autograd::{Backward, Forward, Output};
use crate::cuda::{
    Buffer, Gemm, Operand, add_channels, avoids, check, cuda_device, dtype_code, gemm, pointer, stream, sum_rows, taken,
};
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
    y_row: i32,
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
struct Geometry {
    batch: i32,
    height: i32,
    width: i32,
    input_channels: i32,
    output_channels: i32,
    kernel: i32,
    stride: i32,
    padding: i32,
    dtype: i32,
}

impl Geometry {
    /// Height and width of the output.
    fn out(&self) -> (usize, usize) {
        let out = |size: i32| ((size + 2 * self.padding - self.kernel) / self.stride + 1) as usize;
        (out(self.height), out(self.width))
    }

    /// Pixels of the output, over the whole batch.
    fn rows(&self) -> usize {
        let (height, width) = self.out();
        self.batch as usize * height * width
    }
}

unsafe extern "C" {
    fn lcm_im2col_forward(
        x: *const c_void,
        patches: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        kernel_height: i32,
        kernel_width: i32,
        stride: i32,
        padding: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_im2col_backward(
        patches: *const c_void,
        x: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        kernel_height: i32,
        kernel_width: i32,
        stride: i32,
        padding: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_conv2d_forward_hopper(arguments: *const ForwardArguments, stream: *mut c_void) -> i32;
    fn lcm_conv2d_input_gradient_hopper(arguments: *const InputGradientArguments, stream: *mut c_void) -> i32;
}

const NAME: &str = "conv2d";
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
        dtype: dtype_code(NAME, x.dtype())?,
    })
}

/// The patches as a matrix `(batch * out_height * out_width, kernel * kernel * in_channels)`.
fn im2col(convolution: &Conv2d, x: &Tensor, weight: &Tensor) -> Result<(Buffer, usize, usize)> {
    let shape = geometry(convolution, x, weight)?;
    let (rows, columns) = (shape.rows(), weight.elem_count() / weight.dim(0)?);
    let device = cuda_device(NAME, x)?;
    let patches = Buffer::new(&device, (rows, columns), x.dtype())?;
    // SAFETY: the pointers belong to tensors of the shapes stated.
    let status = unsafe {
        lcm_im2col_forward(
            pointer(NAME, x)?,
            patches.pointer(),
            i64::from(shape.batch),
            shape.height,
            shape.width,
            shape.input_channels,
            shape.kernel,
            shape.kernel,
            shape.stride,
            shape.padding,
            shape.dtype,
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok((patches, rows, columns))
}

pub(super) fn forward(convolution: &Conv2d, inputs: &[Tensor]) -> Result<Forward> {
    let (x, weight) = (&inputs[0], &inputs[1]);
    let places = convolution.places;
    let shape = geometry(convolution, x, weight)?;
    let device = cuda_device(NAME, x)?;
    let out_channels = weight.dim(0)?;
    let (height, width) = shape.out();
    // The kernel for Hopper writes channels by eights.
    let padded = out_channels.next_multiple_of(8);
    let mut y = Buffer::new(&device, (x.dim(0)?, height, width, padded), x.dtype())?;
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
        y_row: padded as i32,
    };
    // SAFETY: the arguments point to tensors of the shapes they state, alive on this stream.
    let done =
        !avoids(HOPPER) && taken(NAME, unsafe { lcm_conv2d_forward_hopper(&raw const arguments, stream(&device)) })?;
    if done && padded != out_channels {
        return Ok(Output::Tensor(y.into_tensor().narrow(3, 0, out_channels)?.contiguous()?).into());
    }
    if !done {
        if padded != out_channels {
            y = Buffer::new(&device, (x.dim(0)?, height, width, out_channels), x.dtype())?;
        }
        let (patches, rows, columns) = im2col(convolution, x, weight)?;
        gemm(
            &device,
            &Gemm {
                dtype: x.dtype(),
                left: Operand::new(patches.pointer(), rows, columns),
                right: Operand::new(pointer(NAME, weight)?, out_channels, columns).t(),
                scale: 1.0,
                addend: residual,
                bias,
                out: y.pointer(),
                out_dtype: x.dtype(),
                batch: (1, [0; 3]),
            },
        )?;
        if let Some(place) = places.per_sample {
            return Ok(add_channels(y, &inputs[place])?.into_output().into());
        }
    }
    Ok(y.into_output().into())
}

pub(super) fn backward(convolution: &Conv2d, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (&context.inputs[0], &context.inputs[1]);
    let gradient = context.gradient()?;
    let mut gradients = vec![None; context.inputs.len()];
    if context.needs[0] {
        gradients[0] = Some(input_gradient(convolution, x, weight, gradient)?);
    }
    if context.needs[1] {
        let device = cuda_device(NAME, x)?;
        let (patches, rows, columns) = im2col(convolution, x, weight)?;
        let dw = Buffer::like(NAME, weight)?;
        gemm(
            &device,
            &Gemm {
                dtype: x.dtype(),
                left: Operand::new(pointer(NAME, gradient)?, rows, weight.dim(0)?).t(),
                right: Operand::new(patches.pointer(), rows, columns),
                scale: 1.0,
                addend: None,
                bias: None,
                out: dw.pointer(),
                out_dtype: x.dtype(),
                batch: (1, [0; 3]),
            },
        )?;
        gradients[1] = Some(dw.into_tensor());
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
    if avoids(HOPPER)
        || !taken(NAME, unsafe { lcm_conv2d_input_gradient_hopper(&raw const arguments, stream(&device)) })?
    {
        let (rows, out_channels) = (shape.rows(), weight.dim(0)?);
        let columns = weight.elem_count() / out_channels;
        let patches = Buffer::new(&device, (rows, columns), x.dtype())?;
        gemm(
            &device,
            &Gemm {
                dtype: x.dtype(),
                left: Operand::new(pointer(NAME, gradient)?, rows, out_channels),
                right: Operand::new(pointer(NAME, weight)?, out_channels, columns),
                scale: 1.0,
                addend: None,
                bias: None,
                out: patches.pointer(),
                out_dtype: x.dtype(),
                batch: (1, [0; 3]),
            },
        )?;
        // SAFETY: as above.
        let status = unsafe {
            lcm_im2col_backward(
                patches.pointer(),
                dx.pointer(),
                i64::from(shape.batch),
                shape.height,
                shape.width,
                shape.input_channels,
                shape.kernel,
                shape.kernel,
                shape.stride,
                shape.padding,
                shape.dtype,
                stream(&device),
            )
        };
        check(NAME, status)?;
    }
    Ok(dx.into_tensor())
}

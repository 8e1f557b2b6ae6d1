//! Depthwise convolution on a GPU.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use super::DepthwiseConv2d;
use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream, sum_rows};

/// `LcmDepthwiseConv2d` of `depthwise_conv2d.h`.
#[repr(C)]
struct Sizes {
    batch: i32,
    height: i32,
    width: i32,
    channels: i32,
    kernel_height: i32,
    kernel_width: i32,
    stride: i32,
    padding: i32,
    dtype: i32,
}

unsafe extern "C" {
    fn lcm_depthwise_conv2d_forward(
        x: *const c_void,
        weight: *const c_void,
        bias: *const c_void,
        y: *mut c_void,
        sizes: *const Sizes,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_depthwise_conv2d_input_gradient(
        dy: *const c_void,
        weight: *const c_void,
        dx: *mut c_void,
        sizes: *const Sizes,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_depthwise_conv2d_workspace(sizes: *const Sizes) -> usize;
    fn lcm_depthwise_conv2d_weight_gradient(
        x: *const c_void,
        dy: *const c_void,
        dweight: *mut f32,
        sizes: *const Sizes,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "depthwise_conv2d";

fn sizes(conv: &DepthwiseConv2d, x: &Tensor, weight: &Tensor) -> Result<Sizes> {
    let ((batch, height, width, channels), (kernel_height, kernel_width, _)) = (x.dims4()?, weight.dims3()?);
    Ok(Sizes {
        batch: batch as i32,
        height: height as i32,
        width: width as i32,
        channels: channels as i32,
        kernel_height: kernel_height as i32,
        kernel_width: kernel_width as i32,
        stride: conv.stride as i32,
        padding: conv.padding as i32,
        dtype: dtype_code(NAME, x.dtype())?,
    })
}

pub(super) fn forward(conv: &DepthwiseConv2d, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Forward> {
    let device = cuda_device(NAME, x)?;
    let sizes = sizes(conv, x, weight)?;
    let (batch, height, width, channels) = x.dims4()?;
    let (kernel_height, kernel_width, _) = weight.dims3()?;
    let out = |size: usize, kernel: usize| (size + 2 * conv.padding - kernel) / conv.stride + 1;
    let y = Buffer::new(&device, (batch, out(height, kernel_height), out(width, kernel_width), channels), x.dtype())?;
    let bias = bias.map_or(Ok(std::ptr::null_mut()), |bias| pointer(NAME, bias))?;
    let (x, weight) = (pointer(NAME, x)?, pointer(NAME, weight)?);
    // SAFETY: the pointers belong to tensors of the shapes stated, alive on this stream.
    let status =
        unsafe { lcm_depthwise_conv2d_forward(x, weight, bias, y.pointer(), &raw const sizes, stream(&device)) };
    check(NAME, status)?;
    Ok(y.into_output().into())
}

pub(super) fn backward(conv: &DepthwiseConv2d, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (&context.inputs[0], &context.inputs[1]);
    let device = cuda_device(NAME, x)?;
    let sizes = sizes(conv, x, weight)?;
    let (gradient, stream) = (context.gradient()?, stream(&device));
    let dy = pointer(NAME, gradient)?;
    let mut gradients = vec![None; context.inputs.len()];
    if context.needs[0] {
        let (dx, weight) = (Buffer::like(NAME, x)?, pointer(NAME, weight)?);
        // SAFETY: as in `forward`.
        let status = unsafe { lcm_depthwise_conv2d_input_gradient(dy, weight, dx.pointer(), &raw const sizes, stream) };
        check(NAME, status)?;
        gradients[0] = Some(dx.into_tensor());
    }
    if context.needs[1] {
        let (dweight, x) = (Buffer::new(&device, weight.shape().clone(), DType::F32)?, pointer(NAME, x)?);
        // SAFETY: as in `forward`; the workspace has the size asked for.
        let status = unsafe {
            let workspace = Buffer::bytes(&device, lcm_depthwise_conv2d_workspace(&raw const sizes))?;
            let (to, workspace) = (dweight.pointer().cast(), workspace.pointer());
            lcm_depthwise_conv2d_weight_gradient(x, dy, to, &raw const sizes, workspace, stream)
        };
        check(NAME, status)?;
        gradients[1] = Some(dweight.into_tensor().to_dtype(weight.dtype())?);
    }
    if context.needs.get(2) == Some(&true) {
        gradients[2] = Some(sum_rows(gradient)?);
    }
    Ok(gradients)
}

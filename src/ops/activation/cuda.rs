//! Activation functions on a GPU.

use std::ffi::c_void;

use candle_core::{CudaDevice, DType, Tensor};

use super::Activation;
use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `activation.h`.
unsafe extern "C" {
    fn lcm_activation_forward(
        x: *const c_void,
        y: *mut c_void,
        count: i64,
        activation: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_activation_backward(
        x: *const c_void,
        dy: *const c_void,
        dx: *mut c_void,
        count: i64,
        activation: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "activation";

impl Activation {
    /// The function as the kernels take it.
    pub(crate) fn code(self) -> i32 {
        match self {
            Activation::None => 0,
            Activation::Silu => 1,
            Activation::Gelu => 2,
            Activation::QuickGelu => 3,
            Activation::Relu => 4,
        }
    }
}

pub(super) fn forward(activation: Activation, x: &Tensor) -> Result<Forward> {
    let y = Buffer::like(NAME, x)?;
    let (count, dtype) = (x.elem_count() as i64, dtype_code(NAME, x.dtype())?);
    let stream = stream(&cuda_device(NAME, x)?);
    // SAFETY: both pointers belong to `count` numbers of this dtype, alive on this stream.
    let status =
        unsafe { lcm_activation_forward(pointer(NAME, x)?, y.pointer(), count, activation.code(), dtype, stream) };
    check(NAME, status)?;
    Ok(y.into_output().into())
}

/// A rectifier, in place.
pub(crate) fn rectify(y: Buffer, dtype: DType, device: &CudaDevice) -> Result<Buffer> {
    let (count, code) = (y.elem_count() as i64, Activation::Relu.code());
    // SAFETY: the memory holds `count` numbers, each of which is read and written by one thread.
    let status = unsafe {
        lcm_activation_forward(y.pointer(), y.pointer(), count, code, dtype_code(NAME, dtype)?, stream(device))
    };
    check(NAME, status)?;
    Ok(y)
}

pub(super) fn backward(activation: Activation, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    Ok(vec![Some(gradient(activation, &context.inputs[0], context.gradient()?)?)])
}

fn gradient(activation: Activation, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let dx = Buffer::like(NAME, x)?;
    let (count, dtype) = (x.elem_count() as i64, dtype_code(NAME, x.dtype())?);
    let (at, dy) = (pointer(NAME, x)?, pointer(NAME, gradient)?);
    let stream = stream(&cuda_device(NAME, x)?);
    // SAFETY: as in `forward`.
    check(NAME, unsafe { lcm_activation_backward(at, dy, dx.pointer(), count, activation.code(), dtype, stream) })?;
    Ok(dx.into_tensor())
}

/// The gradient of a rectifier, given its result.
pub(crate) fn gated(dy: &Tensor, result: &Tensor) -> Result<Tensor> {
    gradient(Activation::Relu, result, dy)
}

/// The same in place.
pub(crate) fn gate(gradient: Buffer, result: &Tensor) -> Result<Buffer> {
    let (at, dx, count) = (pointer(NAME, result)?, gradient.pointer(), gradient.elem_count() as i64);
    let (code, dtype) = (Activation::Relu.code(), dtype_code(NAME, result.dtype())?);
    // SAFETY: as in `rectify`; result and gradient are of one shape.
    check(NAME, unsafe {
        lcm_activation_backward(at, dx, dx, count, code, dtype, stream(&cuda_device(NAME, result)?))
    })?;
    Ok(gradient)
}

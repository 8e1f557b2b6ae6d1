//! Activation functions on a GPU.

use std::ffi::c_void;

use candle_core::Tensor;

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

pub(super) fn backward(activation: Activation, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let dx = Buffer::like(NAME, x)?;
    let (count, dtype) = (x.elem_count() as i64, dtype_code(NAME, x.dtype())?);
    let (at, dy) = (pointer(NAME, x)?, pointer(NAME, context.gradient()?)?);
    let stream = stream(&cuda_device(NAME, x)?);
    // SAFETY: as in `forward`.
    check(NAME, unsafe { lcm_activation_backward(at, dy, dx.pointer(), count, activation.code(), dtype, stream) })?;
    Ok(vec![Some(dx.into_tensor())])
}

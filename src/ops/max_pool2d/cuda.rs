//! Maximum pooling on a GPU.

use std::ffi::c_void;

use candle_core::Tensor;

use super::MaxPool2d;
use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `max_pool2d.h`.
unsafe extern "C" {
    fn lcm_max_pool2d_forward(
        x: *const c_void,
        y: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        kernel: i32,
        stride: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_max_pool2d_backward(
        x: *const c_void,
        dy: *const c_void,
        dx: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        kernel: i32,
        stride: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "max_pool2d";

pub(super) fn forward(pool: &MaxPool2d, x: &Tensor) -> Result<Forward> {
    let device = cuda_device(NAME, x)?;
    let (batch, height, width, channels) = x.dims4()?;
    let out = |size: usize| (size - pool.kernel) / pool.stride + 1;
    let y = Buffer::new(&device, (batch, out(height), out(width), channels), x.dtype())?;
    // SAFETY: the pointers belong to tensors of the shapes stated, alive on this stream.
    let status = unsafe {
        lcm_max_pool2d_forward(
            pointer(NAME, x)?,
            y.pointer(),
            batch as i64,
            height as i32,
            width as i32,
            channels as i32,
            pool.kernel as i32,
            pool.stride as i32,
            dtype_code(NAME, x.dtype())?,
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(y.into_output().into())
}

pub(super) fn backward(pool: &MaxPool2d, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let device = cuda_device(NAME, x)?;
    let (batch, height, width, channels) = x.dims4()?;
    let dx = Buffer::like(NAME, x)?;
    // SAFETY: as in `forward`.
    let status = unsafe {
        lcm_max_pool2d_backward(
            pointer(NAME, x)?,
            pointer(NAME, context.gradient()?)?,
            dx.pointer(),
            batch as i64,
            height as i32,
            width as i32,
            channels as i32,
            pool.kernel as i32,
            pool.stride as i32,
            dtype_code(NAME, x.dtype())?,
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(vec![Some(dx.into_tensor())])
}

//! Doubling of height and width on a GPU.

use std::ffi::c_void;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `upsample_nearest_2x.h`.
unsafe extern "C" {
    fn lcm_upsample_nearest_2x_forward(
        x: *const c_void,
        y: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_upsample_nearest_2x_backward(
        dy: *const c_void,
        dx: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "upsample_nearest_2x";

pub(super) fn forward(x: &Tensor) -> Result<Forward> {
    let device = cuda_device(NAME, x)?;
    let (batch, height, width, channels) = x.dims4()?;
    let y = Buffer::new(&device, (batch, 2 * height, 2 * width, channels), x.dtype())?;
    let (at, dtype) = (pointer(NAME, x)?, dtype_code(NAME, x.dtype())?);
    let (height, width, channels) = (height as i32, width as i32, channels as i32);
    let stream = stream(&device);
    // SAFETY: the pointers belong to tensors and buffers of the shapes stated, alive on this stream.
    check(NAME, unsafe {
        lcm_upsample_nearest_2x_forward(at, y.pointer(), batch as i64, height, width, channels, dtype, stream)
    })?;
    Ok(y.into_output().into())
}

pub(super) fn backward(context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let (batch, height, width, channels) = x.dims4()?;
    let dx = Buffer::like(NAME, x)?;
    let (dy, dtype) = (pointer(NAME, context.gradient()?)?, dtype_code(NAME, x.dtype())?);
    let (height, width, channels) = (height as i32, width as i32, channels as i32);
    let stream = stream(&cuda_device(NAME, x)?);
    // SAFETY: as in `forward`.
    check(NAME, unsafe {
        lcm_upsample_nearest_2x_backward(dy, dx.pointer(), batch as i64, height, width, channels, dtype, stream)
    })?;
    Ok(vec![Some(dx.into_tensor())])
}

//! The gated linear unit of the transformer's feed-forward layers on a GPU.

use std::ffi::c_void;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `geglu.h`.
unsafe extern "C" {
    fn lcm_geglu_forward(
        x: *const c_void,
        y: *mut c_void,
        rows: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_geglu_backward(
        x: *const c_void,
        dy: *const c_void,
        dx: *mut c_void,
        rows: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "geglu";

/// Shape of the result, rows and channels.
fn extent(x: &Tensor) -> (Vec<usize>, i64, i32) {
    let mut shape = x.dims().to_vec();
    let channels = shape.pop().unwrap_or(0) / 2;
    let rows: usize = shape.iter().product();
    shape.push(channels);
    (shape, rows as i64, channels as i32)
}

pub(super) fn forward(x: &Tensor) -> Result<Forward> {
    Ok(value(x)?.into_output().into())
}

pub(super) fn backward(context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    Ok(vec![Some(gradient(&context.inputs[0], context.gradient()?)?)])
}

pub(in crate::ops) fn value(x: &Tensor) -> Result<Buffer> {
    let device = cuda_device(NAME, x)?;
    let (shape, rows, channels) = extent(x);
    let y = Buffer::new(&device, shape, x.dtype())?;
    let dtype = dtype_code(NAME, x.dtype())?;
    // SAFETY: the pointers belong to `rows` rows of the widths stated, alive on this stream.
    let status = unsafe { lcm_geglu_forward(pointer(NAME, x)?, y.pointer(), rows, channels, dtype, stream(&device)) };
    check(NAME, status)?;
    Ok(y)
}

/// The gradient of `x` from that of the result.
pub(in crate::ops) fn gradient(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let device = cuda_device(NAME, x)?;
    let (_, rows, channels) = extent(x);
    let dx = Buffer::like(NAME, x)?;
    let (at, dy, dtype) = (pointer(NAME, x)?, pointer(NAME, dy)?, dtype_code(NAME, x.dtype())?);
    // SAFETY: as in `value`.
    check(NAME, unsafe { lcm_geglu_backward(at, dy, dx.pointer(), rows, channels, dtype, stream(&device)) })?;
    Ok(dx.into_tensor())
}

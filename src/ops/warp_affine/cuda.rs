//! Affine warping on a GPU.

use std::ffi::c_void;

use candle_core::Tensor;

use super::WarpAffine;
use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream, upload};

// `warp_affine.h`.
unsafe extern "C" {
    fn lcm_warp_affine_forward(
        x: *const c_void,
        matrices: *const f64,
        y: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        new_height: i32,
        new_width: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_warp_affine_backward(
        dy: *const c_void,
        matrices: *const f64,
        dx: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        new_height: i32,
        new_width: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "warp_affine";

/// The matrices of all samples, on the GPU.
fn matrices(warp: &WarpAffine, x: &Tensor) -> Result<Tensor> {
    let numbers: Vec<f64> = warp.matrices.iter().flatten().flatten().copied().collect();
    upload(&cuda_device(NAME, x)?, &numbers)
}

pub(super) fn forward(warp: &WarpAffine, x: &Tensor) -> Result<Forward> {
    let device = cuda_device(NAME, x)?;
    let (batch, height, width, channels) = x.dims4()?;
    let y = Buffer::new(&device, (batch, warp.height, warp.width, channels), x.dtype())?;
    let matrices = matrices(warp, x)?;
    // SAFETY: the pointers belong to tensors and buffers of the shapes stated, alive on this stream.
    let status = unsafe {
        lcm_warp_affine_forward(
            pointer(NAME, x)?,
            pointer(NAME, &matrices)?.cast(),
            y.pointer(),
            batch as i64,
            height as i32,
            width as i32,
            channels as i32,
            warp.height as i32,
            warp.width as i32,
            dtype_code(NAME, x.dtype())?,
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(y.into_output().into())
}

pub(super) fn backward(warp: &WarpAffine, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let (batch, height, width, channels) = x.dims4()?;
    let dx = Buffer::like(NAME, x)?;
    let matrices = matrices(warp, x)?;
    // SAFETY: as in `forward`.
    let status = unsafe {
        lcm_warp_affine_backward(
            pointer(NAME, context.gradient()?)?,
            pointer(NAME, &matrices)?.cast(),
            dx.pointer(),
            batch as i64,
            height as i32,
            width as i32,
            channels as i32,
            warp.height as i32,
            warp.width as i32,
            dtype_code(NAME, x.dtype())?,
            stream(&cuda_device(NAME, x)?),
        )
    };
    check(NAME, status)?;
    Ok(vec![Some(dx.into_tensor())])
}

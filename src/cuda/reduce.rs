//! Vectors broadcast over positions, and the sums over positions that are their gradients.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use super::{Buffer, check, cuda_device, dtype_code, pointer, stream};
use crate::Result;

// `elementwise.h`.
unsafe extern "C" {
    fn lcm_elementwise_sum_pixels_workspace(batch: i64, pixels: i64, channels: i32) -> usize;
    fn lcm_elementwise_sum_pixels(
        x: *const c_void,
        out: *mut f32,
        batch: i64,
        pixels: i64,
        channels: i32,
        dtype: i32,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_elementwise_add_channels(
        x: *const c_void,
        v: *const c_void,
        out: *mut c_void,
        batch: i64,
        pixels: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
}

/// `(batch, ..., channels)` summed over all but the channels and, where `per_sample` is set, the batch. Accumulated in
/// f32 in a fixed order, of the dtype of `x`.
pub(crate) fn sum_positions(x: &Tensor, per_sample: bool) -> Result<Tensor> {
    let (name, channels) = ("sum of positions", x.dims()[x.rank() - 1]);
    let device = cuda_device(name, x)?;
    let batch = if per_sample { x.dims()[0] } else { 1 };
    let pixels = (x.elem_count() / (batch * channels).max(1)) as i64;
    let shape = if per_sample { vec![batch, channels] } else { vec![channels] };
    let out = Buffer::new(&device, shape, DType::F32)?;
    let (batch, channels) = (batch as i64, channels as i32);
    // SAFETY: the pointers belong to tensors and buffers of the shapes stated, alive on this stream.
    let status = unsafe {
        let workspace = Buffer::bytes(&device, lcm_elementwise_sum_pixels_workspace(batch, pixels, channels))?;
        lcm_elementwise_sum_pixels(
            pointer(name, x)?,
            out.pointer().cast(),
            batch,
            pixels,
            channels,
            dtype_code(name, x.dtype())?,
            workspace.pointer(),
            stream(&device),
        )
    };
    check(name, status)?;
    Ok(out.into_tensor().to_dtype(x.dtype())?)
}

/// `(..., channels)` summed over all but the last dimension: the gradient of a bias.
pub(crate) fn sum_rows(x: &Tensor) -> Result<Tensor> {
    sum_positions(x, false)
}

/// Adds a vector a sample, `(batch, channels)`, at every position of a fresh `(batch, ..., channels)`, in place.
pub(crate) fn add_channels(x: Buffer, vectors: &Tensor) -> Result<Buffer> {
    let name = "per-sample addition";
    let device = cuda_device(name, vectors)?;
    let (batch, channels) = vectors.dims2()?;
    let positions = x.elem_count() / (batch * channels).max(1);
    // SAFETY: the pointers belong to tensors and buffers of the shapes stated, alive on this stream.
    let status = unsafe {
        lcm_elementwise_add_channels(
            x.pointer(),
            pointer(name, vectors)?,
            x.pointer(),
            batch as i64,
            positions as i64,
            channels as i32,
            dtype_code(name, vectors.dtype())?,
            stream(&device),
        )
    };
    check(name, status)?;
    Ok(x)
}

//! Squeeze and excitation on a GPU.

use std::ffi::c_void;

use candle_core::{DType, Shape, Tensor};

use super::sizes;
use crate::Result;
use crate::autograd::Forward;
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `gated_sum.h`.
unsafe extern "C" {
    fn lcm_gated_sum_forward(
        x: *const c_void,
        logits: *const c_void,
        addend: *const c_void,
        y: *mut c_void,
        batch: i64,
        pixels: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_gated_sum_input_gradient(
        dy: *const c_void,
        logits: *const c_void,
        dx: *mut c_void,
        batch: i64,
        pixels: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_gated_sum_workspace(batch: i64, pixels: i64, channels: i32) -> usize;
    fn lcm_gated_sum_logit_gradient(
        x: *const c_void,
        dy: *const c_void,
        logits: *const c_void,
        sums: *mut f32,
        dlogits: *mut c_void,
        batch: i64,
        pixels: i64,
        channels: i32,
        dtype: i32,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_mean_pixels(
        x: *const c_void,
        sums: *mut f32,
        out: *mut c_void,
        batch: i64,
        pixels: i64,
        channels: i32,
        dtype: i32,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_spread_over_pixels(
        v: *const c_void,
        out: *mut c_void,
        factor: f32,
        batch: i64,
        pixels: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "gated_sum";

fn extent(x: &Tensor) -> Result<(i64, i64, i32)> {
    let (batch, pixels, channels) = sizes(NAME, x)?;
    Ok((batch as i64, pixels as i64, channels as i32))
}

pub(super) fn forward(x: &Tensor, logits: &Tensor, addend: &Tensor) -> Result<Forward> {
    let (device, (batch, pixels, channels)) = (cuda_device(NAME, x)?, extent(x)?);
    let (y, dtype) = (Buffer::like(NAME, x)?, dtype_code(NAME, x.dtype())?);
    let (x, logits, addend) = (pointer(NAME, x)?, pointer(NAME, logits)?, pointer(NAME, addend)?);
    let stream = stream(&device);
    // SAFETY: the pointers belong to tensors of the shapes that `gated_sum` has checked, alive on this stream.
    let status =
        unsafe { lcm_gated_sum_forward(x, logits, addend, y.pointer(), batch, pixels, channels, dtype, stream) };
    check(NAME, status)?;
    Ok(y.into_output().into())
}

pub(super) fn input_gradient(dy: &Tensor, logits: &Tensor) -> Result<Tensor> {
    let (device, (batch, pixels, channels)) = (cuda_device(NAME, dy)?, extent(dy)?);
    let (dx, dtype) = (Buffer::like(NAME, dy)?, dtype_code(NAME, dy.dtype())?);
    let (dy, logits, stream) = (pointer(NAME, dy)?, pointer(NAME, logits)?, stream(&device));
    // SAFETY: as in `forward`.
    let status =
        unsafe { lcm_gated_sum_input_gradient(dy, logits, dx.pointer(), batch, pixels, channels, dtype, stream) };
    check(NAME, status)?;
    Ok(dx.into_tensor())
}

pub(super) fn logit_gradient(x: &Tensor, dy: &Tensor, logits: &Tensor) -> Result<Tensor> {
    let (device, (batch, pixels, channels)) = (cuda_device(NAME, x)?, extent(x)?);
    let (dlogits, sums) = (Buffer::like(NAME, logits)?, Buffer::new(&device, logits.shape().clone(), DType::F32)?);
    let dtype = dtype_code(NAME, x.dtype())?;
    // SAFETY: as in `forward`; the workspace has the size asked for.
    let status = unsafe {
        let workspace = Buffer::bytes(&device, lcm_gated_sum_workspace(batch, pixels, channels))?;
        lcm_gated_sum_logit_gradient(
            pointer(NAME, x)?,
            pointer(NAME, dy)?,
            pointer(NAME, logits)?,
            sums.pointer().cast(),
            dlogits.pointer(),
            batch,
            pixels,
            channels,
            dtype,
            workspace.pointer(),
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(dlogits.into_tensor())
}

pub(super) fn mean(x: &Tensor) -> Result<Forward> {
    let (device, (batch, pixels, channels)) = (cuda_device(NAME, x)?, extent(x)?);
    let shape = (batch as usize, 1, 1, channels as usize);
    let (out, sums) = (Buffer::new(&device, shape, x.dtype())?, Buffer::new(&device, shape, DType::F32)?);
    // SAFETY: as in `logit_gradient`.
    let status = unsafe {
        let workspace = Buffer::bytes(&device, lcm_gated_sum_workspace(batch, pixels, channels))?;
        lcm_mean_pixels(
            pointer(NAME, x)?,
            sums.pointer().cast(),
            out.pointer(),
            batch,
            pixels,
            channels,
            dtype_code(NAME, x.dtype())?,
            workspace.pointer(),
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(out.into_output().into())
}

/// One vector a sample times a factor, at every pixel of a shape.
pub(super) fn spread(v: &Tensor, factor: f64, shape: &Shape) -> Result<Vec<Option<Tensor>>> {
    let device = cuda_device(NAME, v)?;
    let out = Buffer::new(&device, shape.clone(), v.dtype())?;
    let (batch, height, width, channels) = shape.dims4()?;
    // SAFETY: as in `forward`.
    let status = unsafe {
        lcm_spread_over_pixels(
            pointer(NAME, v)?,
            out.pointer(),
            factor as f32,
            batch as i64,
            (height * width) as i64,
            channels as i32,
            dtype_code(NAME, v.dtype())?,
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(vec![Some(out.into_tensor())])
}

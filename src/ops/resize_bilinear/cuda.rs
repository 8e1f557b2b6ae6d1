//! Bilinear resizing on a GPU.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use super::{ResizeBilinear, Taps};
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `resize_bilinear.h`.
unsafe extern "C" {
    fn lcm_resize_bilinear_workspace(height: i32, width: i32, new_height: i32, new_width: i32, antialias: i32)
    -> usize;
    fn lcm_resize_bilinear_forward(
        x: *const c_void,
        y: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        new_height: i32,
        new_width: i32,
        antialias: i32,
        dtype: i32,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_resize_bilinear_backward(
        dy: *const c_void,
        dx: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        new_height: i32,
        new_width: i32,
        antialias: i32,
        dtype: i32,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "resize_bilinear";

/// Old height and width, new height and width.
fn sizes(resize: &ResizeBilinear) -> [i32; 4] {
    let (vertical, horizontal) = (&resize.vertical, &resize.horizontal);
    [vertical.from, horizontal.from, vertical.rows.len(), horizontal.rows.len()].map(|size| size as i32)
}

/// The linear map of an axis as a matrix `(rows, from)`, on the device of a tensor.
fn matrix(taps: &Taps, like: &Tensor) -> Result<Tensor> {
    let mut weights = vec![0f32; taps.rows.len() * taps.from];
    for (output, row) in taps.rows.iter().enumerate() {
        row.iter().for_each(|(input, weight)| weights[output * taps.from + input] += *weight as f32);
    }
    Ok(Tensor::from_vec(weights, (taps.rows.len(), taps.from), like.device())?)
}

/// Resizes with any filter by two matrix products, in f32.
fn by_products(vertical: &Taps, horizontal: &Taps, x: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    let (new_height, new_width) = (vertical.rows.len(), horizontal.rows.len());
    let lines = x.to_dtype(DType::F32)?.reshape((batch * height, width, channels))?;
    let wide = matrix(horizontal, x)?.broadcast_matmul(&lines)?.reshape((batch, height, new_width * channels))?;
    let resized = matrix(vertical, x)?.broadcast_matmul(&wide)?;
    Ok(resized.reshape((batch, new_height, new_width, channels))?.to_dtype(x.dtype())?)
}

pub(super) fn forward(resize: &ResizeBilinear, x: &Tensor) -> Result<Forward> {
    let Some(antialias) = resize.antialias else {
        return Ok(Output::Tensor(by_products(&resize.vertical, &resize.horizontal, x)?).into());
    };
    let device = cuda_device(NAME, x)?;
    let (batch, _, _, channels) = x.dims4()?;
    let [height, width, new_height, new_width] = sizes(resize);
    let y = Buffer::new(&device, (batch, new_height as usize, new_width as usize, channels), x.dtype())?;
    let antialias = i32::from(antialias);
    // SAFETY: the pointers belong to tensors and buffers of the shapes stated, alive on this stream.
    let status = unsafe {
        let bytes = lcm_resize_bilinear_workspace(height, width, new_height, new_width, antialias);
        let workspace = Buffer::bytes(&device, bytes)?;
        lcm_resize_bilinear_forward(
            pointer(NAME, x)?,
            y.pointer(),
            batch as i64,
            height,
            width,
            channels as i32,
            new_height,
            new_width,
            antialias,
            dtype_code(NAME, x.dtype())?,
            workspace.pointer(),
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(y.into_output().into())
}

pub(super) fn backward(resize: &ResizeBilinear, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let Some(antialias) = resize.antialias else {
        let (vertical, horizontal) = (resize.vertical.transposed(), resize.horizontal.transposed());
        return Ok(vec![Some(by_products(&vertical, &horizontal, context.gradient()?)?)]);
    };
    let x = &context.inputs[0];
    let device = cuda_device(NAME, x)?;
    let (batch, _, _, channels) = x.dims4()?;
    let [height, width, new_height, new_width] = sizes(resize);
    let dx = Buffer::like(NAME, x)?;
    let antialias = i32::from(antialias);
    // SAFETY: as in `forward`.
    let status = unsafe {
        let bytes = lcm_resize_bilinear_workspace(height, width, new_height, new_width, antialias);
        let workspace = Buffer::bytes(&device, bytes)?;
        lcm_resize_bilinear_backward(
            pointer(NAME, context.gradient()?)?,
            dx.pointer(),
            batch as i64,
            height,
            width,
            channels as i32,
            new_height,
            new_width,
            antialias,
            dtype_code(NAME, x.dtype())?,
            workspace.pointer(),
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(vec![Some(dx.into_tensor())])
}

//! Bilinear and bicubic resizing on a GPU.

use std::ffi::c_void;

use candle_core::Tensor;

use super::ResizeBilinear;
use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `resize_bilinear.h`.
unsafe extern "C" {
    fn lcm_resize_bilinear_workspace(height: i32, width: i32, new_height: i32, new_width: i32, filter: i32) -> usize;
    fn lcm_resize_bilinear_forward(
        x: *const c_void,
        y: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        new_height: i32,
        new_width: i32,
        filter: i32,
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
        filter: i32,
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

pub(super) fn forward(resize: &ResizeBilinear, x: &Tensor) -> Result<Forward> {
    let device = cuda_device(NAME, x)?;
    let (batch, _, _, channels) = x.dims4()?;
    let [height, width, new_height, new_width] = sizes(resize);
    let y = Buffer::new(&device, (batch, new_height as usize, new_width as usize, channels), x.dtype())?;
    let filter = resize.filter as i32;
    // SAFETY: the pointers belong to tensors and buffers of the shapes stated, alive on this stream.
    let status = unsafe {
        let bytes = lcm_resize_bilinear_workspace(height, width, new_height, new_width, filter);
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
            filter,
            dtype_code(NAME, x.dtype())?,
            workspace.pointer(),
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(y.into_output().into())
}

pub(super) fn backward(resize: &ResizeBilinear, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let device = cuda_device(NAME, x)?;
    let (batch, _, _, channels) = x.dims4()?;
    let [height, width, new_height, new_width] = sizes(resize);
    let dx = Buffer::like(NAME, x)?;
    let filter = resize.filter as i32;
    // SAFETY: as in `forward`.
    let status = unsafe {
        let bytes = lcm_resize_bilinear_workspace(height, width, new_height, new_width, filter);
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
            filter,
            dtype_code(NAME, x.dtype())?,
            workspace.pointer(),
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(vec![Some(dx.into_tensor())])
}

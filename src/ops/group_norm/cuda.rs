//! Group normalisation on a GPU.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use super::GroupNorm;
use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `group_norm.h`.
unsafe extern "C" {
    fn lcm_group_norm_workspace(batch: i64, pixels: i64, channels: i32, groups: i32) -> usize;
    fn lcm_group_norm_forward(
        x1: *const c_void,
        x2: *const c_void,
        weight: *const c_void,
        bias: *const c_void,
        y: *mut c_void,
        mean: *mut f32,
        rstd: *mut f32,
        batch: i64,
        pixels: i64,
        channels1: i32,
        channels2: i32,
        groups: i32,
        eps: f32,
        activation: i32,
        dtype: i32,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_group_norm_backward(
        x1: *const c_void,
        x2: *const c_void,
        weight: *const c_void,
        bias: *const c_void,
        mean: *const f32,
        rstd: *const f32,
        dy: *const c_void,
        so_far: *const c_void,
        dx1: *mut c_void,
        dx2: *mut c_void,
        dweight: *mut f32,
        dbias: *mut f32,
        batch: i64,
        pixels: i64,
        channels1: i32,
        channels2: i32,
        groups: i32,
        activation: i32,
        dtype: i32,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "group_norm";

/// Batch, pixels and channels.
fn extent(x: &Tensor) -> (i64, i64, i32) {
    let (batch, channels) = (x.dims()[0], x.dims()[x.rank() - 1]);
    (batch as i64, (x.elem_count() / (batch * channels)) as i64, channels as i32)
}

pub(super) fn forward(norm: &GroupNorm, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Forward> {
    let device = cuda_device(NAME, x)?;
    let ((batch, pixels, channels), groups) = (extent(x), norm.groups as i32);
    let y = Buffer::like(NAME, x)?;
    let statistics = || Buffer::new(&device, (batch as usize, norm.groups), DType::F32);
    let (mean, rstd) = (statistics()?, statistics()?);
    // SAFETY: the pointers belong to tensors and buffers of the shapes stated, alive on this stream.
    let status = unsafe {
        let workspace = Buffer::bytes(&device, lcm_group_norm_workspace(batch, pixels, channels, groups))?;
        lcm_group_norm_forward(
            pointer(NAME, x)?,
            std::ptr::null(),
            pointer(NAME, weight)?,
            pointer(NAME, bias)?,
            y.pointer(),
            mean.pointer().cast(),
            rstd.pointer().cast(),
            batch,
            pixels,
            channels,
            0,
            groups,
            norm.eps as f32,
            norm.activation.code(),
            dtype_code(NAME, x.dtype())?,
            workspace.pointer(),
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(Forward { outputs: vec![y.into_output()], saved: vec![mean.into_tensor(), rstd.into_tensor()] })
}

pub(super) fn backward(norm: &GroupNorm, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let [x, weight, bias] = [0, 1, 2].map(|i| &context.inputs[i]);
    let device = cuda_device(NAME, x)?;
    let ((batch, pixels, channels), groups) = (extent(x), norm.groups as i32);
    let dx = context.needs[0].then(|| Buffer::like(NAME, x)).transpose()?;
    let sums = |wanted: bool| wanted.then(|| Buffer::new(&device, channels as usize, DType::F32)).transpose();
    let (dweight, dbias) = (sums(context.needs[1])?, sums(context.needs[2])?);
    let at = |buffer: &Option<Buffer>| buffer.as_ref().map_or(std::ptr::null_mut(), Buffer::pointer);
    let so_far = if context.needs[0] { context.take_so_far(0) } else { None };
    // SAFETY: as in `forward`; `so_far` has the shape and dtype of `x`.
    let status = unsafe {
        let workspace = Buffer::bytes(&device, lcm_group_norm_workspace(batch, pixels, channels, groups))?;
        lcm_group_norm_backward(
            pointer(NAME, x)?,
            std::ptr::null(),
            pointer(NAME, weight)?,
            pointer(NAME, bias)?,
            pointer(NAME, &context.saved[0])?.cast(),
            pointer(NAME, &context.saved[1])?.cast(),
            pointer(NAME, context.gradient()?)?,
            so_far.as_ref().map_or(Ok(std::ptr::null_mut()), |so_far| pointer(NAME, so_far))?,
            at(&dx),
            std::ptr::null_mut(),
            at(&dweight).cast(),
            at(&dbias).cast(),
            batch,
            pixels,
            channels,
            0,
            groups,
            norm.activation.code(),
            dtype_code(NAME, x.dtype())?,
            workspace.pointer(),
            stream(&device),
        )
    };
    check(NAME, status)?;
    let cast = |buffer: Option<Buffer>| buffer.map(|buffer| buffer.into_tensor().to_dtype(x.dtype())).transpose();
    Ok(vec![dx.map(Buffer::into_tensor), cast(dweight)?, cast(dbias)?])
}

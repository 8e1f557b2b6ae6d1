//! A factor and a term for every channel on a GPU.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `channel_affine.h`.
unsafe extern "C" {
    fn lcm_channel_affine_forward(
        x: *const c_void,
        scale: *const c_void,
        shift: *const c_void,
        y: *mut c_void,
        rows: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_channel_affine_input_gradient(
        dy: *const c_void,
        scale: *const c_void,
        dx: *mut c_void,
        rows: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_channel_affine_workspace(rows: i64, channels: i32) -> usize;
    fn lcm_channel_affine_parameter_gradients(
        x: *const c_void,
        dy: *const c_void,
        dscale: *mut f32,
        dshift: *mut f32,
        rows: i64,
        channels: i32,
        dtype: i32,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "channel_affine";

fn extent(x: &Tensor, parameter: &Tensor) -> (i64, i32) {
    let channels = parameter.elem_count();
    ((x.elem_count() / channels.max(1)) as i64, channels as i32)
}

pub(super) fn forward(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Forward> {
    let device = cuda_device(NAME, x)?;
    let (rows, channels) = extent(x, scale);
    let y = Buffer::like(NAME, x)?;
    let (at, dtype) = (pointer(NAME, x)?, dtype_code(NAME, x.dtype())?);
    let (scale, shift) = (pointer(NAME, scale)?, pointer(NAME, shift)?);
    // SAFETY: the pointers belong to `rows` rows of `channels` numbers, and to `channels` numbers, alive on this stream.
    let status =
        unsafe { lcm_channel_affine_forward(at, scale, shift, y.pointer(), rows, channels, dtype, stream(&device)) };
    check(NAME, status)?;
    Ok(y.into_output().into())
}

pub(super) fn backward(context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let [x, scale, shift] = context.inputs else { return Ok(Vec::new()) };
    let device = cuda_device(NAME, x)?;
    let (rows, channels) = extent(x, scale);
    let (dy, dtype, stream) = (pointer(NAME, context.gradient()?)?, dtype_code(NAME, x.dtype())?, stream(&device));
    let mut gradients = vec![None; 3];
    if context.needs[0] {
        let (dx, scale) = (Buffer::like(NAME, x)?, pointer(NAME, scale)?);
        // SAFETY: as in `forward`.
        let status =
            unsafe { lcm_channel_affine_input_gradient(dy, scale, dx.pointer(), rows, channels, dtype, stream) };
        check(NAME, status)?;
        gradients[0] = Some(dx.into_tensor());
    }
    if context.needs[1] || context.needs[2] {
        let sums = || Buffer::new(&device, scale.shape().clone(), DType::F32);
        let (dscale, dshift, x_at) = (sums()?, sums()?, pointer(NAME, x)?);
        // SAFETY: as in `forward`; the workspace has the size asked for.
        let status = unsafe {
            let workspace = Buffer::bytes(&device, lcm_channel_affine_workspace(rows, channels))?;
            let (dscale, dshift) = (dscale.pointer().cast(), dshift.pointer().cast());
            let workspace = workspace.pointer();
            lcm_channel_affine_parameter_gradients(x_at, dy, dscale, dshift, rows, channels, dtype, workspace, stream)
        };
        check(NAME, status)?;
        gradients[1] = Some(dscale.into_tensor().to_dtype(scale.dtype())?);
        gradients[2] = Some(dshift.into_tensor().to_dtype(shift.dtype())?);
    }
    Ok(gradients)
}

//! The rectifier with a learnt slope on a GPU.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `prelu.h`.
unsafe extern "C" {
    fn lcm_prelu_forward(
        x: *const c_void,
        slope: *const c_void,
        y: *mut c_void,
        rows: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_prelu_input_gradient(
        x: *const c_void,
        slope: *const c_void,
        dy: *const c_void,
        dx: *mut c_void,
        rows: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_prelu_workspace(rows: i64, channels: i32) -> usize;
    fn lcm_prelu_slope_gradient(
        x: *const c_void,
        dy: *const c_void,
        dslope: *mut f32,
        rows: i64,
        channels: i32,
        dtype: i32,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "prelu";

fn extent(x: &Tensor, slope: &Tensor) -> (i64, i32) {
    let channels = slope.elem_count();
    ((x.elem_count() / channels.max(1)) as i64, channels as i32)
}

pub(super) fn forward(x: &Tensor, slope: &Tensor) -> Result<Forward> {
    let device = cuda_device(NAME, x)?;
    let (rows, channels) = extent(x, slope);
    let y = Buffer::like(NAME, x)?;
    let (at, slope, dtype) = (pointer(NAME, x)?, pointer(NAME, slope)?, dtype_code(NAME, x.dtype())?);
    // SAFETY: the pointers belong to `rows` rows of `channels` numbers, and to `channels` numbers, alive on this stream.
    check(NAME, unsafe { lcm_prelu_forward(at, slope, y.pointer(), rows, channels, dtype, stream(&device)) })?;
    Ok(y.into_output().into())
}

pub(super) fn backward(context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let [x, slope] = context.inputs else { return Ok(Vec::new()) };
    let device = cuda_device(NAME, x)?;
    let (rows, channels) = extent(x, slope);
    let (at, dy) = (pointer(NAME, x)?, pointer(NAME, context.gradient()?)?);
    let (dtype, stream) = (dtype_code(NAME, x.dtype())?, stream(&device));
    let mut gradients = vec![None; 2];
    if context.needs[0] {
        let (dx, slope) = (Buffer::like(NAME, x)?, pointer(NAME, slope)?);
        // SAFETY: as in `forward`.
        let status = unsafe { lcm_prelu_input_gradient(at, slope, dy, dx.pointer(), rows, channels, dtype, stream) };
        check(NAME, status)?;
        gradients[0] = Some(dx.into_tensor());
    }
    if context.needs[1] {
        let dslope = Buffer::new(&device, slope.shape().clone(), DType::F32)?;
        // SAFETY: as in `forward`; the workspace has the size asked for.
        let status = unsafe {
            let workspace = Buffer::bytes(&device, lcm_prelu_workspace(rows, channels))?;
            let (to, workspace) = (dslope.pointer().cast(), workspace.pointer());
            lcm_prelu_slope_gradient(at, dy, to, rows, channels, dtype, workspace, stream)
        };
        check(NAME, status)?;
        gradients[1] = Some(dslope.into_tensor().to_dtype(slope.dtype())?);
    }
    Ok(gradients)
}

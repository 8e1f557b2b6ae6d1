//! Layer normalisation on a GPU.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `layer_norm.h`.
unsafe extern "C" {
    fn lcm_layer_norm_forward(
        x: *const c_void,
        residual: *const c_void,
        weight: *const c_void,
        bias: *const c_void,
        h: *mut c_void,
        y: *mut c_void,
        mean: *mut f32,
        rstd: *mut f32,
        rows: i64,
        channels: i32,
        eps: f32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_layer_norm_workspace(rows: i64, channels: i32) -> usize;
    fn lcm_layer_norm_backward(
        h: *const c_void,
        weight: *const c_void,
        mean: *const f32,
        rstd: *const f32,
        dy: *const c_void,
        dh: *const c_void,
        dx: *mut c_void,
        dweight: *mut f32,
        dbias: *mut f32,
        rows: i64,
        channels: i32,
        dtype: i32,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "layer_norm";

fn extent(x: &Tensor) -> (usize, usize) {
    let channels = x.dims()[x.rank() - 1];
    (x.elem_count() / channels.max(1), channels)
}

pub(super) fn forward(eps: f64, inputs: &[Tensor]) -> Result<Forward> {
    let [x, weight, bias] = [0, 1, 2].map(|i| &inputs[i]);
    let device = cuda_device(NAME, x)?;
    let (rows, channels) = extent(x);
    let y = Buffer::like(NAME, x)?;
    let (mean, rstd) = (Buffer::new(&device, rows, DType::F32)?, Buffer::new(&device, rows, DType::F32)?);
    // SAFETY: the pointers belong to tensors and buffers of the shapes stated, alive on this stream.
    let status = unsafe {
        lcm_layer_norm_forward(
            pointer(NAME, x)?,
            std::ptr::null(),
            pointer(NAME, weight)?,
            pointer(NAME, bias)?,
            std::ptr::null_mut(),
            y.pointer(),
            mean.pointer().cast(),
            rstd.pointer().cast(),
            rows as i64,
            channels as i32,
            eps as f32,
            dtype_code(NAME, x.dtype())?,
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(Forward { outputs: vec![y.into_output()], saved: vec![mean.into_tensor(), rstd.into_tensor()] })
}

pub(super) fn backward(context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (&context.inputs[0], &context.inputs[1]);
    let device = cuda_device(NAME, x)?;
    let (rows, channels) = extent(x);
    let dx = context.needs[0].then(|| Buffer::like(NAME, x)).transpose()?;
    let sums = |wanted: bool| wanted.then(|| Buffer::new(&device, channels, DType::F32)).transpose();
    let (dweight, dbias) = (sums(context.needs[1])?, sums(context.needs[2])?);
    let at = |buffer: &Option<Buffer>| buffer.as_ref().map_or(std::ptr::null_mut(), Buffer::pointer);
    let wants_sums = dweight.is_some() || dbias.is_some();
    // SAFETY: as in `forward`.
    let status = unsafe {
        let bytes = lcm_layer_norm_workspace(rows as i64, channels as i32);
        let workspace = wants_sums.then(|| Buffer::bytes(&device, bytes)).transpose()?;
        lcm_layer_norm_backward(
            pointer(NAME, x)?,
            pointer(NAME, weight)?,
            pointer(NAME, &context.saved[0])?.cast(),
            pointer(NAME, &context.saved[1])?.cast(),
            pointer(NAME, context.gradient()?)?,
            std::ptr::null(),
            at(&dx),
            at(&dweight).cast(),
            at(&dbias).cast(),
            rows as i64,
            channels as i32,
            dtype_code(NAME, x.dtype())?,
            at(&workspace),
            stream(&device),
        )
    };
    check(NAME, status)?;
    let cast = |buffer: Option<Buffer>| buffer.map(|buffer| buffer.into_tensor().to_dtype(x.dtype())).transpose();
    Ok(vec![dx.map(Buffer::into_tensor), cast(dweight)?, cast(dbias)?])
}

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

pub(super) const NAME: &str = "layer_norm";

/// A normalisation about to be launched.
pub(super) struct Launch<'a> {
    /// What is normalised, or what the residual is added to first.
    pub x: &'a Tensor,
    pub weight: &'a Tensor,
    pub eps: f64,
}

impl Launch<'_> {
    fn extent(&self) -> (usize, usize) {
        let channels = self.x.dims()[self.x.rank() - 1];
        (self.x.elem_count() / channels.max(1), channels)
    }

    /// The normalised tokens, their means and the inverses of their deviations. With a residual, the sum is normalised,
    /// and written to the buffer beside it.
    pub fn forward(&self, bias: &Tensor, residual: Option<(&Tensor, &Buffer)>) -> Result<(Buffer, Tensor, Tensor)> {
        let device = cuda_device(NAME, self.x)?;
        let (rows, channels) = self.extent();
        let y = Buffer::like(NAME, self.x)?;
        let (mean, rstd) = (Buffer::new(&device, rows, DType::F32)?, Buffer::new(&device, rows, DType::F32)?);
        let (residual, sum) = match residual {
            Some((residual, sum)) => (pointer(NAME, residual)?.cast_const(), sum.pointer()),
            None => (std::ptr::null(), std::ptr::null_mut()),
        };
        // SAFETY: the pointers belong to tensors and buffers of the shapes stated, alive on this stream.
        let status = unsafe {
            lcm_layer_norm_forward(
                pointer(NAME, self.x)?,
                residual,
                pointer(NAME, self.weight)?,
                pointer(NAME, bias)?,
                sum,
                y.pointer(),
                mean.pointer().cast(),
                rstd.pointer().cast(),
                rows as i64,
                channels as i32,
                self.eps as f32,
                dtype_code(NAME, self.x.dtype())?,
                stream(&device),
            )
        };
        check(NAME, status)?;
        Ok((y, mean.into_tensor(), rstd.into_tensor()))
    }

    /// The gradients of what was normalised (with another gradient of it, `of_sum`, added), of weight and of bias, where
    /// they are wanted.
    pub fn backward(
        &self,
        (mean, rstd): (&Tensor, &Tensor),
        gradient: &Tensor,
        of_sum: Option<&Tensor>,
        wants: [bool; 3],
    ) -> Result<[Option<Tensor>; 3]> {
        let device = cuda_device(NAME, self.x)?;
        let (rows, channels) = self.extent();
        let dx = wants[0].then(|| Buffer::like(NAME, self.x)).transpose()?;
        let sums = |wanted: bool| wanted.then(|| Buffer::new(&device, channels, DType::F32)).transpose();
        let (dweight, dbias) = (sums(wants[1])?, sums(wants[2])?);
        let at = |buffer: &Option<Buffer>| buffer.as_ref().map_or(std::ptr::null_mut(), Buffer::pointer);
        let of_sum = of_sum.map_or(Ok(std::ptr::null_mut()), |of_sum| pointer(NAME, of_sum))?;
        // SAFETY: as in `forward`.
        let status = unsafe {
            let bytes = lcm_layer_norm_workspace(rows as i64, channels as i32);
            let workspace = (wants[1] || wants[2]).then(|| Buffer::bytes(&device, bytes)).transpose()?;
            lcm_layer_norm_backward(
                pointer(NAME, self.x)?,
                pointer(NAME, self.weight)?,
                pointer(NAME, mean)?.cast(),
                pointer(NAME, rstd)?.cast(),
                pointer(NAME, gradient)?,
                of_sum,
                at(&dx),
                at(&dweight).cast(),
                at(&dbias).cast(),
                rows as i64,
                channels as i32,
                dtype_code(NAME, self.x.dtype())?,
                at(&workspace),
                stream(&device),
            )
        };
        check(NAME, status)?;
        let dtype = self.x.dtype();
        let cast = |buffer: Option<Buffer>| buffer.map(|buffer| buffer.into_tensor().to_dtype(dtype)).transpose();
        Ok([dx.map(Buffer::into_tensor), cast(dweight)?, cast(dbias)?])
    }
}

pub(super) fn forward(eps: f64, inputs: &[Tensor]) -> Result<Forward> {
    let (y, mean, rstd) = Launch { x: &inputs[0], weight: &inputs[1], eps }.forward(&inputs[2], None)?;
    Ok(Forward { outputs: vec![y.into_output()], saved: vec![mean, rstd] })
}

pub(super) fn backward(eps: f64, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let launch = Launch { x: &context.inputs[0], weight: &context.inputs[1], eps };
    let wants = [context.needs[0], context.needs[1], context.needs[2]];
    let so_far = if wants[0] { context.take_so_far(0) } else { None };
    let statistics = (&context.saved[0], &context.saved[1]);
    Ok(launch.backward(statistics, context.gradient()?, so_far.as_ref(), wants)?.into())
}

//! AdamW, clipping and moving averages over all parameters on a GPU at once.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use super::moments::Update;
use crate::Result;
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream, upload};

/// `LcmAdamWTensor` of `adamw.h`.
#[repr(C)]
struct Entry {
    parameter: u64,
    first_moment: u64,
    second_moment: u64,
    gradient: u64,
    average: u64,
    shadow: u64,
    length: i64,
    first_chunk: i64,
    gradient_dtype: i32,
    keep: f32,
    step_size: f32,
    root_correction: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    epsilon: f32,
    average_rest: f32,
    unused: i32,
}

unsafe extern "C" {
    fn lcm_adamw_workspace(chunks: i64) -> usize;
    fn lcm_adamw_step(
        tensors: *const c_void,
        count: i32,
        chunks: i64,
        gradient_scale: f32,
        max_norm: f64,
        report: *mut c_void,
        workspace: *mut c_void,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "AdamW";
/// `LCM_ADAMW_CHUNK`.
const CHUNK: usize = 8192;
/// Bytes of `LcmAdamWReport`: the norm, a factor, a flag.
const REPORT: usize = 16;

/// One parameter's part in a step. All tensors are contiguous, of one length and, but for the gradient, f32.
pub(in crate::train) struct Part<'a> {
    pub parameter: &'a Tensor,
    /// Moments, gradient and the numbers of the update; without them only the average moves.
    pub update: Option<(&'a Tensor, &'a Tensor, &'a Tensor, &'a Update)>,
    /// Moving average, and one minus its decay.
    pub average: Option<(&'a Tensor, f64)>,
}

/// The norm of the gradients of a step that has been launched.
pub(in crate::train) struct Norm(Option<Tensor>);

impl Norm {
    /// Waits for the step, and returns the norm before clipping; where it is not finite nothing was changed.
    pub fn wait(self) -> Result<f64> {
        let Some(report) = self.0 else { return Ok(0.0) };
        let report = report.to_vec1::<u8>()?;
        let mut norm = [0; 8];
        norm.copy_from_slice(&report[..8]);
        Ok(f64::from_ne_bytes(norm))
    }
}

/// Clips the gradients to a norm (0: not at all), and updates parameters, moments and averages in place. What the step
/// needs may be dropped before it is waited for.
pub(in crate::train) fn step(parts: &[Part<'_>], max_norm: f64) -> Result<Norm> {
    let Some(first) = parts.first() else { return Ok(Norm(None)) };
    let device = cuda_device(NAME, first.parameter)?;
    let at = |tensor: &Tensor| Ok::<u64, crate::Error>(pointer(NAME, tensor)? as u64);
    let mut bytes = Vec::with_capacity(parts.len() * size_of::<Entry>());
    let mut chunks = 0;
    for part in parts {
        let length = part.parameter.elem_count();
        let mut entry = Entry {
            parameter: at(part.parameter)?,
            first_moment: 0,
            second_moment: 0,
            gradient: 0,
            average: 0,
            shadow: 0,
            length: length as i64,
            first_chunk: chunks as i64,
            gradient_dtype: 0,
            keep: 1.0,
            step_size: 0.0,
            root_correction: 1.0,
            rest1: 0.0,
            beta2: 1.0,
            rest2: 0.0,
            epsilon: 1.0,
            average_rest: 0.0,
            unused: 0,
        };
        if let Some((first, second, gradient, update)) = part.update {
            (entry.first_moment, entry.second_moment, entry.gradient) = (at(first)?, at(second)?, at(gradient)?);
            entry.gradient_dtype = dtype_code(NAME, gradient.dtype())?;
            entry.keep = update.keep as f32;
            entry.step_size = update.step_size as f32;
            entry.root_correction = update.root_correction as f32;
            entry.rest1 = (1.0 - update.beta1) as f32;
            entry.beta2 = update.beta2 as f32;
            entry.rest2 = (1.0 - update.beta2) as f32;
            entry.epsilon = update.epsilon as f32;
        }
        if let Some((average, rest)) = part.average {
            (entry.average, entry.average_rest) = (at(average)?, rest as f32);
        }
        chunks += length.div_ceil(CHUNK);
        // SAFETY: the entry is plain numbers without padding: eight of 8 bytes, then ten of 4.
        bytes.extend_from_slice(unsafe {
            std::slice::from_raw_parts((&raw const entry).cast::<u8>(), size_of::<Entry>())
        });
    }
    let entries = upload(&device, &bytes)?;
    let report = Buffer::new(&device, REPORT, DType::U8)?;
    // SAFETY: the entries point to tensors of the lengths stated; their memory is given back in the order of the stream.
    let status = unsafe {
        let workspace = Buffer::bytes(&device, lcm_adamw_workspace(chunks as i64))?;
        lcm_adamw_step(
            pointer(NAME, &entries)?,
            parts.len() as i32,
            chunks as i64,
            1.0,
            max_norm,
            report.pointer(),
            workspace.pointer(),
            stream(&device),
        )
    };
    check(NAME, status)?;
    Ok(Norm(Some(report.into_tensor())))
}

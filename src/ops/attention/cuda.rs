//! Attention on a GPU: Hopper's tensor-core kernels where they take the shapes, the portable ones elsewhere.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::DeviceId;
use candle_core::{CudaDevice, DType, Tensor};

use super::{Attention, Mask};
use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, avoids, check, cuda_device, dtype_code, pointer, stream, taken, upload};

/// `LcmAttention` of `attention.h`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Arguments {
    q: *const c_void,
    k: *const c_void,
    v: *const c_void,
    k2: *const c_void,
    v2: *const c_void,
    out: *mut c_void,
    lse: *mut f32,
    use_reference: *const u8,
    batch: i32,
    heads: i32,
    head_dim: i32,
    tokens: i32,
    own_tokens: i32,
    reference_tokens: i32,
    reference_batch: i32,
    dtype: i32,
    causal: i32,
    rows: [i64; 6],
    batches: [i64; 6],
    scale: f32,
}

/// `LcmAttentionGradient` of `attention.h`.
#[repr(C)]
pub(super) struct GradientArguments {
    forward: Arguments,
    dout: *const c_void,
    gradients: [*mut c_void; 5],
    rows: [i64; 5],
    batches: [i64; 5],
    workspace: *mut c_void,
    workspace_bytes: usize,
    deterministic: i32,
}

unsafe extern "C" {
    fn lcm_attention_forward_hopper(arguments: *const Arguments, stream: *mut c_void) -> i32;
    fn lcm_attention_forward_portable(arguments: *const Arguments, stream: *mut c_void) -> i32;
    fn lcm_attention_backward_hopper(arguments: *const GradientArguments, stream: *mut c_void) -> i32;
    fn lcm_attention_backward_hopper_workspace(arguments: *const GradientArguments) -> usize;
    fn lcm_attention_backward_portable(arguments: *const GradientArguments, stream: *mut c_void) -> i32;
    fn lcm_attention_backward_portable_workspace(arguments: *const GradientArguments) -> usize;
}

const NAME: &str = "attention";
const HOPPER: &str = "hopper-attention";

/// The arguments for inputs `q, k, v` or `q, k, v, k2, v2`, all contiguous, whose shapes `attention` has checked.
pub(super) fn arguments(
    attention: &Attention,
    inputs: &[Tensor],
    out: *mut c_void,
    lse: *mut f32,
) -> Result<Arguments> {
    let (batch, tokens, channels) = inputs[0].dims3()?;
    let own_tokens = inputs[1].dim(1)?;
    let (reference_batch, reference_tokens) = match inputs.get(3) {
        Some(keys) => (keys.dim(0)?, keys.dim(1)?),
        None => (1, 0),
    };
    let at = |i: usize| -> Result<*const c_void> {
        inputs.get(i).map_or(Ok(std::ptr::null()), |tensor| Ok(pointer(NAME, tensor)?.cast_const()))
    };
    let (row, head_dim) = (channels as i64, channels / attention.heads);
    let sample = |tokens: usize| row * tokens as i64;
    let (own, reference) = (sample(own_tokens), sample(reference_tokens));
    Ok(Arguments {
        q: at(0)?,
        k: at(1)?,
        v: at(2)?,
        k2: at(3)?,
        v2: at(4)?,
        out,
        lse,
        use_reference: std::ptr::null(),
        batch: batch as i32,
        heads: attention.heads as i32,
        head_dim: head_dim as i32,
        tokens: tokens as i32,
        own_tokens: own_tokens as i32,
        reference_tokens: reference_tokens as i32,
        reference_batch: reference_batch as i32,
        dtype: dtype_code(NAME, inputs[0].dtype())?,
        causal: i32::from(attention.mask == Mask::Causal),
        rows: [row; 6],
        batches: [sample(tokens), own, own, reference, reference, sample(tokens)],
        scale: (head_dim as f32).powf(-0.5),
    })
}

/// The flags that say which samples see the reference, on the GPU; none where all do. They are few, and kept, so that
/// a pass uploads them once and not in every layer.
fn flags(attention: &Attention, device: &CudaDevice) -> Result<Option<Tensor>> {
    type Flags = HashMap<(DeviceId, Arc<[bool]>), Tensor>;
    static KEPT: LazyLock<Mutex<Flags>> = LazyLock::new(Mutex::default);
    let Some(flags) = attention.sees_reference.clone() else { return Ok(None) };
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    match kept.entry((device.id(), flags)) {
        Entry::Occupied(entry) => Ok(Some(entry.get().clone())),
        Entry::Vacant(entry) => {
            let bytes: Vec<u8> = entry.key().1.iter().map(|sees| u8::from(*sees)).collect();
            Ok(Some(entry.insert(upload(device, &bytes)?).clone()))
        }
    }
}

pub(super) fn forward(attention: &Attention, inputs: &[Tensor]) -> Result<Forward> {
    let q = &inputs[0];
    let device = cuda_device(NAME, q)?;
    let (batch, tokens, _) = q.dims3()?;
    let out = Buffer::like(NAME, q)?;
    let lse = Buffer::new(&device, (batch, attention.heads, tokens), DType::F32)?;
    let mut arguments = arguments(attention, inputs, out.pointer(), lse.pointer().cast())?;
    let flags = flags(attention, &device)?;
    if let Some(flags) = &flags {
        arguments.use_reference = pointer(NAME, flags)?.cast();
    }
    let stream = stream(&device);
    // SAFETY: the arguments point to tensors and buffers of the shapes they state, alive on this stream.
    unsafe {
        if avoids(HOPPER) || !taken(NAME, lcm_attention_forward_hopper(&raw const arguments, stream))? {
            check(NAME, lcm_attention_forward_portable(&raw const arguments, stream))?;
        }
    }
    Ok(Forward { outputs: vec![out.into_output()], saved: std::iter::once(lse.into_tensor()).chain(flags).collect() })
}

impl GradientArguments {
    /// The arguments for the gradients that are wanted, and fresh memory for each of those; no workspace yet.
    ///
    /// Keys and values go in pairs: the kernels make the gradients of both or of neither.
    pub fn new(attention: &Attention, context: &Backward<'_>) -> Result<(Self, [Option<Buffer>; 5])> {
        let inputs = context.inputs;
        // A function of one output gets that output here, unless it disclaims it.
        let out = context.outputs.first().and_then(Option::as_ref);
        let out = out.map_or(Ok(std::ptr::null_mut()), |out| pointer(NAME, out))?;
        let mut forward = arguments(attention, inputs, out, pointer(NAME, &context.saved[0])?.cast())?;
        if let (Some(flags), Some(_)) = (context.saved.get(1), &attention.sees_reference) {
            forward.use_reference = pointer(NAME, flags)?.cast();
        }
        let pair = |i: usize| context.needs.get(i) == Some(&true) || context.needs.get(i + 1) == Some(&true);
        let wanted = [context.needs[0], pair(1), pair(1), pair(3), pair(3)];
        let mut buffers: [Option<Buffer>; 5] = Default::default();
        for ((buffer, input), wanted) in buffers.iter_mut().zip(inputs).zip(wanted) {
            if wanted {
                *buffer = Some(Buffer::like(NAME, input)?);
            }
        }
        let arguments = GradientArguments {
            forward,
            dout: pointer(NAME, context.gradient()?)?,
            gradients: buffers.each_ref().map(|buffer| buffer.as_ref().map_or(std::ptr::null_mut(), Buffer::pointer)),
            rows: [0, 1, 2, 3, 4].map(|i| forward.rows[i]),
            batches: [0, 1, 2, 3, 4].map(|i| forward.batches[i]),
            workspace: std::ptr::null_mut(),
            workspace_bytes: 0,
            deterministic: i32::from(crate::cuda::deterministic()),
        };
        Ok((arguments, buffers))
    }

    /// Hands a workspace to the kernels.
    pub fn lend(&mut self, workspace: &Buffer, bytes: usize) {
        (self.workspace, self.workspace_bytes) = (workspace.pointer(), bytes);
    }
}

pub(super) fn backward(attention: &Attention, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let device = cuda_device(NAME, &context.inputs[0])?;
    let (mut arguments, buffers) = GradientArguments::new(attention, context)?;
    let stream = stream(&device);
    // SAFETY: as in `forward`; each workspace has the size its kernel asked for and lives until it is launched.
    unsafe {
        let bytes = lcm_attention_backward_hopper_workspace(&raw const arguments);
        let workspace = Buffer::bytes(&device, bytes)?;
        arguments.lend(&workspace, bytes);
        if avoids(HOPPER) || !taken(NAME, lcm_attention_backward_hopper(&raw const arguments, stream))? {
            let bytes = lcm_attention_backward_portable_workspace(&raw const arguments);
            let workspace = Buffer::bytes(&device, bytes)?;
            arguments.lend(&workspace, bytes);
            check(NAME, lcm_attention_backward_portable(&raw const arguments, stream))?;
        }
    }
    Ok(buffers.into_iter().take(context.inputs.len()).map(|buffer| buffer.map(Buffer::into_tensor)).collect())
}

//! Attention on a GPU: Hopper's tensor-core kernels where they take the shapes, the portable ones elsewhere.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::DeviceId;
use candle_core::{CudaDevice, DType, Tensor};

use super::{Attention, Mask, Packing, wide};
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

/// Where one of queries, keys, values, reference keys and reference values lies in the inputs.
#[derive(Clone, Copy)]
struct Slot {
    input: usize,
    /// Numbers before it in a token's row, and from a token to the next.
    offset: usize,
    row: usize,
    tokens: usize,
    batch: usize,
}

/// The slots of `q, k, v, k2, v2`, of which the last two may be missing. The shapes have been checked.
fn slots(attention: &Attention, inputs: &[Tensor]) -> Result<[Option<Slot>; 5]> {
    let channels = attention.channels(inputs)?;
    let places: [(usize, usize); 5] = match attention.packing {
        Packing::None => [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)],
        Packing::QueryKeyValue => [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)],
        Packing::KeyValue => [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0)],
    };
    let mut slots = [None; 5];
    for (slot, (input, part)) in slots.iter_mut().zip(places) {
        if let Some(tensor) = inputs.get(input) {
            let (batch, tokens, row) = tensor.dims3()?;
            *slot = Some(Slot { input, offset: part * channels, row, tokens, batch });
        }
    }
    Ok(slots)
}

/// The arguments for contiguous inputs, whose shapes have been checked.
pub(super) fn arguments(
    attention: &Attention,
    inputs: &[Tensor],
    out: *mut c_void,
    lse: *mut f32,
) -> Result<Arguments> {
    let slots = slots(attention, inputs)?;
    let channels = attention.channels(inputs)?;
    let (size, head_dim) = (inputs[0].dtype().size_in_bytes(), channels / attention.heads);
    let mut pointers = [std::ptr::null::<c_void>(); 5];
    let (mut rows, mut batches) = ([channels as i64; 6], [0; 6]);
    let (mut tokens, mut counts) = ([0; 5], [1; 5]);
    for (i, slot) in slots.iter().enumerate() {
        let Some(slot) = slot else { continue };
        pointers[i] = pointer(NAME, &inputs[slot.input])?.cast_const().wrapping_byte_add(slot.offset * size);
        (rows[i], batches[i]) = (slot.row as i64, (slot.row * slot.tokens) as i64);
        (tokens[i], counts[i]) = (slot.tokens as i32, slot.batch as i32);
    }
    batches[5] = channels as i64 * i64::from(tokens[0]);
    let [q, k, v, k2, v2] = pointers;
    Ok(Arguments {
        q,
        k,
        v,
        k2,
        v2,
        out,
        lse,
        use_reference: std::ptr::null(),
        batch: counts[0],
        heads: attention.heads as i32,
        head_dim: head_dim as i32,
        tokens: tokens[0],
        own_tokens: tokens[1],
        reference_tokens: tokens[3],
        // A reference of the first samples only counts as one for all: the flags keep the kernels from the others'.
        reference_batch: if counts[3] == 1 { 1 } else { counts[0] },
        dtype: dtype_code(NAME, inputs[0].dtype())?,
        causal: i32::from(attention.mask == Mask::Causal),
        rows,
        batches,
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
    if attention.packing == Packing::None && wide::takes(attention, q) {
        return wide::forward(attention, inputs);
    }
    let device = cuda_device(NAME, q)?;
    let (batch, tokens, _) = q.dims3()?;
    let out = Buffer::new(&device, (batch, tokens, attention.channels(inputs)?), q.dtype())?;
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
    pub fn new(attention: &Attention, context: &Backward<'_>) -> Result<(Self, Vec<Option<Buffer>>)> {
        let inputs = context.inputs;
        // A function of one output gets that output here, unless it disclaims it.
        let out = context.outputs.first().and_then(Option::as_ref);
        let out = out.map_or(Ok(std::ptr::null_mut()), |out| pointer(NAME, out))?;
        let mut forward = arguments(attention, inputs, out, pointer(NAME, &context.saved[0])?.cast())?;
        if let (Some(flags), Some(_)) = (context.saved.get(1), &attention.sees_reference) {
            forward.use_reference = pointer(NAME, flags)?.cast();
        }
        let slots = slots(attention, inputs)?;
        let needed = |slot: &Option<Slot>| slot.is_some_and(|slot| context.needs[slot.input]);
        let pair = |i: usize| needed(&slots[i]) || needed(&slots[i + 1]);
        let wanted = [needed(&slots[0]), pair(1), pair(1), pair(3), pair(3)];
        let mut buffers: Vec<Option<Buffer>> = inputs.iter().map(|_| None).collect();
        let mut gradients = [std::ptr::null_mut::<c_void>(); 5];
        for ((gradient, slot), wanted) in gradients.iter_mut().zip(slots).zip(wanted) {
            let Some(slot) = slot.filter(|_| wanted) else { continue };
            let input = &inputs[slot.input];
            let buffer = match &mut buffers[slot.input] {
                Some(buffer) => buffer,
                missing => missing.insert(Buffer::like(NAME, input)?),
            };
            *gradient = buffer.pointer().wrapping_byte_add(slot.offset * input.dtype().size_in_bytes());
        }
        let arguments = GradientArguments {
            forward,
            dout: pointer(NAME, context.gradient()?)?,
            gradients,
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
    if attention.packing == Packing::None && wide::takes(attention, &context.inputs[0]) {
        return wide::backward(attention, context);
    }
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
    Ok(buffers.into_iter().map(|buffer| buffer.map(Buffer::into_tensor)).collect())
}

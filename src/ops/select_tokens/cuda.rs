//! Selection of tokens on a GPU: one kernel gathers rows, forward those kept, backward those they came from.

use std::ffi::c_void;

use candle_core::Tensor;

use super::TokenSelection;
use crate::autograd::Forward;
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};
use crate::{Error, Result};

// `select_tokens.h`.
unsafe extern "C" {
    fn lcm_select_tokens(
        from: *const c_void,
        to: *mut c_void,
        indices: *const u32,
        batch: i64,
        tokens_from: i32,
        tokens_to: i32,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "select_tokens";

/// Gathers `tokens` rows a sample, by the selection's indices from `first` on.
fn gather(selection: &TokenSelection, from: &Tensor, first: usize, tokens: usize) -> Result<Buffer> {
    let device = cuda_device(NAME, from)?;
    let Some(indices) = &selection.on_gpu else {
        return Err(Error::argument(NAME, "selection", "one made for the device of `x`", "one for the CPU"));
    };
    let (batch, tokens_from, channels) = from.dims3()?;
    let to = Buffer::new(&device, (batch, tokens, channels), from.dtype())?;
    let (at, dtype) = (pointer(NAME, from)?, dtype_code(NAME, from.dtype())?);
    let indices = pointer(NAME, &indices.narrow(0, first, tokens)?)?.cast::<u32>();
    let (tokens_from, tokens_to, channels) = (tokens_from as i32, tokens as i32, channels as i32);
    // SAFETY: the pointers belong to tensors and buffers of the shapes stated, alive on this stream; the selection's
    // indices are below `tokens_from`, as it was made for it.
    check(NAME, unsafe {
        lcm_select_tokens(
            at,
            to.pointer(),
            indices,
            batch as i64,
            tokens_from,
            tokens_to,
            channels,
            dtype,
            stream(&device),
        )
    })?;
    Ok(to)
}

pub(super) fn forward(selection: &TokenSelection, x: &Tensor) -> Result<Forward> {
    Ok(gather(selection, x, 0, selection.len())?.into_output().into())
}

pub(super) fn backward(selection: &TokenSelection, gradient: &Tensor) -> Result<Vec<Option<Tensor>>> {
    Ok(vec![Some(gather(selection, gradient, selection.len(), selection.tokens())?.into_tensor())])
}

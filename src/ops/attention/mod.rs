//! Scaled dot-product attention over one or two sources of keys and values.

mod backward;
mod cross;
#[cfg(feature = "cuda")]
mod cross_cuda;
#[cfg(feature = "cuda")]
mod cuda;
mod exponential;
mod forward;
#[cfg(test)]
mod tests;
mod view;
#[cfg(feature = "cuda")]
mod wide;

use std::sync::Arc;

use candle_core::Tensor;

pub use cross::{cross_attention, cross_attention_packed};

use super::elementwise::split;
use super::support::{dispatch, on_cuda, same_kind};
use crate::autograd::{Backward, Forward, Function, apply};
use crate::{Error, Result};

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mask {
    /// All of them.
    #[default]
    None,
    /// Query `i` sees the keys `j <= i` (the text encoders of CLIP).
    Causal,
}

/// Multi-head attention `softmax([q k^T, q k2^T] / sqrt(d)) [v; v2]`, with an optional second source of keys and
/// values: the extended self-attention of the paper's KV encoder (section 4.1).
///
/// `q`: `(batch, tokens, heads * d)`; `own`: keys and values, each `(batch, own tokens, heads * d)`; `reference`: keys
/// and values, each `(batch or 1, reference tokens, heads * d)`, where 1 stands for one reference shared by the whole
/// batch. Returns `(batch, tokens, heads * d)`. One softmax runs over both sources; no reference tokens give plain
/// attention. Gradients for every argument that is part of a graph; that of a shared reference is summed over the
/// batch.
///
/// Both sources are read where they lie, never concatenated. The scores are made a tile at a time (FlashAttention,
/// Dao et al. 2022): beyond inputs and output a forward pass keeps one number a query and head for the backward pass,
/// so the memory is linear in the tokens. Results do not depend on the number of threads.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit, where there is no key at all, and where
/// [`Mask::Causal`] meets a reference, whose tokens have no place in the order.
pub fn attention(
    q: &Tensor,
    own: (&Tensor, &Tensor),
    reference: Option<(&Tensor, &Tensor)>,
    heads: usize,
    mask: Mask,
) -> Result<Tensor> {
    attend(q, own, reference, None, heads, mask)
}

/// [`attention`] over two sources of which some samples of the batch see the first alone (classifier-free guidance runs
/// samples with and without a reference in one batch). `sees_reference`: one a sample. Where no gradient is asked for,
/// the reference may have fewer samples than the batch, if those beyond do not see it.
///
/// # Errors
/// As [`attention`], and where the number of flags is not that of the samples.
pub fn attention_where(
    q: &Tensor,
    own: (&Tensor, &Tensor),
    reference: (&Tensor, &Tensor),
    sees_reference: &[bool],
    heads: usize,
) -> Result<Tensor> {
    if sees_reference.len() != q.dims().first().copied().unwrap_or(0) {
        let (expected, found) = (format!("one a sample of {:?}", q.dims()), sees_reference.len().to_string());
        return Err(Error::argument("attention", "sees_reference", expected, found));
    }
    let flags = sees_reference.contains(&false).then(|| sees_reference.into());
    attend(q, own, Some(reference), flags, heads, Mask::None)
}

/// Self-attention as [`attention`] and [`attention_where`], on `packed` `(batch, tokens, 3 * heads * d)`: the queries,
/// then the keys, then the values of a token, as a projection by the three weights stacked makes them. On a GPU they are
/// read where they lie, and their gradient is one tensor again.
///
/// `reference`: keys and values, each `(batch or 1, reference tokens, heads * d)`; `sees_reference`: which samples see
/// it, all where `None`. Returns `(batch, tokens, heads * d)`.
///
/// # Errors
/// As [`attention_where`].
pub fn attention_packed(
    packed: &Tensor,
    reference: Option<(&Tensor, &Tensor)>,
    sees_reference: Option<&[bool]>,
    heads: usize,
) -> Result<Tensor> {
    let width = packed_width(packed, heads)?;
    let batch = packed.dims()[0];
    #[cfg(feature = "cuda")]
    if packed.device().is_cuda()
        && reference.is_none_or(|reference| suits(packed, width / 3, reference, sees_reference))
    {
        let flags = sees_reference.filter(|sees| reference.is_some() && sees.len() == batch && sees.contains(&false));
        let sees_reference = flags.map(Arc::from);
        let function = Attention { heads, mask: Mask::None, packing: Packing::QueryKeyValue, sees_reference };
        let inputs: Vec<&Tensor> =
            std::iter::once(packed).chain(reference.into_iter().flat_map(|(k, v)| [k, v])).collect();
        return apply(function, &inputs);
    }
    let _ = batch;
    let parts = split(packed, &[width / 3; 3])?;
    let (q, own) = (&parts[0], (&parts[1], &parts[2]));
    match (reference, sees_reference) {
        (Some(reference), Some(sees)) => attention_where(q, own, reference, sees, heads),
        (reference, _) => attention(q, own, reference, heads, Mask::None),
    }
}

/// [`attention`] without a reference, on queries, keys and values packed as for [`attention_packed`].
pub(crate) fn attention_packed_masked(packed: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let width = packed_width(packed, heads)?;
    #[cfg(feature = "cuda")]
    if packed.device().is_cuda() && width / (3 * heads) <= wide::FUSED_WIDTH {
        let packing = Packing::QueryKeyValue;
        return apply(Attention { heads, mask, packing, sees_reference: None }, &[packed]);
    }
    let parts = split(packed, &[width / 3; 3])?;
    attention(&parts[0], (&parts[1], &parts[2]), None, heads, mask)
}

/// The width of packed queries, keys and values of so many heads.
fn packed_width(packed: &Tensor, heads: usize) -> Result<usize> {
    match packed.dims() {
        &[_, _, width] if heads > 0 && width > 0 && width % (3 * heads) == 0 => Ok(width),
        dims => {
            let expected = format!("(batch, tokens, 3 * {heads} * d)");
            Err(Error::argument("attention", "packed", expected, format!("{dims:?}")))
        }
    }
}

/// Whether reference keys and values fit packed queries; where not, [`attention`] says what is wrong.
#[cfg(feature = "cuda")]
fn suits(packed: &Tensor, channels: usize, (keys, values): (&Tensor, &Tensor), sees: Option<&[bool]>) -> bool {
    let batch = packed.dims()[0];
    let tracked = [packed, keys, values].iter().any(|tensor| tensor.track_op());
    let enough = |samples: usize| match sees {
        _ if samples == batch || samples == 1 => true,
        Some(sees) => !tracked && samples < batch && sees.len() == batch && !sees[samples..].contains(&true),
        None => false,
    };
    let fits = |t: &Tensor| t.rank() == 3 && t.dims()[2] == channels && enough(t.dims()[0]);
    let alike = |t: &Tensor| t.dtype() == packed.dtype() && t.device().same_device(packed.device());
    keys.dims() == values.dims() && fits(keys) && alike(keys) && alike(values)
}

fn attend(
    q: &Tensor,
    own: (&Tensor, &Tensor),
    reference: Option<(&Tensor, &Tensor)>,
    sees_reference: Option<Arc<[bool]>>,
    heads: usize,
    mask: Mask,
) -> Result<Tensor> {
    let wrong =
        |argument, expected: String, found: String| Err(Error::argument("attention", argument, expected, found));
    let [batch, _, channels] = q.dims()[..] else {
        return wrong("q", "(batch, tokens, channels)".into(), format!("{:?}", q.dims()));
    };
    if heads == 0 || channels == 0 || channels % heads != 0 {
        return wrong("heads", format!("a divisor of the {channels} channels of `q`"), heads.to_string());
    }
    let fits = |argument, tensor: &Tensor, shared: bool, tokens: Option<usize>| {
        same_kind("attention", q, argument, tensor)?;
        match tensor.dims()[..] {
            [b, n, c]
                if c == channels && (b == batch || shared && b == 1) && tokens.is_none_or(|tokens| tokens == n) =>
            {
                Ok((b, n))
            }
            _ => {
                let batch = if shared { format!("{batch} or 1") } else { batch.to_string() };
                let tokens = tokens.map_or("tokens".into(), |tokens| tokens.to_string());
                Err(Error::argument(
                    "attention",
                    argument,
                    format!("({batch}, {tokens}, {channels})"),
                    format!("{:?}", tensor.dims()),
                ))
            }
        }
    };
    let (_, own_tokens) = fits("own keys", own.0, false, None)?;
    fits("own values", own.1, false, Some(own_tokens))?;
    let mut inputs = vec![q, own.0, own.1];
    let mut tokens = own_tokens;
    if let Some((keys, values)) = reference {
        // A reference for the first samples only: as if it were for all, since the others do not look.
        let present = keys.dims().first().copied().unwrap_or(0);
        let tracked = [q, own.0, own.1, keys, values].iter().any(|tensor| tensor.track_op());
        let unseen =
            sees_reference.as_ref().is_some_and(|sees| present > 1 && !sees[present.min(batch)..].contains(&true));
        let enough = unseen && present < batch && !tracked && keys.dims() == values.dims();
        let whole = |tensor: &Tensor| match (enough, tensor.dims()) {
            (true, [_, tokens, width]) => {
                tensor.narrow(0, 0, 1).and_then(|one| one.broadcast_as((batch, *tokens, *width)))
            }
            _ => Ok(tensor.clone()),
        };
        let (key_batch, reference_tokens) = fits("reference keys", &whole(keys)?, true, None)?;
        let (value_batch, _) = fits("reference values", &whole(values)?, true, Some(reference_tokens))?;
        if value_batch != key_batch {
            return wrong("reference values", format!("batch {key_batch}, as the keys"), value_batch.to_string());
        }
        if mask == Mask::Causal {
            return wrong("reference", "none together with a causal mask".into(), format!("{reference_tokens} tokens"));
        }
        tokens += reference_tokens;
        inputs.extend([keys, values]);
    }
    if tokens == 0 {
        return wrong("own keys", "at least one key".into(), "none".into());
    }
    apply(Attention { heads, mask, packing: Packing::None, sees_reference }, &inputs)
}

/// Which of the inputs of a GPU kernel lie side by side in one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "the CPU takes packed tensors apart"))]
enum Packing {
    /// `q, k, v` or `q, k, v, k2, v2`.
    None,
    /// `qkv` or `qkv, k2, v2`.
    QueryKeyValue,
    /// `q, kv` or `q, kv, k2, v2`.
    KeyValue,
}

/// Its inputs are those of its packing.
struct Attention {
    heads: usize,
    mask: Mask,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "the CPU takes packed tensors apart"))]
    packing: Packing,
    /// Which samples see the reference; all, where there are no flags.
    sees_reference: Option<Arc<[bool]>>,
}

impl Attention {
    /// Width of the output.
    #[cfg(feature = "cuda")]
    fn channels(&self, inputs: &[Tensor]) -> Result<usize> {
        let width = inputs[0].dim(2)?;
        Ok(if self.packing == Packing::QueryKeyValue { width / 3 } else { width })
    }

    /// Whether a sample sees the source of keys and values at a position: its own, or the reference.
    fn sees(&self, sample: usize, source: usize) -> bool {
        source == 0 || self.sees_reference.as_ref().is_none_or(|flags| flags[sample])
    }
}

impl Function for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(self, inputs));
        dispatch!("attention", inputs[0], T => forward::forward::<T>(self, inputs))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(self, context));
        dispatch!("attention", context.inputs[0], T => backward::backward::<T>(self, context))
    }

    fn keep(&self) -> bool {
        true
    }
}

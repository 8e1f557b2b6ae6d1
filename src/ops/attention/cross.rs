//! Cross-attention to text and, decoupled from it, to image tokens (IP-Adapter).

use candle_core::Tensor;

use super::{Mask, attention};
use crate::Result;
use crate::ops::elementwise::{add_scaled, split};

/// `softmax(q k^T / sqrt(d)) v + scale softmax(q k_i^T / sqrt(d)) v_i`: decoupled cross-attention (IP-Adapter, Ye et al.
/// 2023, equation 5), without image tokens plain cross-attention.
///
/// `q`: `(batch, tokens, heads * d)`; `text`: keys and values, each `(batch, text tokens, heads * d)`; `image`: keys and
/// values, each `(batch, image tokens, heads * d)`, and their scale. Returns `(batch, tokens, heads * d)`. Gradients
/// for every tensor that is part of a graph. On a GPU both attentions are one kernel where it takes the shapes.
///
/// # Errors
/// As [`attention`](crate::ops::attention).
pub fn cross_attention(
    q: &Tensor,
    text: (&Tensor, &Tensor),
    image: Option<((&Tensor, &Tensor), f64)>,
    heads: usize,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(fused) = super::cross_cuda::cross_attention(q, text, image, heads)? {
        return Ok(fused);
    }
    let attended = attention(q, text, None, heads, Mask::None)?;
    match image {
        None => Ok(attended),
        Some((image, scale)) => add_scaled(&attended, &attention(q, image, None, heads, Mask::None)?, scale),
    }
}

/// [`cross_attention`] with the keys and values of the text in one tensor, `(batch, text tokens, 2 * heads * d)`: the
/// keys, then the values of a token.
///
/// # Errors
/// As [`cross_attention`].
pub fn cross_attention_packed(
    q: &Tensor,
    text: &Tensor,
    image: Option<((&Tensor, &Tensor), f64)>,
    heads: usize,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(fused) = super::cross_cuda::cross_attention_packed(q, text, image, heads)? {
        return Ok(fused);
    }
    let width = text.dims().last().copied().unwrap_or(0) / 2;
    let parts = split(text, &[width; 2])?;
    cross_attention(q, (&parts[0], &parts[1]), image, heads)
}

//! A residual sum and the normalisation of it, in one operation.

use candle_core::Tensor;

use super::layer_norm;
use crate::Result;
use crate::ops::elementwise::add;

/// `h = x + residual` and `layer_norm(h)`: what stands between two sublayers of a transformer. Returns both, of the
/// shape of `x` `(..., channels)`.
///
/// On a GPU one kernel makes both, and one their gradient.
///
/// # Errors
/// As [`layer_norm`], and where the shapes of `x` and `residual` differ.
pub fn add_layer_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::residual_cuda::add_layer_norm(x, residual, weight, bias, eps);
    }
    let sum = add(x, residual)?;
    let normed = layer_norm(&sum, weight, bias, eps)?;
    Ok((sum, normed))
}

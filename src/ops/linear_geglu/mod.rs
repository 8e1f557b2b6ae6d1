//! A linear layer with the gated GELU behind it.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::support::same_kind;
use super::{geglu, linear};
#[cfg(feature = "cuda")]
use crate::autograd::apply;
use crate::{Error, Result};

/// [`geglu`] of [`linear`]: `a * gelu(b)` where `a` and `b` are the first and the second half of `x W^T + bias`
/// (diffusers: `GEGLU`).
///
/// Where no gradient is going to be asked of the result, a GPU of the Hopper generation does both in one kernel, and the
/// projection, twice as wide as the result, is never in memory. Else it is, as the gradients need it.
///
/// `x`: `(..., in)`; `weight`: `(2 * out, in)`; `bias`: `(2 * out,)`. Returns `(..., out)`. Gradients as for [`linear`].
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit.
pub fn linear_geglu(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const NAME: &str = "linear_geglu";
    let (out, inner) = weight.dims2()?;
    if out % 2 != 0 {
        return Err(Error::argument(NAME, "weight", "(2 * out, in)", format!("{:?}", weight.dims())));
    }
    if x.dims().last() != Some(&inner) {
        return Err(Error::argument(NAME, "x", format!("(..., {inner})"), format!("{:?}", x.dims())));
    }
    same_kind(NAME, x, "weight", weight)?;
    if let Some(bias) = bias {
        same_kind(NAME, x, "bias", bias)?;
        if bias.dims() != [out] {
            return Err(Error::argument(NAME, "bias", format!("({out},)"), format!("{:?}", bias.dims())));
        }
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
        return apply(cuda::LinearGeglu, &inputs);
    }
    geglu(&linear(x, weight, bias)?)
}

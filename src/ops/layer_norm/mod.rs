//! Layer normalisation.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod residual;
#[cfg(feature = "cuda")]
mod residual_cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

pub use residual::add_layer_norm;

use super::support::{dispatch, on_cuda, same_kind};
use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::{Error, Result};

/// Normalises every token to mean 0 and variance 1 over its channels, then scales and shifts it (torch:
/// `F.layer_norm` over the last dimension; the variance is the biased one).
///
/// `x`: `(..., channels)`; `weight`, `bias`: `(channels,)`; `eps` is added to the variance. Returns the shape of `x`.
/// Gradients for every argument that is part of a graph. The statistics are computed in f64 whatever the dtype.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let channels = match x.dims().last() {
        Some(channels) if *channels > 0 => *channels,
        _ => return Err(Error::argument("layer_norm", "x", "(..., channels)", format!("{:?}", x.dims()))),
    };
    for (argument, tensor) in [("weight", weight), ("bias", bias)] {
        same_kind("layer_norm", x, argument, tensor)?;
        if tensor.dims() != [channels] {
            let found = format!("{:?}", tensor.dims());
            return Err(Error::argument("layer_norm", argument, format!("({channels},)"), found));
        }
    }
    apply(LayerNorm { eps }, &[x, weight, bias])
}

struct LayerNorm {
    eps: f64,
}

impl Function for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(self.eps, inputs));
        dispatch!("layer_norm", inputs[0], T => cpu::forward::<T>(self.eps, inputs))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(self.eps, context));
        dispatch!("layer_norm", context.inputs[0], T => cpu::backward::<T>(self.eps, context))
    }

    fn uses(&self, value: Value, _: &[bool]) -> bool {
        matches!(value, Value::Input(_))
    }
}

//! Squeeze and excitation (Hu et al. 2018): channels weighed sample by sample, and the mean that the weights come from.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::support::{on_cuda, same_kind};
use super::widen;
use crate::autograd::{Backward, Forward, Function, Output, Value, apply};
use crate::{Error, Result};

/// Batch, pixels and channels of `(batch, height, width, channels)`, none of them 0.
fn sizes(function: &'static str, x: &Tensor) -> Result<(usize, usize, usize)> {
    match *x.dims() {
        [batch, height, width, channels] if x.elem_count() > 0 => Ok((batch, height * width, channels)),
        ref other => {
            let expected = "(batch, height, width, channels), none of them 0";
            Err(Error::argument(function, "x", expected, format!("{other:?}")))
        }
    }
}

/// The mean of each channel over the pixels of each sample, summed in f32 or better.
///
/// `x`: `(batch, height, width, channels)`. Returns `(batch, 1, 1, channels)`. Gradient for `x`.
///
/// # Errors
/// [`Error::Argument`] where `x` has another rank or is empty.
pub fn mean_pixels(x: &Tensor) -> Result<Tensor> {
    sizes("mean_pixels", x)?;
    apply(MeanPixels, &[x])
}

struct MeanPixels;

impl Function for MeanPixels {
    fn name(&self) -> &'static str {
        "mean_pixels"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let x = &inputs[0];
        on_cuda!(x => cuda::mean(x));
        Ok(Output::Tensor(widen(x)?.mean_keepdim((1, 2))?.to_dtype(x.dtype())?).into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (x, gradient) = (&context.inputs[0], context.gradient()?);
        let (_, pixels, _) = sizes("mean_pixels", x)?;
        on_cuda!(gradient => cuda::spread(gradient, 1.0 / pixels as f64, x.shape()));
        Ok(vec![Some((gradient * (1.0 / pixels as f64))?.broadcast_as(x.shape())?.contiguous()?)])
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

/// `x * logistic(logits) + addend`: every channel of every sample weighed by a number between 0 and 1, and a shortcut.
///
/// `x`, `addend`: `(batch, height, width, channels)`; `logits`: `(batch, 1, 1, channels)`. Returns the shape of `x`.
/// Gradients for every argument that is part of a graph.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit.
pub fn gated_sum(x: &Tensor, logits: &Tensor, addend: &Tensor) -> Result<Tensor> {
    let (batch, _, channels) = sizes("gated_sum", x)?;
    for (name, argument, shape) in
        [("logits", logits, vec![batch, 1, 1, channels]), ("addend", addend, x.dims().to_vec())]
    {
        same_kind("gated_sum", x, name, argument)?;
        if argument.dims() != shape {
            return Err(Error::argument("gated_sum", name, format!("{shape:?}"), format!("{:?}", argument.dims())));
        }
    }
    apply(GatedSum, &[x, logits, addend])
}

struct GatedSum;

/// The logistic function by tanh, which is finite everywhere.
fn logistic(x: &Tensor) -> Result<Tensor> {
    Ok(x.affine(0.5, 0.0)?.tanh()?.affine(0.5, 0.5)?)
}

impl Function for GatedSum {
    fn name(&self) -> &'static str {
        "gated_sum"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let [x, logits, addend] = inputs else { return Err(Error::argument("gated_sum", "inputs", "three", "others")) };
        on_cuda!(x => cuda::forward(x, logits, addend));
        Ok(Output::Tensor((x.broadcast_mul(&logistic(logits)?)? + addend)?).into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let [x, logits, _] = context.inputs else { return Ok(Vec::new()) };
        let gradient = context.gradient()?;
        let (mut of_x, mut of_logits) = (None, None);
        on_cuda!(gradient => {
            if context.needs[0] {
                of_x = Some(cuda::input_gradient(gradient, logits)?);
            }
            if context.needs[1] {
                of_logits = Some(cuda::logit_gradient(x, gradient, logits)?);
            }
            Ok(vec![of_x, of_logits, Some(gradient.clone())])
        });
        let gate = logistic(logits)?;
        if context.needs[0] {
            of_x = Some(gradient.broadcast_mul(&gate)?);
        }
        if context.needs[1] {
            let slope = (&gate * gate.affine(-1.0, 1.0)?)?;
            of_logits = Some(((gradient * x)?.sum_keepdim((1, 2))? * slope)?);
        }
        Ok(vec![of_x, of_logits, Some(gradient.clone())])
    }

    fn uses(&self, value: Value, needs: &[bool]) -> bool {
        match value {
            Value::Input(0) => needs[1],
            Value::Input(1) => needs[0] || needs[1],
            _ => false,
        }
    }
}

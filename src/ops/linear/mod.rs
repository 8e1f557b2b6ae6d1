//! The linear map `x W^T + b`.

mod cpu;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::support::{dispatch, same_kind};
use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::{Error, Result};

/// `x W^T + b` (torch: `F.linear`).
///
/// `x`: `(..., in)`; `weight`: `(out, in)`; `bias`: `(out,)`. Returns `(..., out)`. Gradients for every argument that
/// is part of a graph; a weight that is not is frozen and only passes the gradient on to `x`.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    if x.rank() == 0 || x.dims()[x.rank() - 1] != inner {
        return Err(Error::argument("linear", "x", format!("(..., {inner})"), format!("{:?}", x.dims())));
    }
    same_kind("linear", x, "weight", weight)?;
    if let Some(bias) = bias {
        same_kind("linear", x, "bias", bias)?;
        if bias.dims() != [out] {
            return Err(Error::argument("linear", "bias", format!("({out},)"), format!("{:?}", bias.dims())));
        }
    }
    match bias {
        Some(bias) => apply(Linear, &[x, weight, bias]),
        None => apply(Linear, &[x, weight]),
    }
}

struct Linear;

impl Function for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        dispatch!("linear", inputs[0], T => cpu::forward::<T>(&inputs[0], &inputs[1], inputs.get(2)))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        dispatch!("linear", context.inputs[0], T => cpu::backward::<T>(context))
    }

    fn uses(&self, value: Value, needs: &[bool]) -> bool {
        // Each factor for the other's gradient.
        match value {
            Value::Input(0) => needs[1],
            Value::Input(1) => needs[0],
            _ => false,
        }
    }
}

//! The linear map `x W^T + b`.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::addends::{Addends, Places};
use super::support::{dispatch, on_cuda, same_kind};
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
    linear_with(x, weight, &Addends::bias(bias))
}

/// [`linear`] with more added to the product: `x W^T + bias + per_sample + residual`.
///
/// Gradients for every argument that is part of a graph.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit.
pub fn linear_with(x: &Tensor, weight: &Tensor, addends: &Addends<'_>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    if x.rank() == 0 || x.dims()[x.rank() - 1] != inner {
        return Err(Error::argument("linear", "x", format!("(..., {inner})"), format!("{:?}", x.dims())));
    }
    same_kind("linear", x, "weight", weight)?;
    let mut inputs = vec![x, weight];
    let shape = [&x.dims()[..x.rank() - 1], &[out]].concat();
    let places = addends.place("linear", x, &shape, &mut inputs)?;
    apply(Linear { places }, &inputs)
}

struct Linear {
    places: Places,
}

impl Function for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(self, inputs));
        dispatch!("linear", inputs[0], T => cpu::forward::<T>(self, inputs))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(self, context));
        dispatch!("linear", context.inputs[0], T => cpu::backward::<T>(self, context))
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

//! A residual sum and the normalisation of it on a GPU.

use candle_core::Tensor;

use super::cuda::{Launch, NAME};
use crate::autograd::{Backward, Forward, Function, Value, apply_many};
use crate::cuda::Buffer;
use crate::ops::support::same_kind;
use crate::{Error, Result};

pub(super) fn add_layer_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    if residual.dims() != x.dims() {
        let (expected, found) = (format!("{:?}", x.dims()), format!("{:?}", residual.dims()));
        return Err(Error::argument(NAME, "residual", expected, found));
    }
    for (argument, tensor) in [("residual", residual), ("weight", weight), ("bias", bias)] {
        same_kind(NAME, x, argument, tensor)?;
    }
    let channels = x.dims().last().copied().unwrap_or(0);
    for (argument, tensor) in [("weight", weight), ("bias", bias)] {
        if tensor.dims() != [channels] {
            return Err(Error::argument(NAME, argument, format!("({channels},)"), format!("{:?}", tensor.dims())));
        }
    }
    let mut outputs = apply_many(AddLayerNorm { eps }, &[x, residual, weight, bias])?.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(sum), Some(normed)) => Ok((sum, normed)),
        _ => Err(Error::argument(NAME, "outputs", "the sum and its normalisation", "fewer")),
    }
}

struct AddLayerNorm {
    eps: f64,
}

impl Function for AddLayerNorm {
    fn name(&self) -> &'static str {
        "add_layer_norm"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let [x, residual, weight, bias] = [0, 1, 2, 3].map(|i| &inputs[i]);
        let sum = Buffer::like(NAME, x)?;
        let launch = Launch { x, weight, eps: self.eps };
        let (normed, mean, rstd) = launch.forward(bias, Some((residual, &sum)))?;
        Ok(Forward { outputs: vec![sum.into_output(), normed.into_output()], saved: vec![mean, rstd] })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let weight = &context.inputs[2];
        let (of_sum, of_normed) = (&context.gradients[0], &context.gradients[1]);
        let wants = [context.needs[0] || context.needs[1], context.needs[2], context.needs[3]];
        let Some(of_normed) = of_normed else {
            return Ok(vec![of_sum.clone(), of_sum.clone(), None, None]);
        };
        let Some(Some(sum)) = context.outputs.first() else {
            return Err(Error::argument(NAME, "outputs", "the sum, which the backward pass reads", "none"));
        };
        let launch = Launch { x: sum, weight, eps: self.eps };
        let statistics = (&context.saved[0], &context.saved[1]);
        let [dx, dweight, dbias] = launch.backward(statistics, of_normed, of_sum.as_ref(), wants)?;
        Ok(vec![dx.clone(), dx, dweight, dbias])
    }

    fn uses(&self, value: Value, _: &[bool]) -> bool {
        matches!(value, Value::Input(2) | Value::Output(0))
    }
}

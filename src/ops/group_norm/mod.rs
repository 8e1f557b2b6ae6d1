//! Group normalisation, channels last, with an activation fused in.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::Activation;
use super::support::{dispatch, on_cuda, same_kind};
use crate::autograd::{Backward, Forward, Function, Saves, Value, apply};
use crate::{Error, Result};

/// Group normalisation followed by an activation (torch: `act(F.group_norm)`, in channels-last layout).
///
/// Every sample's channels are normalised in `groups` equal groups, over the group and all positions, by the biased
/// variance plus `eps`; then scaled by `weight` and shifted by `bias`. `x`: `(batch, ..., channels)`; `weight`, `bias`:
/// `(channels,)`. Returns the shape of `x`. Statistics are summed in f64. Gradients for every argument that is part of
/// a graph, equal bit for bit between runs.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit, the groups do not divide the channels or `eps` is
/// negative.
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    activation: Activation,
) -> Result<Tensor> {
    let wrong =
        |argument, expected: String, found: String| Err(Error::argument("group_norm", argument, expected, found));
    if x.rank() < 2 || x.elem_count() == 0 {
        return wrong("x", "(batch, ..., channels), none of them 0".to_owned(), format!("{:?}", x.dims()));
    }
    let channels = x.dims()[x.rank() - 1];
    if groups == 0 || !channels.is_multiple_of(groups) {
        return wrong("groups", format!("a divisor of the {channels} channels"), groups.to_string());
    }
    for (argument, tensor) in [("weight", weight), ("bias", bias)] {
        same_kind("group_norm", x, argument, tensor)?;
        if tensor.dims() != [channels] {
            return wrong(argument, format!("({channels},)"), format!("{:?}", tensor.dims()));
        }
    }
    if !(eps >= 0.0 && eps.is_finite()) {
        return wrong("eps", "a number not below 0".to_owned(), eps.to_string());
    }
    apply(GroupNorm { groups, eps, activation }, &[x, weight, bias])
}

struct GroupNorm {
    groups: usize,
    eps: f64,
    activation: Activation,
}

impl Function for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(self, &inputs[0], &inputs[1], &inputs[2]));
        dispatch!("group_norm", inputs[0], T => cpu::forward::<T>(self, &inputs[0], &inputs[1], &inputs[2]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(self, context));
        dispatch!("group_norm", context.inputs[0], T => cpu::backward::<T>(self, context))
    }

    /// Two numbers for each group of each sample.
    fn saves(&self) -> Saves {
        Saves::Little
    }

    fn uses(&self, value: Value, _: &[bool]) -> bool {
        matches!(value, Value::Input(_))
    }
}

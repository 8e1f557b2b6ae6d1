//! A frozen linear map with a low-rank update, whose gradient reads what it can once.

use candle_core::Tensor;

use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::ops::linear::cuda::{matrix, product};
use crate::ops::support::same_kind;
use crate::{Error, Result};

/// `x weight^T + bias + residual + (x down^T) up^T`.
///
/// `x`: `(..., in)`; `weight`: `(out, in)`, frozen; `bias`: `(out,)`, frozen; `residual`: `(..., out)`; `down`:
/// `(width, in)` and `up`: `(out, width)`, as [`lora_factors`](super::lora_factors) makes them. Gradients for `x`,
/// `down`, `up` and `residual`.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit.
pub(crate) fn linear_low_rank(
    x: &Tensor,
    weight: &Tensor,
    (bias, residual): (Option<&Tensor>, Option<&Tensor>),
    (down, up): (&Tensor, &Tensor),
) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let width = down.dims2()?.0;
    let wrong = |argument, expected: Vec<usize>, found: &Tensor| {
        Err(Error::argument(NAME, argument, format!("{expected:?}"), format!("{:?}", found.dims())))
    };
    let Some((&last, before)) = x.dims().split_last() else { return wrong("x", vec![inner], x) };
    let shape = [before, &[out]].concat();
    if last != inner {
        return wrong("x", [before, &[inner]].concat(), x);
    }
    if down.dims() != [width, inner] || up.dims() != [out, width] {
        return wrong("up", vec![out, width], up);
    }
    if let Some(bias) = bias.filter(|bias| bias.dims() != [out]) {
        return wrong("bias", vec![out], bias);
    }
    if let Some(residual) = residual.filter(|residual| residual.dims() != shape) {
        return wrong("residual", shape, residual);
    }
    let mut inputs = vec![x, weight, down, up];
    let bias_place = bias.is_some().then_some(inputs.len());
    inputs.extend(bias);
    let residual_place = residual.is_some().then_some(inputs.len());
    inputs.extend(residual);
    for tensor in &inputs[1..] {
        same_kind(NAME, x, "an argument", tensor)?;
    }
    apply(LinearLowRank { bias: bias_place, residual: residual_place }, &inputs)
}

const NAME: &str = "linear_low_rank";

/// Its inputs are `x, weight, down, up`, then bias and residual where there are any.
struct LinearLowRank {
    bias: Option<usize>,
    residual: Option<usize>,
}

impl Function for LinearLowRank {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let [x, weight, down, up] = [0, 1, 2, 3].map(|i| &inputs[i]);
        let (out, inner) = weight.dims2()?;
        let (width, rows) = (down.dim(0)?, x.elem_count() / inner.max(1));
        let shape = |last: usize| [&x.dims()[..x.rank() - 1], &[last]].concat();
        let at = |place: Option<usize>| place.map(|place| &inputs[place]);
        let x_matrix = matrix(x, rows, inner)?;
        let low = product((x, x_matrix), matrix(down, width, inner)?.t(), (None, None), &shape(width))?.into_tensor();
        let addends = (at(self.bias), at(self.residual));
        let y = product((x, x_matrix), matrix(weight, out, inner)?.t(), addends, &shape(out))?.into_tensor();
        let low_matrix = matrix(&low, rows, width)?;
        let y = product((&low, low_matrix), matrix(up, out, width)?.t(), (None, Some(&y)), &shape(out))?;
        Ok(Forward { outputs: vec![y.into_output()], saved: vec![low] })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let [x, weight, down, up] = [0, 1, 2, 3].map(|i| &context.inputs[i]);
        let (out, inner) = weight.dims2()?;
        let (width, rows) = (down.dim(0)?, x.elem_count() / inner.max(1));
        let (gradient, low) = (context.gradient()?, &context.saved[0]);
        let g = matrix(gradient, rows, out)?;
        let mut gradients = vec![None; context.inputs.len()];
        let of_low = product((gradient, g), matrix(up, out, width)?, (None, None), low.dims())?.into_tensor();
        let of_low_matrix = matrix(&of_low, rows, width)?;
        if context.needs[0] {
            let dx = product((gradient, g), matrix(weight, out, inner)?, (None, None), x.dims())?.into_tensor();
            let dx = product((&of_low, of_low_matrix), matrix(down, width, inner)?, (None, Some(&dx)), x.dims())?;
            gradients[0] = Some(dx.into_tensor());
        }
        if context.needs[2] {
            let of_down = product((&of_low, of_low_matrix.t()), matrix(x, rows, inner)?, (None, None), down.dims())?;
            gradients[2] = Some(of_down.into_tensor());
        }
        if context.needs[3] {
            let of_up = product((gradient, g.t()), matrix(low, rows, width)?, (None, None), up.dims())?;
            gradients[3] = Some(of_up.into_tensor());
        }
        if let Some(residual) = self.residual.filter(|place| context.needs[*place]) {
            gradients[residual] = Some(gradient.clone());
        }
        Ok(gradients)
    }

    fn uses(&self, value: Value, _: &[bool]) -> bool {
        matches!(value, Value::Input(0..=3))
    }
}

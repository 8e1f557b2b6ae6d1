//! The block on a GPU.

use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Backward, Forward, Function};
use crate::ops::activation::cuda::gated;
use crate::ops::conv2d::cuda::{Convolution, InputGradient};

/// Inputs: `x`, then weight and bias of the three convolutions, all frozen.
pub(super) struct RectifiedBlock;

/// A convolution of the block, rectified.
fn convolve(x: &Tensor, inputs: &[Tensor], index: usize, residual: Option<&Tensor>) -> Result<Tensor> {
    let (weight, bias) = (&inputs[1 + 2 * index], Some(&inputs[2 + 2 * index]));
    let convolution =
        Convolution { x, weight, stride: 1, padding: [1; 2], bias, per_sample: None, residual, rectified: true };
    Ok(convolution.run()?.into_tensor())
}

impl Function for RectifiedBlock {
    fn name(&self) -> &'static str {
        "rectified_block"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let x = &inputs[0];
        let y = convolve(&convolve(x, inputs, 0, None)?, inputs, 1, None)?;
        let (weight, bias, residual) = (&inputs[5], Some(&inputs[6]), Some(x));
        let last = Convolution {
            x: &y,
            weight,
            stride: 1,
            padding: [1; 2],
            bias,
            per_sample: None,
            residual,
            rectified: true,
        };
        Ok(last.run()?.into_output().into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let mut gradients = vec![None; context.inputs.len()];
        let ([x, a, _, b, _, c, _], [Some(y)]) = (context.inputs, context.outputs) else { return Ok(gradients) };
        let first = convolve(x, context.inputs, 0, None)?;
        let second = convolve(&first, context.inputs, 1, None)?;
        let back =
            |x: &Tensor, weight: &Tensor, gradient: &Tensor, residual: Option<&Tensor>, gate: Option<&Tensor>| {
                let padding = [1; 2];
                Ok::<_, crate::Error>(
                    InputGradient { x, weight, stride: 1, padding, gradient, residual, gate }.run()?.into_tensor(),
                )
            };
        let sum = gated(context.gradient()?, y)?;
        let gradient = back(&second, c, &sum, None, Some(&second))?;
        drop(second);
        let gradient = back(&first, b, &gradient, None, Some(&first))?;
        drop(first);
        gradients[0] = Some(back(x, a, &gradient, Some(&sum), None)?);
        Ok(gradients)
    }
}

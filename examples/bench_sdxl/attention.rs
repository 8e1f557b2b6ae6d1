//! Extended self-attention at SDXL's sizes.

use candle_core::{DType, Tensor, Var};
use lcm_lookahead::Result;
use lcm_lookahead::autograd::{Backward, Forward, Function, Output, apply, gradients, taped};
use lcm_lookahead::ops::{self, Mask};

use crate::measure::Report;

pub fn measure(report: &mut Report) -> Result<()> {
    for (batch, heads, tokens) in [(4, 10, 4096), (4, 20, 1024), (2, 10, 4096), (2, 20, 1024), (1, 10, 4096)] {
        let shape = (batch, tokens, heads * 64);
        let random = || -> Result<Var> {
            Ok(Var::from_tensor(&Tensor::randn(0f32, 1.0, shape, &report.device)?.to_dtype(DType::BF16)?)?)
        };
        let variables = [random()?, random()?, random()?, random()?, random()?];
        let attend = move |tensors: &[Tensor]| {
            ops::attention(&tensors[0], (&tensors[1], &tensors[2]), Some((&tensors[3], &tensors[4])), heads, Mask::None)
        };
        let frozen: Vec<Tensor> = variables.iter().map(|variable| variable.as_detached_tensor()).collect();
        let tracked: Vec<&Tensor> = variables.iter().map(|variable| variable.as_tensor()).collect();
        let work = 4.0 * (batch * heads * tokens * 2 * tokens * 64) as f64;
        let what = format!("extended attention B{batch} H{heads} N{tokens} M{}", 2 * tokens);
        report.line(&format!("{what} forward"), work, 20, || attend(&frozen).map(|_| ()))?;
        report.line(&format!("{what} forward and backward"), 3.5 * work, 20, || {
            // On a tape, as in a pass of the U-Net.
            gradients(|| Ok(taped(&tracked, move |tensors| Ok(vec![apply(Sum, &[&attend(tensors)?])?]))?.pop()))
                .map(|_| ())
        })?;
    }
    Ok(())
}

/// A sum, as far as its gradient goes: ones.
struct Sum;

impl Function for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let zero = Tensor::zeros((), inputs[0].dtype(), inputs[0].device())?;
        Ok(Output::Tensor(zero).into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(context.inputs[0].ones_like()?)])
    }
}

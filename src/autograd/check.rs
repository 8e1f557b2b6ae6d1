//! Gradients against finite differences.

use candle_core::{DType, Tensor, Var};

use crate::random::Address;
use crate::{Error, Result};

/// How far an analytic gradient lies from the numeric one.
#[derive(Clone, Debug)]
pub struct GradientCheck {
    /// For every input, `||analytic - numeric|| / max(||numeric||, 1e-6)`.
    pub relative_errors: Vec<f64>,
    /// For every input, the norm of the numeric gradient: a check of a gradient that is zero anyway proves little.
    pub norms: Vec<f64>,
}

impl GradientCheck {
    /// The largest relative error.
    pub fn worst(&self) -> f64 {
        self.relative_errors.iter().copied().fold(0.0, f64::max)
    }
}

/// Compares the gradients of `function` with central differences in f64, for every element of every input.
///
/// The outputs are reduced to one number by a fixed random weighting, so every output element counts. Steps of 1e-5:
/// with smooth functions of values near one the relative error of an exact gradient is below 1e-8.
///
/// # Errors
/// Those of the function, and where an input is not f64.
pub fn check_gradients(
    inputs: &[Tensor],
    function: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<GradientCheck> {
    if let Some(input) = inputs.iter().find(|input| input.dtype() != DType::F64) {
        return Err(Error::argument("check_gradients", "inputs", "f64", format!("{:?}", input.dtype())));
    }
    let reduce = |outputs: Vec<Tensor>| -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (i, output) in outputs.iter().enumerate() {
            let weights =
                Address::new(17, "gradient check").sample(i).normal(output.shape(), DType::F64, output.device())?;
            let term = (output * weights)?.sum_all()?;
            sum = Some(match sum {
                None => term,
                Some(sum) => (sum + term)?,
            });
        }
        sum.ok_or_else(|| Error::argument("check_gradients", "function", "at least one output", "none"))
    };
    let variables: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<_>>()?;
    let tracked: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
    let store = reduce(function(&tracked)?)?.backward()?;

    let step = 1e-5;
    let mut check = GradientCheck { relative_errors: Vec::new(), norms: Vec::new() };
    for (index, input) in inputs.iter().enumerate() {
        let values = input.flatten_all()?.to_vec1::<f64>()?;
        let analytic = match store.get(&variables[index]) {
            Some(gradient) => gradient.flatten_all()?.to_vec1::<f64>()?,
            None => vec![0.0; values.len()],
        };
        let (mut difference, mut norm) = (0.0, 0.0);
        for element in 0..values.len() {
            let at = |delta: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[element] += delta;
                let mut all = inputs.to_vec();
                all[index] = Tensor::from_vec(moved, input.shape(), input.device())?;
                Ok(reduce(function(&all)?)?.to_scalar::<f64>()?)
            };
            let numeric = (at(step)? - at(-step)?) / (2.0 * step);
            difference += (analytic[element] - numeric).powi(2);
            norm += numeric * numeric;
        }
        check.relative_errors.push(difference.sqrt() / norm.sqrt().max(1e-6));
        check.norms.push(norm.sqrt());
    }
    Ok(check)
}

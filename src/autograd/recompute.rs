//! Recomputation of activations: trade a second forward pass for the memory of a segment's activations.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use candle_core::{Tensor, Var};

use super::function::{Backward, Forward, Function, Output, apply_many};
use crate::Result;

/// Runs a segment of a network without keeping its activations; they are computed again in the backward pass.
///
/// The result equals `segment(inputs)` and so do all gradients: those of `inputs`, and those of every variable that
/// the segment closes over. The variables are found by walking the segment's graph once, so none can be forgotten.
/// Tensors other than variables that need a gradient should be passed through `inputs`; a segment that closes over
/// one still gives exact gradients, but walks that tensor's history again.
///
/// # Errors
/// Those of the segment.
///
/// # Example
/// ```
/// use candle_core::{Device, Var};
/// use lcm_lookahead::autograd::recompute;
///
/// let weight = Var::new(&[3f32], &Device::Cpu)?;
/// let x = Var::new(&[2f32], &Device::Cpu)?;
/// let (w, input) = (weight.clone(), x.as_tensor());
/// let y = recompute(&[input], move |x| Ok(vec![(&x[0] * w.as_tensor())?.sqr()?]))?;
/// let gradients = y[0].backward()?;
/// assert_eq!(gradients.get(&weight).unwrap().to_vec1::<f32>()?, [24.0]);
/// assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>()?, [36.0]);
/// # Ok::<(), lcm_lookahead::Error>(())
/// ```
pub fn recompute<F>(inputs: &[&Tensor], segment: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    let detached: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
    let outputs = segment(&detached)?;
    let variables = variables_of(&outputs);
    if variables.is_empty() && !inputs.iter().any(|input| input.track_op()) {
        return Ok(outputs);
    }
    let outputs = outputs.iter().map(Tensor::detach).collect();
    let function = Segment {
        segment,
        input_count: inputs.len(),
        variables: variables.clone(),
        outputs: Mutex::new(Some(outputs)),
    };
    let all: Vec<&Tensor> = inputs.iter().copied().chain(&variables).collect();
    apply_many(function, &all)
}

/// The variables a computation depends on, each once.
fn variables_of(outputs: &[Tensor]) -> Vec<Tensor> {
    let mut seen = HashSet::new();
    let nodes = outputs.iter().flat_map(|output| output.sorted_nodes());
    nodes.filter(|node| node.is_variable() && seen.insert(node.id())).cloned().collect()
}

struct Segment<F> {
    segment: F,
    input_count: usize,
    variables: Vec<Tensor>,
    /// The values from the first run, until `forward` hands them out.
    outputs: Mutex<Option<Vec<Tensor>>>,
}

impl<F> Function for Segment<F>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    fn name(&self) -> &'static str {
        "recompute"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let computed = self.outputs.lock().unwrap_or_else(PoisonError::into_inner).take();
        let outputs = match computed {
            Some(outputs) => outputs,
            None => (self.segment)(&inputs[..self.input_count])?,
        };
        Ok(Forward { outputs: outputs.into_iter().map(Output::Tensor).collect(), saved: Vec::new() })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let mut inputs = Vec::with_capacity(self.input_count);
        for (input, needed) in context.inputs.iter().zip(context.needs).take(self.input_count) {
            inputs.push(if *needed { Var::from_tensor(input)?.into_inner() } else { input.clone() });
        }
        let outputs = (self.segment)(&inputs)?;
        // The vector-Jacobian product as the gradient of <output, gradient>, summed over the outputs.
        let mut seed: Option<Tensor> = None;
        for (output, gradient) in outputs.iter().zip(context.gradients) {
            if let Some(gradient) = gradient {
                let term = (output * gradient)?.sum_all()?;
                seed = Some(match seed {
                    None => term,
                    Some(sum) => (sum + term)?,
                });
            }
        }
        let Some(seed) = seed else { return Ok(vec![None; context.inputs.len()]) };
        let gradients = seed.backward()?;
        Ok(inputs.iter().chain(&self.variables).map(|tensor| gradients.get(tensor).cloned()).collect())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::random::Address;

    #[test]
    fn recomputed_gradients_equal_plain_ones_bit_for_bit() -> Result<()> {
        let random = |purpose, shape: (usize, usize)| -> Result<Var> {
            Ok(Var::from_tensor(&Address::new(1, purpose).normal(shape, DType::F64, &Device::Cpu)?)?)
        };
        let (x, w1, w2, side) =
            (random("x", (3, 4))?, random("w1", (4, 4))?, random("w2", (4, 4))?, random("s", (3, 4))?);
        let run = |on: bool| -> Result<Vec<Vec<f64>>> {
            let (v1, v2) = (w1.clone(), w2.clone());
            let segment = move |x: &[Tensor]| -> Result<Vec<Tensor>> {
                let hidden = x[0].matmul(&v1)?.tanh()?;
                Ok(vec![(hidden.matmul(&v2)? + &x[1])?, hidden])
            };
            let inputs = [x.as_tensor(), side.as_tensor()];
            let outputs = if on { recompute(&inputs, segment)? } else { segment(&inputs.map(Tensor::clone))? };
            let loss = (outputs[0].sqr()?.sum_all()? + outputs[1].powf(3.0)?.sum_all()?)?;
            let gradients = loss.backward()?;
            [&x, &w1, &w2, &side]
                .iter()
                .map(|v| Ok(gradients.get(v).unwrap().flatten_all()?.to_vec1::<f64>()?))
                .collect()
        };
        let (plain, recomputed) = (run(false)?, run(true)?);
        for (a, b) in plain.iter().flatten().zip(recomputed.iter().flatten()) {
            assert!((a - b).abs() <= 1e-12 * a.abs().max(1.0), "{a} and {b}");
        }
        Ok(())
    }

    #[test]
    fn an_output_that_is_not_used_costs_no_gradient() -> Result<()> {
        let x = Var::new(&[2f64, 3.], &Device::Cpu)?;
        let outputs = recompute(&[x.as_tensor()], |x| Ok(vec![x[0].sqr()?, (&x[0] * 5.)?]))?;
        let gradients = outputs[1].sum_all()?.backward()?;
        assert_eq!(gradients.get(&x).unwrap().to_vec1::<f64>()?, [5., 5.]);
        Ok(())
    }
}

//! Segments of a network on a tape instead of candle's graph.

use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;

use super::function::{Backward, Forward, Function, Output, Value, apply_many};
use super::tape::{self, Mode, Recording};
use crate::{Error, Result};

/// Runs a segment of a network on a [`tape`], and puts it into candle's graph as one function.
///
/// The result equals `segment(inputs)` and so do all gradients: those of `inputs`, and those of every variable that the
/// segment closes over. Tensors other than variables that need a gradient must be passed through `inputs`. Time and
/// memory of the backward pass are less than with candle's graph: first gradients are moved, not added to zeros, and
/// what a function kept is freed as soon as it is differentiated.
///
/// A segment that uses candle's own operations on what is to be differentiated works as well, on candle's graph.
/// Inside another segment the operations go where those around them go. The segment runs again where the same graph
/// is differentiated a second time.
///
/// # Errors
/// Those of the segment.
///
/// # Example
/// ```
/// use candle_core::{Device, Var};
/// use lcm_lookahead::{autograd::taped, ops};
///
/// let weight = Var::new(&[[3f32]], &Device::Cpu)?;
/// let x = Var::new(&[[2f32]], &Device::Cpu)?;
/// let w = weight.clone();
/// let y = taped(&[&x], move |x| Ok(vec![ops::linear(&ops::linear(&x[0], &w, None)?, &w, None)?]))?;
/// let gradients = y[0].backward()?;
/// assert_eq!(gradients.get(&weight).unwrap().to_vec2::<f32>()?, [[12.0]]);
/// assert_eq!(gradients.get(&x).unwrap().to_vec2::<f32>()?, [[9.0]]);
/// # Ok::<(), lcm_lookahead::Error>(())
/// ```
pub fn taped<F>(inputs: &[&Tensor], segment: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    let inputs: Vec<Tensor> = inputs.iter().map(|input| (*input).clone()).collect();
    if tape::mode() != Mode::Graph {
        return segment(&inputs);
    }
    let mut recording = match tape::record(&inputs, &segment) {
        Err(Error::OffTape { .. }) => return segment(&inputs),
        recording => recording?,
    };
    let is_constant = recording.is_constant();
    let outputs = recording.take_outputs();
    if is_constant {
        return Ok(outputs);
    }
    let all: Vec<Tensor> = inputs.iter().chain(recording.variables()).cloned().collect();
    let function = Taped {
        segment,
        all: all.clone(),
        input_count: inputs.len(),
        outputs: Mutex::new(outputs),
        recording: Mutex::new(Some(recording)),
    };
    apply_many(function, &all.iter().collect::<Vec<_>>())
}

struct Taped<F> {
    segment: F,
    /// The inputs, then the variables, as the caller gave them: parts of the graph around the segment.
    all: Vec<Tensor>,
    input_count: usize,
    /// The values, until `forward` hands them out.
    outputs: Mutex<Vec<Tensor>>,
    /// The tape, until the first backward pass.
    recording: Mutex<Option<Recording>>,
}

fn take<T: Default>(slot: &Mutex<T>) -> T {
    // The slots hold whole values only, so one left by a panicking thread is still good.
    std::mem::take(&mut *slot.lock().unwrap_or_else(PoisonError::into_inner))
}

impl<F> Function for Taped<F>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    fn name(&self) -> &'static str {
        "taped"
    }

    fn forward(&self, _: &[Tensor]) -> Result<Forward> {
        Ok(Forward { outputs: take(&self.outputs).into_iter().map(Output::Tensor).collect(), saved: Vec::new() })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let recording = match take(&self.recording) {
            Some(recording) => recording,
            None => tape::record(&self.all[..self.input_count], &self.segment)?,
        };
        Ok(recording.backward(context.gradients)?.into_parts(&self.all[self.input_count..]).0)
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        // It has the inputs as parts of the graph, in `all`.
        false
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::{Activation, activation, add, linear, reshape, split};
    use crate::random::Address;

    fn network(x: &[Tensor], weight: &Tensor) -> Result<Vec<Tensor>> {
        let hidden = activation(&linear(&x[0], weight, None)?, Activation::Silu)?;
        let parts = split(&reshape(&add(&hidden, &x[1])?, (1, 12))?, &[4, 8])?;
        Ok(vec![linear(&hidden, weight, None)?, parts[1].clone(), hidden])
    }

    /// The gradients of all leaves, twice, with the segment run by `run`.
    fn gradients(run: impl Fn(&[Tensor], &Tensor) -> Result<Vec<Tensor>>) -> Result<Vec<Vec<f64>>> {
        let random = |purpose| -> Result<Var> {
            let shape = if purpose == "w" { (4, 4) } else { (3, 4) };
            Ok(Var::from_tensor(&Address::new(3, purpose).normal(shape, DType::F64, &Device::Cpu)?)?)
        };
        let (x, side, w) = (random("x")?, random("side")?, random("w")?);
        // Parts of a graph rather than variables, of which one is used behind the segment too.
        let (a, b) = ((x.as_tensor() * 1.5)?, side.sqr()?);
        let outputs = run(&[a.clone(), b], w.as_tensor())?;
        let loss = ((outputs[0].sqr()? + &a)?.sum_all()? + outputs[2].powf(3.0)?.sum_all()?)?;
        let mut all = Vec::new();
        for _ in 0..2 {
            let gradients = loss.backward()?;
            for leaf in [&x, &side, &w] {
                let gradient = gradients.get(leaf).cloned().map_or_else(|| leaf.zeros_like(), Ok)?;
                all.push(gradient.flatten_all()?.to_vec1()?);
            }
        }
        Ok(all)
    }

    #[test]
    fn gradients_equal_those_of_candles_graph_also_when_asked_for_twice() -> Result<()> {
        let plain = gradients(network)?;
        let on_tape = gradients(|x, weight| {
            let weight = weight.clone();
            taped(&x.iter().collect::<Vec<_>>(), move |x| network(x, &weight))
        })?;
        for (a, b) in plain.iter().flatten().zip(on_tape.iter().flatten()) {
            assert!((a - b).abs() <= 1e-12 * a.abs().max(1.0), "{a} and {b}");
        }
        Ok(())
    }

    #[test]
    fn operations_of_candles_inside_are_differentiated_too() -> Result<()> {
        let x = Var::new(&[[2f64]], &Device::Cpu)?;
        let y = taped(&[&x], |x| Ok(vec![x[0].sqr()?]))?;
        assert_eq!(y[0].backward()?.get(&x).unwrap().to_vec2::<f64>()?, [[4.0]]);
        Ok(())
    }

    #[test]
    fn constants_stay_constants() -> Result<()> {
        let x = Tensor::new(&[[2f64]], &Device::Cpu)?;
        let y = taped(&[&x], |x| Ok(vec![activation(&x[0], Activation::Relu)?]))?;
        assert!(!y[0].track_op());
        Ok(())
    }
}

//! Segments of a network that borrow what they are made of, on a tape.

use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;

use super::function::{Backward, Forward, Function, Output, Value, apply_many};
use super::tape::{self, Mode, Recording};
use crate::{Error, Result};

/// [`taped`](super::taped) for a segment that need not outlive the call: nothing but variables goes in, and its outputs can
/// be differentiated once, as [`gradients`](super::gradients) does. To ask for gradients again is an error.
///
/// A segment that uses candle's own operations on what is to be differentiated runs a second time, on candle's graph.
///
/// # Errors
/// Those of the segment.
pub(crate) fn taped_once(mut segment: impl FnMut() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    if tape::mode() != Mode::Graph {
        return segment();
    }
    let mut recording = match tape::record(&[], |_| segment()) {
        Err(Error::OffTape { function }) => {
            tracing::debug!("a segment runs again on candle's graph: an operation before `{function}` is no tape's");
            return segment();
        }
        recording => recording?,
    };
    let is_constant = recording.is_constant();
    let outputs = recording.take_outputs();
    if is_constant {
        return Ok(outputs);
    }
    let variables = recording.variables().to_vec();
    let function = TapedOnce {
        variables: variables.clone(),
        outputs: Mutex::new(outputs),
        recording: Mutex::new(Some(recording)),
    };
    apply_many(function, &variables.iter().collect::<Vec<_>>())
}

struct TapedOnce {
    variables: Vec<Tensor>,
    /// The values, until `forward` hands them out.
    outputs: Mutex<Vec<Tensor>>,
    /// The tape, until the backward pass.
    recording: Mutex<Option<Recording>>,
}

fn take<T: Default>(slot: &Mutex<T>) -> T {
    // The slots hold whole values only, so one left by a panicking thread is still good.
    std::mem::take(&mut *slot.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Function for TapedOnce {
    fn name(&self) -> &'static str {
        "taped_once"
    }

    fn forward(&self, _: &[Tensor]) -> Result<Forward> {
        Ok(Forward { outputs: take(&self.outputs).into_iter().map(Output::Tensor).collect(), saved: Vec::new() })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let recording = take(&self.recording)
            .ok_or_else(|| Error::argument("autograd", "backward", "one backward pass", "a second one"))?;
        Ok(recording.backward(context.gradients)?.into_parts(&self.variables).0)
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::autograd::gradients;
    use crate::ops::{Activation, activation, add, linear};
    use crate::random::Address;

    fn variables() -> Result<Vec<Var>> {
        let random = |i: usize| Address::new(3, "once").sample(i).normal((4, 4), DType::F64, &Device::Cpu);
        (0..3).map(|i| Ok(Var::from_tensor(&random(i)?)?)).collect()
    }

    /// Two outputs that share a part; the last variable takes no part in the first.
    fn network(variables: &[Var]) -> Result<Vec<Tensor>> {
        let hidden = activation(&linear(&variables[0], &variables[1], None)?, Activation::Silu)?;
        Ok(vec![linear(&hidden, &variables[0], None)?, add(&hidden, &variables[2])?])
    }

    fn loss(outputs: &[Tensor]) -> Result<Tensor> {
        Ok((outputs[0].sqr()?.sum_all()? + outputs[1].powf(3.0)?.sum_all()?)?)
    }

    #[test]
    fn gradients_equal_those_of_candles_graph() -> Result<()> {
        let variables = variables()?;
        let expected = loss(&network(&variables)?)?.backward()?;
        let found = gradients(|| Ok(Some(loss(&taped_once(|| network(&variables))?)?)))?.unwrap();
        for variable in &variables {
            let (expected, found) = (expected.get(variable).unwrap(), found.get(variable).unwrap());
            assert!((expected - found)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-12);
        }
        Ok(())
    }

    #[test]
    fn a_segment_on_the_tape_runs_once_and_one_with_operations_of_candles_twice() -> Result<()> {
        let variables = variables()?;
        for candles_own in [false, true] {
            let mut runs = 0;
            let store = gradients(|| {
                let outputs = taped_once(|| {
                    runs += 1;
                    let mut outputs = network(&variables)?;
                    if candles_own {
                        outputs[0] = outputs[0].tanh()?;
                    }
                    Ok(outputs)
                })?;
                Ok(Some(loss(&outputs)?))
            })?;
            assert!(store.unwrap().get(&variables[2]).is_some());
            assert_eq!(runs, 1 + usize::from(candles_own));
        }
        Ok(())
    }

    #[test]
    fn a_second_backward_pass_is_an_error() -> Result<()> {
        let variables = variables()?;
        let loss = loss(&taped_once(|| network(&variables))?)?;
        loss.backward()?;
        assert!(loss.backward().unwrap_err().to_string().contains("one backward pass"));
        Ok(())
    }
}

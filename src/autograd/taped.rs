//! Whole networks as one function of candle's graph.

use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;

use super::function::{Backward, Forward, Function, Output, Value, apply_many};
use super::leaves;
use super::tape::{self, Mode, Recording};
use crate::{Error, Result};

/// Runs a network on a [`tape`] where [`gradients`](super::gradients) differentiates it: candle's graph, which adds the
/// first gradient of every tensor to zeros, then has one node for all of it. Elsewhere, and where the network uses
/// operations of candle's own, the same as calling it.
///
/// # Errors
/// Those of the network.
pub(crate) fn taped(inputs: &[&Tensor], network: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    let inputs: Vec<Tensor> = inputs.iter().map(|input| (*input).clone()).collect();
    if tape::mode() != Mode::Graph || !leaves::active() {
        return network(&inputs);
    }
    let recording = match tape::record(&inputs, &network) {
        Err(Error::OffTape { .. }) => return network(&inputs),
        other => other?,
    };
    let variables = recording.variables().to_vec();
    let all: Vec<&Tensor> = inputs.iter().chain(&variables).collect();
    let function = Taped { recording: Mutex::new(Some(recording)), variables: variables.clone() };
    apply_many(function, &all)
}

struct Taped {
    /// Until the backward pass; that of `gradients` is the only one.
    recording: Mutex<Option<Recording>>,
    variables: Vec<Tensor>,
}

impl Function for Taped {
    fn name(&self) -> &'static str {
        "taped"
    }

    fn forward(&self, _: &[Tensor]) -> Result<Forward> {
        let mut recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        let outputs = recording.as_mut().map(Recording::take_outputs).unwrap_or_default();
        Ok(Forward { outputs: outputs.into_iter().map(Output::Tensor).collect(), saved: Vec::new() })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(recording) = recording else {
            return Err(Error::argument("autograd", "backward", "one backward pass", "a second"));
        };
        Ok(recording.backward(context.gradients)?.into_parts(&self.variables).0)
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

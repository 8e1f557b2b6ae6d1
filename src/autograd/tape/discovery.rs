//! The first run of a recomputed segment: no graph, no tape; only the variables that take part, and what is worth
//! keeping.

use std::collections::HashSet;

use candle_core::{Shape, Tensor, TensorId};

use super::frames::{is_on_some_tape, next_kept, with_discovery};
use crate::autograd::function::{self, Forward, Function, Output};
use crate::autograd::tape;
use crate::{Error, Result};

/// The results of one expensive function.
#[derive(Clone)]
pub(in crate::autograd) struct Kept {
    name: &'static str,
    inputs: Vec<Shape>,
    /// Of the kind that candle takes for variables.
    pub outputs: Vec<Tensor>,
    pub saved: Vec<Tensor>,
}

impl Kept {
    /// This, if it is the result of that function for inputs of these shapes.
    pub fn check(self, name: &'static str, inputs: &[Tensor]) -> Result<Self> {
        match self.name == name && self.inputs.iter().eq(inputs.iter().map(Tensor::shape)) {
            true => Ok(self),
            false => Err(Error::argument(
                "recompute",
                "segment",
                format!("one that runs the same operations every time ({} of {:?})", self.name, self.inputs),
                format!("{name} of {:?}", inputs.iter().map(Tensor::shape).collect::<Vec<_>>()),
            )),
        }
    }
}

/// What a first run finds out.
#[derive(Default)]
pub(in crate::autograd) struct Discovery {
    /// The variables, and the tensors of outer tapes, that reached a function; each once.
    pub variables: Vec<Tensor>,
    seen: HashSet<TensorId>,
    /// Whether an operation of candle was used on one of them.
    pub off_tape: bool,
    /// Whether to keep the results of expensive functions.
    pub keeps: bool,
    pub kept: Vec<Kept>,
}

impl Discovery {
    pub fn keeping(keeps: bool) -> Self {
        Discovery { keeps, ..Self::default() }
    }

    /// Takes note of a tensor that reached a function or the end of the segment.
    pub fn see(&mut self, tensor: &Tensor, on_outer_tape: bool) {
        if !tensor.track_op() {
            return;
        }
        if tensor.is_variable() || on_outer_tape {
            if self.seen.insert(tensor.id()) {
                self.variables.push(tensor.clone());
            }
            return;
        }
        self.off_tape = true;
        for node in tensor.sorted_nodes() {
            if node.is_variable() && self.seen.insert(node.id()) {
                self.variables.push(node.clone());
            }
        }
    }
}

/// Takes note of a tensor, and returns it without its graph.
pub(in crate::autograd) fn see(tensor: &Tensor) -> Tensor {
    if tensor.track_op() {
        let on_outer_tape = is_on_some_tape(tensor.id());
        with_discovery(|discovery| discovery.see(tensor, on_outer_tape));
    }
    tensor.detach()
}

/// [`apply_many`](crate::autograd::apply_many) in a discovery.
pub(in crate::autograd) fn discover(function: &dyn Function, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    inputs.iter().for_each(|input| drop(see(input)));
    let detached = function::detach(inputs)?;
    if function.keep() {
        return discover_kept(function, &detached);
    }
    let Forward { outputs, .. } = tape::outside(|| function.forward(&detached))?;
    Ok(outputs.into_iter().map(Output::into_tensor).collect())
}

fn discover_kept(function: &dyn Function, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let kept = match next_kept(function.name(), inputs) {
        Some(kept) => kept?,
        None => {
            let Forward { outputs, saved } = tape::outside(|| function.forward(inputs))?;
            if with_discovery(|discovery| discovery.keeps) != Some(true) {
                return Ok(outputs.into_iter().map(Output::into_tensor).collect());
            }
            let outputs = outputs.into_iter().map(Output::into_tracked).collect::<candle_core::Result<_>>()?;
            let inputs = inputs.iter().map(|input| input.shape().clone()).collect();
            Kept { name: function.name(), inputs, outputs, saved }
        }
    };
    let outputs = kept.outputs.iter().map(Tensor::detach).collect();
    with_discovery(|discovery| {
        if discovery.keeps {
            discovery.kept.push(kept);
        }
    });
    Ok(outputs)
}

//! The first run of a recomputed segment: no graph, no tape; only the variables that take part, what is worth keeping,
//! and what need not be computed again.

use std::collections::HashSet;

use candle_core::{Shape, Tensor, TensorId};

use super::frames::{is_on_some_tape, next_kept, with_discovery};
use super::plan::{Plan, Trace, changed};
use crate::Result;
use crate::autograd::function::{self, Forward, Function, Output, Saves};
use crate::autograd::tape;

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
            false => Err(changed(
                format!("{} of {:?}", self.name, self.inputs),
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
    /// The tensors to be differentiated: inputs, and what functions made of those and of variables. The latter look like
    /// parts of a graph to candle, as they do in the second run.
    known: HashSet<TensorId>,
    /// Whether an operation of candle was used on one of them.
    pub off_tape: bool,
    /// Whether to keep the results of expensive functions.
    keeps: bool,
    pub kept: Vec<Kept>,
    /// The operations, where it is asked for what need not run again.
    trace: Option<Trace>,
    /// Whether a segment inside this one is being run.
    nested: bool,
}

impl Discovery {
    /// `keeps`: the results of expensive functions; `plans`: finds out what need not be computed again.
    pub fn new(keeps: bool, plans: bool) -> Self {
        Discovery { keeps, trace: plans.then(Trace::default), ..Self::default() }
    }

    /// An input of the segment as the first run gets it: without its graph.
    pub fn input(&mut self, input: &Tensor) -> Tensor {
        let detached = input.detach();
        if input.track_op() {
            self.known.insert(detached.id());
        }
        detached
    }

    /// What a second run need not compute.
    pub fn plan(&mut self) -> Option<Plan> {
        self.trace.take()?.plan()
    }

    /// Takes note of a tensor that reached a function or the end of the segment, and returns it without its graph.
    fn see(&mut self, tensor: &Tensor, on_outer_tape: bool) -> Tensor {
        if !tensor.track_op() || self.known.contains(&tensor.id()) {
            return tensor.clone();
        }
        if tensor.is_variable() || on_outer_tape {
            if self.seen.insert(tensor.id()) {
                self.variables.push(tensor.clone());
            }
        } else {
            self.off_tape = true;
            for node in tensor.sorted_nodes() {
                if node.is_variable() && !self.known.contains(&node.id()) && self.seen.insert(node.id()) {
                    self.variables.push(node.clone());
                }
            }
        }
        self.input(tensor)
    }
}

/// Takes note of a tensor, and returns it without its graph (if it is not one that the discovery made).
pub(in crate::autograd) fn see(tensor: &Tensor) -> Tensor {
    let on_outer_tape = tensor.track_op() && is_on_some_tape(tensor.id());
    with_discovery(|discovery| discovery.see(tensor, on_outer_tape)).unwrap_or_else(|| tensor.detach())
}

/// Runs a segment inside the one that is discovered. Its second run is noted as one operation, which no plan foresees,
/// and where it uses operations of candle's that does not take the segment around it off the tape.
pub(in crate::autograd) fn nested<T>(inputs: &[&Tensor], segment: impl FnOnce(&[Tensor]) -> T) -> T {
    let seen = inputs.iter().map(|input| see(input));
    let inputs: Vec<Tensor> =
        seen.map(|input| with_discovery(|discovery| discovery.input(&input)).unwrap_or(input)).collect();
    let around = with_discovery(|discovery| {
        discovery.trace = None;
        std::mem::replace(&mut discovery.nested, true)
    });
    let outputs = segment(&inputs);
    with_discovery(|discovery| discovery.nested = around.unwrap_or(false));
    outputs
}

/// Which of the tensors that were seen are to be differentiated.
fn needs(seen: &[Tensor]) -> Vec<bool> {
    with_discovery(|discovery| seen.iter().map(|tensor| discovery.known.contains(&tensor.id())).collect())
        .unwrap_or_else(|| vec![false; seen.len()])
}

/// Notes an operation.
fn noted(function: &dyn Function, needs: &[bool], saved: Vec<Tensor>, inputs: &[Tensor], outputs: &[Tensor]) {
    with_discovery(|discovery| {
        if needs.contains(&true) {
            discovery.known.extend(outputs.iter().map(Tensor::id));
        }
        if let Some(trace) = &mut discovery.trace {
            let inputs: Vec<_> = inputs.iter().map(|input| (input.id(), input.shape().clone())).collect();
            trace.add(function, needs, saved, &inputs, outputs);
        }
    });
}

/// [`apply_many`](crate::autograd::apply_many) in a discovery.
pub(in crate::autograd) fn discover(function: &dyn Function, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let seen: Vec<Tensor> = inputs.iter().map(|input| see(input)).collect();
    let (needs, detached) = (needs(&seen), function::detach(&seen.iter().collect::<Vec<_>>())?);
    if function.keep() {
        let outputs = discover_kept(function, &detached)?;
        // What is kept, with what it saved, is taken up again whoever reads it.
        noted(function, &needs, Vec::new(), &seen, &outputs);
        return Ok(outputs);
    }
    let Forward { outputs, saved } = tape::outside(|| match function.saves() {
        Saves::Little => function.forward(&detached),
        _ => function.forward_alone(&detached),
    })?;
    let tracks = needs.contains(&true) && with_discovery(|discovery| discovery.nested) == Some(false);
    let outputs = outputs.into_iter().map(|output| match output {
        // Tracked as in the second run; what already is a tensor would have to be copied for that.
        Output::Fresh(..) if tracks => output.into_tracked(),
        output => Ok(output.into_tensor()),
    });
    let outputs = outputs.collect::<candle_core::Result<Vec<_>>>()?;
    noted(function, &needs, saved, &seen, &outputs);
    Ok(outputs)
}

/// The same for views, which candle's own operations make.
pub(in crate::autograd) fn discover_views(
    function: &dyn Function,
    x: &Tensor,
    views: impl FnOnce(&Tensor) -> candle_core::Result<Vec<Tensor>>,
) -> Result<Vec<Tensor>> {
    let x = see(x);
    let (needs, views) = (needs(std::slice::from_ref(&x)), views(&x)?);
    noted(function, &needs, Vec::new(), std::slice::from_ref(&x), &views);
    Ok(views)
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

//! Differentiable functions of any number of tensors, on top of candle's custom operations.
//!
//! candle's `CustomOp1/2/3` take at most three tensors, return one and keep no state. [`apply`] lifts those limits:
//! a [`Function`] takes any number of inputs, returns any number of outputs, keeps what it wants for its backward
//! pass, and computes gradients only for the inputs that need one. An input that is not part of a graph (a frozen
//! weight) is *captured*: it never enters candle's graph and never gets a gradient.
//!
//! How: up to three tracked inputs and one output map to one custom operation. Otherwise the inputs are tied together
//! by a chain of scalar *tokens*, and each output hangs off the last token. In the backward pass candle visits the
//! outputs first, which leave their gradients in a shared slot; then the last token, which runs
//! [`Function::backward`] once; then the other tokens, each of which hands its input the gradient that is its own.

//!
//! All of that is for candle's own graph. Inside a recorded segment ([`tape`](super::tape)) none of it happens: the
//! function is noted on the tape.

mod node;
mod number;
mod operations;
mod output;
#[cfg(test)]
mod tests;
mod view;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::Tensor;

use super::leaves;
use super::tape::{self, Mode};
use crate::{Error, Result};
pub(super) use node::Node;
pub(super) use number::number;
use operations::{Direct, Join, Release, Shared};
pub(crate) use output::dense;
pub use output::{Forward, Output};
pub(crate) use view::{View, apply_views};

/// What [`Function::backward`] gets.
pub struct Backward<'a> {
    /// The inputs as `forward` got them: detached and contiguous. An input that [`Function::uses`] disclaimed has
    /// its shape and dtype, but neither values nor memory.
    pub inputs: &'a [Tensor],
    /// The outputs, whether they are part of the loss or not; `None` for one that [`Function::uses`] disclaimed.
    pub outputs: &'a [Option<Tensor>],
    /// What `forward` saved.
    pub saved: &'a [Tensor],
    /// The gradients of the outputs, contiguous; `None` where an output is no part of the loss.
    pub gradients: &'a [Option<Tensor>],
    /// Which inputs need a gradient; for the others `None` may be returned at no cost.
    pub needs: &'a [bool],
    /// What the inputs have got from elsewhere, until it is taken.
    so_far: Mutex<Vec<Option<Tensor>>>,
}

impl Backward<'_> {
    /// Takes the gradient that an input has got from other functions so far, where there is one: contiguous, and of the
    /// input's shape and dtype. Who takes it has to add it to the gradient that is returned for the input. Others need
    /// not care: what is not taken is added to what they return.
    pub fn take_so_far(&self, input: usize) -> Option<Tensor> {
        // The slots hold whole values only, so one left by a panicking thread is still good.
        self.so_far.lock().unwrap_or_else(PoisonError::into_inner).get_mut(input).and_then(Option::take)
    }

    /// The gradient of the only output of a one-output function.
    ///
    /// # Errors
    /// Where the function has several outputs and the first is no part of the loss.
    pub fn gradient(&self) -> Result<&Tensor> {
        self.gradients
            .first()
            .and_then(Option::as_ref)
            .ok_or_else(|| Error::argument("autograd", "gradients", "a gradient of the first output", "none"))
    }
}

/// A value that an applied function could keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// The input at a position.
    Input(usize),
    /// The output at a position.
    Output(usize),
}

/// How a function comes by what it saves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saves {
    /// In [`Function::forward`], with the outputs; or it saves nothing.
    WithOutputs,
    /// Also by [`Function::save`], from the inputs at these positions.
    Alone(Vec<usize>),
    /// With the outputs, but so little that the first run of a recomputed segment keeps it for the second.
    Little,
}

/// A differentiable function of tensors.
pub trait Function: Send + Sync + 'static {
    /// A short name for error messages.
    fn name(&self) -> &'static str;

    /// Computes the outputs. The inputs are detached from any graph and contiguous.
    ///
    /// # Errors
    /// Where the inputs do not fit.
    fn forward(&self, inputs: &[Tensor]) -> Result<Forward>;

    /// The same where no backward pass will follow on this run: what it saves is not looked at. Worth having where the
    /// outputs alone cost less.
    ///
    /// # Errors
    /// Those of [`Function::forward`].
    fn forward_alone(&self, inputs: &[Tensor]) -> Result<Forward> {
        self.forward(inputs)
    }

    /// Whether what [`Function::forward`] saves can be had without the outputs.
    fn saves(&self) -> Saves {
        Saves::WithOutputs
    }

    /// What [`Function::forward`] saves, where [`Function::saves`] says that it can be had alone. The values of other
    /// inputs than those named there are undefined, and they may not be contiguous.
    ///
    /// # Errors
    /// Those of [`Function::forward`].
    fn save(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(self.forward(inputs)?.saved)
    }

    /// Computes the gradients of the inputs, one entry an input, each of the input's shape; `None` stands for zero.
    ///
    /// # Errors
    /// Where a computation fails.
    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>>;

    /// Whether [`Function::backward`] reads this value, where gradients are wanted for the inputs that `needs` marks.
    /// A tape lets go of what nobody reads: the `x` of a frozen linear layer, both terms of a sum.
    fn uses(&self, value: Value, needs: &[bool]) -> bool {
        let _ = (value, needs);
        true
    }

    /// Whether the function is so expensive that [`recompute_keeping`](super::recompute_keeping) should keep its
    /// outputs (and what it saved) rather than compute them again.
    fn keep(&self) -> bool {
        false
    }
}

/// Applies a function with one output.
///
/// # Errors
/// Those of [`Function::forward`], and where it does not return one output.
pub fn apply(function: impl Function, inputs: &[&Tensor]) -> Result<Tensor> {
    let name = function.name();
    let mut outputs = apply_many(function, inputs)?;
    match (outputs.pop(), outputs.is_empty()) {
        (Some(output), true) => Ok(output),
        _ => Err(Error::argument(name, "outputs", "one output", "another number")),
    }
}

/// Applies a function and returns all its outputs.
///
/// # Errors
/// Those of [`Function::forward`], and [`Error::OffTape`] for an input that a tape could not follow.
pub fn apply_many(function: impl Function, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    match tape::mode() {
        Mode::Graph => apply_in_graph(function, inputs),
        Mode::Discover => tape::discover(&function, inputs),
        Mode::Record => tape::note(Box::new(function), inputs),
    }
}

/// The inputs as a function gets them.
pub(super) fn detach(inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    Ok(inputs.iter().map(|input| input.detach().contiguous()).collect::<candle_core::Result<_>>()?)
}

fn apply_in_graph(function: impl Function, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let needs: Vec<bool> = inputs.iter().map(|input| input.track_op()).collect();
    let detached = detach(inputs)?;
    let Forward { outputs, saved } = match needs.contains(&true) {
        true => function.forward(&detached)?,
        false => function.forward_alone(&detached)?,
    };
    let direct = leaves::active();
    let (leaves, tracked): (Vec<_>, Vec<_>) =
        inputs.iter().enumerate().filter(|(i, _)| needs[*i]).partition(|(_, input)| direct && input.is_variable());
    let leaves: Vec<(usize, Tensor)> = leaves.into_iter().map(|(i, variable)| (i, (*variable).clone())).collect();
    let mut tracked: Vec<(usize, &Tensor)> = tracked.into_iter().map(|(i, input)| (i, *input)).collect();
    let anchor = match (tracked.is_empty(), leaves.first()) {
        (true, None) => return Ok(outputs.into_iter().map(Output::into_tensor).collect()),
        (true, Some((_, variable))) => Some(leaves::anchor(variable.device())?),
        _ => None,
    };
    // The anchor is the input at no position: it gets no gradient.
    tracked.extend(anchor.iter().map(|anchor| (usize::MAX, anchor)));
    let variables = inputs.iter().map(|input| input.is_variable()).collect();
    let node = Node::new(Box::new(function), detached, saved, needs);
    if outputs.len() == 1 && tracked.len() <= 3 {
        let positions = tracked.iter().map(|(i, _)| *i).collect();
        let result = outputs.into_iter().next().map(Output::into_storage).transpose()?;
        let op = Direct { node, variables, leaves, positions, result: Mutex::new(result) };
        let output = match tracked[..] {
            [(_, a)] => a.apply_op1(op)?,
            [(_, a), (_, b)] => a.apply_op2(b, op)?,
            [(_, a), (_, b), (_, c)] => a.apply_op3(b, c, op)?,
            _ => unreachable!("between one and three inputs are tracked here"),
        };
        return Ok(vec![output]);
    }
    tie((node, variables, leaves), &tracked, outputs)
}

/// Makes the chain of tokens and hangs the outputs off its end.
fn tie(
    (node, variables, leaves): (Node, Vec<bool>, Vec<(usize, Tensor)>),
    tracked: &[(usize, &Tensor)],
    outputs: Vec<Output>,
) -> Result<Vec<Tensor>> {
    let shared = Arc::new(Shared {
        node,
        variables,
        leaves,
        outputs: OnceLock::new(),
        gradients: Mutex::new(vec![None; outputs.len()]),
        input_gradients: Mutex::new(Vec::new()),
    });
    let mut token: Option<Tensor> = None;
    let mut rest = tracked;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rest.len().min(if token.is_some() { 2 } else { 3 }));
        let positions = now.iter().map(|(position, _)| *position).collect();
        let join = Join { shared: shared.clone(), continues: token.is_some(), positions, last: later.is_empty() };
        let arguments: Vec<&Tensor> = token.iter().chain(now.iter().map(|(_, input)| *input)).collect();
        token = Some(match arguments[..] {
            [a] => a.apply_op1(join)?,
            [a, b] => a.apply_op2(b, join)?,
            [a, b, c] => a.apply_op3(b, c, join)?,
            _ => unreachable!("one to three arguments by construction"),
        });
        rest = later;
    }
    let Some(token) = token else {
        return Ok(outputs.into_iter().map(Output::into_tensor).collect());
    };
    let release = |(index, output): (usize, Output)| -> Result<Tensor> {
        let result = Mutex::new(Some(output.into_storage()?));
        Ok(token.apply_op1(Release { shared: shared.clone(), index, result })?)
    };
    let outputs = outputs.into_iter().enumerate().map(release).collect::<Result<Vec<_>>>()?;
    // Detached they share their numbers, but do not hold on to the graph that holds on to them.
    let read = |(index, output): (usize, &Tensor)| shared.node.uses_output(index).then(|| output.detach());
    let _ = shared.outputs.set(outputs.iter().enumerate().map(read).collect());
    Ok(outputs)
}

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

mod operations;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use candle_core::op::BackpropOp;
use candle_core::{Shape, Storage, Tensor};

use operations::{Direct, Join, Release, Shared};

use crate::{Error, Result};

/// One value computed by [`Function::forward`].
pub enum Output {
    /// Freshly computed numbers, contiguous, in the order of the shape.
    Fresh(Storage, Shape),
    /// A tensor; its numbers are copied and its graph, if any, is left behind.
    Tensor(Tensor),
}

impl Output {
    /// Numbers computed on the CPU.
    pub fn from_vec<T: candle_core::WithDType>(values: Vec<T>, shape: impl Into<Shape>) -> Self {
        Output::Fresh(Storage::Cpu(T::to_cpu_storage_owned(values)), shape.into())
    }

    fn into_storage(self) -> candle_core::Result<(Storage, Shape)> {
        match self {
            Output::Fresh(storage, shape) => Ok((storage, shape)),
            Output::Tensor(tensor) => {
                // `try_clone` copies a storage whole: copy the tensor first where it is a view of a larger one.
                let tensor = tensor.detach().force_contiguous()?;
                let (storage, layout) = tensor.storage_and_layout();
                Ok((storage.try_clone(layout)?, tensor.shape().clone()))
            }
        }
    }

    fn into_tensor(self) -> Tensor {
        match self {
            Output::Fresh(storage, shape) => Tensor::from_storage(storage, shape, BackpropOp::none(), false),
            Output::Tensor(tensor) => tensor.detach(),
        }
    }
}

/// What [`Function::forward`] returns.
pub struct Forward {
    /// The outputs.
    pub outputs: Vec<Output>,
    /// Tensors the backward pass wants again (statistics, a log-sum-exp).
    pub saved: Vec<Tensor>,
}

impl From<Output> for Forward {
    fn from(output: Output) -> Self {
        Forward { outputs: vec![output], saved: Vec::new() }
    }
}

/// What [`Function::backward`] gets.
pub struct Backward<'a> {
    /// The inputs as `forward` got them: detached and contiguous.
    pub inputs: &'a [Tensor],
    /// The outputs; `None` where an output is no part of the loss (never for the output of a one-output function).
    pub outputs: &'a [Option<Tensor>],
    /// What `forward` saved.
    pub saved: &'a [Tensor],
    /// The gradients of the outputs, contiguous; `None` where an output is no part of the loss.
    pub gradients: &'a [Option<Tensor>],
    /// Which inputs need a gradient; for the others `None` may be returned at no cost.
    pub needs: &'a [bool],
}

impl Backward<'_> {
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

/// A differentiable function of tensors.
pub trait Function: Send + Sync + 'static {
    /// A short name for error messages.
    fn name(&self) -> &'static str;

    /// Computes the outputs. The inputs are detached from any graph and contiguous.
    ///
    /// # Errors
    /// Where the inputs do not fit.
    fn forward(&self, inputs: &[Tensor]) -> Result<Forward>;

    /// Computes the gradients of the inputs, one entry an input, each of the input's shape; `None` stands for zero.
    ///
    /// # Errors
    /// Where a computation fails.
    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>>;
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
/// Those of [`Function::forward`].
pub fn apply_many(function: impl Function, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let needs: Vec<bool> = inputs.iter().map(|input| input.track_op()).collect();
    let detached = inputs.iter().map(|input| input.detach().contiguous()).collect::<candle_core::Result<Vec<_>>>()?;
    let Forward { outputs, saved } = function.forward(&detached)?;
    let tracked: Vec<(usize, &Tensor)> =
        inputs.iter().enumerate().filter(|(i, _)| needs[*i]).map(|(i, input)| (i, *input)).collect();
    if tracked.is_empty() {
        return Ok(outputs.into_iter().map(Output::into_tensor).collect());
    }
    let node = Node { function: Box::new(function), inputs: detached, saved, needs };
    if outputs.len() == 1 && tracked.len() <= 3 {
        let positions = tracked.iter().map(|(i, _)| *i).collect();
        let result = outputs.into_iter().next().map(Output::into_storage).transpose()?;
        let op = Direct { node, positions, result: Mutex::new(result) };
        let output = match tracked[..] {
            [(_, a)] => a.apply_op1(op)?,
            [(_, a), (_, b)] => a.apply_op2(b, op)?,
            [(_, a), (_, b), (_, c)] => a.apply_op3(b, c, op)?,
            _ => unreachable!("between one and three inputs are tracked here"),
        };
        return Ok(vec![output]);
    }
    tie(node, &tracked, outputs)
}

/// Makes the chain of tokens and hangs the outputs off its end.
fn tie(node: Node, tracked: &[(usize, &Tensor)], outputs: Vec<Output>) -> Result<Vec<Tensor>> {
    let shared = Arc::new(Shared {
        node,
        outputs: Mutex::new(vec![None; outputs.len()]),
        gradients: Mutex::new(vec![None; outputs.len()]),
        input_gradients: Mutex::new(Vec::new()),
    });
    let mut token: Option<Tensor> = None;
    for (i, (position, input)) in tracked.iter().enumerate() {
        let join = Join { shared: shared.clone(), position: *position, last: i + 1 == tracked.len() };
        token = Some(match token {
            None => input.apply_op1(join)?,
            Some(token) => token.apply_op2(input, join)?,
        });
    }
    let Some(token) = token else {
        return Ok(outputs.into_iter().map(Output::into_tensor).collect());
    };
    outputs
        .into_iter()
        .enumerate()
        .map(|(index, output)| {
            let result = Mutex::new(Some(output.into_storage()?));
            Ok(token.apply_op1(Release { shared: shared.clone(), index, result })?)
        })
        .collect()
}

/// A function that has been applied, with all its backward pass needs.
struct Node {
    function: Box<dyn Function>,
    inputs: Vec<Tensor>,
    saved: Vec<Tensor>,
    needs: Vec<bool>,
}

impl Node {
    /// The gradients of all inputs; never `None` for an input that needs one, which candle could not bear.
    fn backward(&self, outputs: &[Option<Tensor>], gradients: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let gradients = gradients
            .iter()
            .map(|gradient| gradient.as_ref().map(Tensor::contiguous).transpose())
            .collect::<candle_core::Result<Vec<_>>>()?;
        let context =
            Backward { inputs: &self.inputs, outputs, saved: &self.saved, gradients: &gradients, needs: &self.needs };
        let mut computed = self.function.backward(&context)?;
        computed.resize(self.inputs.len(), None);
        for ((gradient, input), needed) in computed.iter_mut().zip(&self.inputs).zip(&self.needs) {
            match gradient {
                _ if !needed => *gradient = None,
                None => *gradient = Some(input.zeros_like()?),
                Some(given) if given.shape() != input.shape() => {
                    return Err(Error::argument(
                        self.function.name(),
                        "gradient",
                        format!("shape {:?}", input.dims()),
                        format!("shape {:?}", given.dims()),
                    ));
                }
                Some(_) => {}
            }
        }
        Ok(computed)
    }
}

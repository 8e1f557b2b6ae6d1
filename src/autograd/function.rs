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

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Shape, Storage, Tensor};

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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The slots hold whole values only, so one left by a panicking thread is still good.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Slot = Mutex<Option<(Storage, Shape)>>;

fn take_cpu(slot: &Slot, name: &'static str) -> candle_core::Result<(CpuStorage, Shape)> {
    match lock(slot).take() {
        Some((Storage::Cpu(storage), shape)) => Ok((storage, shape)),
        _ => Err(candle_core::Error::Msg(format!("{name}: the result does not lie on the CPU as the input does"))),
    }
}

fn take_cuda(slot: &Slot, name: &'static str) -> candle_core::Result<(CudaStorage, Shape)> {
    match lock(slot).take() {
        Some((Storage::Cuda(storage), shape)) => Ok((storage, shape)),
        _ => Err(candle_core::Error::Msg(format!("{name}: the result does not lie on the GPU as the input does"))),
    }
}

/// A function with one output and one to three tracked inputs: one custom operation.
struct Direct {
    node: Node,
    positions: Vec<usize>,
    result: Slot,
}

impl Direct {
    fn gradients(&self, result: &Tensor, gradient: &Tensor) -> candle_core::Result<Vec<Option<Tensor>>> {
        let mut all = self.node.backward(&[Some(result.detach())], &[Some(gradient.clone())])?;
        Ok(self.positions.iter().map(|position| all[*position].take()).collect())
    }
}

impl CustomOp1 for Direct {
    fn name(&self) -> &'static str {
        self.node.function.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        take_cpu(&self.result, self.node.function.name())
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        take_cuda(&self.result, self.node.function.name())
    }
    fn bwd(&self, _: &Tensor, result: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(self.gradients(result, gradient)?[0].take())
    }
}

impl CustomOp2 for Direct {
    fn name(&self) -> &'static str {
        self.node.function.name()
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        take_cpu(&self.result, self.node.function.name())
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        take_cuda(&self.result, self.node.function.name())
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut all = self.gradients(result, gradient)?;
        Ok((all[0].take(), all[1].take()))
    }
}

impl CustomOp3 for Direct {
    fn name(&self) -> &'static str {
        self.node.function.name()
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        take_cpu(&self.result, self.node.function.name())
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        take_cuda(&self.result, self.node.function.name())
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut all = self.gradients(result, gradient)?;
        Ok((all[0].take(), all[1].take(), all[2].take()))
    }
}

/// What the tokens and outputs of one applied function share.
struct Shared {
    node: Node,
    outputs: Mutex<Vec<Option<Tensor>>>,
    gradients: Mutex<Vec<Option<Tensor>>>,
    input_gradients: Mutex<Vec<Option<Tensor>>>,
}

/// Ties one more input to the token. The last one to be tied is the first to be visited in the backward pass, after
/// all outputs: it runs the function's backward pass for all.
struct Join {
    shared: Arc<Shared>,
    position: usize,
    last: bool,
}

impl Join {
    fn gradient(&self) -> candle_core::Result<Option<Tensor>> {
        if self.last {
            let count = self.shared.node.inputs.len();
            let outputs = std::mem::take(&mut *lock(&self.shared.outputs));
            let gradients = std::mem::take(&mut *lock(&self.shared.gradients));
            // The slots are left empty but of the right length: the same graph may be walked again.
            *lock(&self.shared.outputs) = vec![None; outputs.len()];
            *lock(&self.shared.gradients) = vec![None; gradients.len()];
            let computed = self.shared.node.backward(&outputs, &gradients)?;
            debug_assert_eq!(computed.len(), count);
            *lock(&self.shared.input_gradients) = computed;
        }
        Ok(lock(&self.shared.input_gradients).get_mut(self.position).and_then(Option::take))
    }
}

fn scalar_cpu() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), Shape::from(()))
}

fn scalar_cuda(storage: &CudaStorage) -> candle_core::Result<(CudaStorage, Shape)> {
    let shape = Shape::from(());
    Ok((storage.device().zeros_impl(&shape, DType::F32)?, shape))
}

impl CustomOp1 for Join {
    fn name(&self) -> &'static str {
        self.shared.node.function.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(scalar_cpu())
    }
    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        scalar_cuda(storage)
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.gradient()
    }
}

impl CustomOp2 for Join {
    fn name(&self) -> &'static str {
        self.shared.node.function.name()
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(scalar_cpu())
    }
    fn cuda_fwd(
        &self,
        storage: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        scalar_cuda(storage)
    }
    fn bwd(
        &self,
        token: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = self.gradient()?;
        Ok((Some(token.zeros_like()?), gradient))
    }
}

/// One output of a tied function.
struct Release {
    shared: Arc<Shared>,
    index: usize,
    result: Slot,
}

impl CustomOp1 for Release {
    fn name(&self) -> &'static str {
        self.shared.node.function.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        take_cpu(&self.result, self.shared.node.function.name())
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        take_cuda(&self.result, self.shared.node.function.name())
    }
    fn bwd(&self, token: &Tensor, result: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        lock(&self.shared.outputs)[self.index] = Some(result.detach());
        lock(&self.shared.gradients)[self.index] = Some(gradient.clone());
        Ok(Some(token.zeros_like()?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// `(a*b + c*d, a - d)`: four inputs, two outputs.
    struct Pair;

    impl Function for Pair {
        fn name(&self) -> &'static str {
            "pair"
        }
        fn forward(&self, x: &[Tensor]) -> Result<Forward> {
            let first = ((&x[0] * &x[1])? + (&x[2] * &x[3])?)?;
            let second = (&x[0] - &x[3])?;
            Ok(Forward { outputs: vec![Output::Tensor(first), Output::Tensor(second)], saved: vec![] })
        }
        fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
            assert!(!context.needs[1], "b is frozen in this test");
            let x = context.inputs;
            let zero = x[0].zeros_like()?;
            let g1 = context.gradients[0].as_ref().unwrap_or(&zero);
            let g2 = context.gradients[1].as_ref().unwrap_or(&zero);
            Ok(vec![Some(((g1 * &x[1])? + g2)?), None, Some((g1 * &x[3])?), Some(((g1 * &x[2])? - g2)?)])
        }
    }

    fn variable(value: f64) -> Result<Var> {
        Ok(Var::new(&[value], &Device::Cpu)?)
    }

    fn value(tensor: &Tensor) -> Result<f64> {
        Ok(tensor.sum_all()?.to_scalar()?)
    }

    #[test]
    fn several_inputs_and_outputs_get_their_own_gradients_and_frozen_ones_none() -> Result<()> {
        let (a, c, d) = (variable(2.)?, variable(5.)?, variable(7.)?);
        let b = Tensor::new(&[3f64], &Device::Cpu)?;
        let outputs = apply_many(Pair, &[a.as_tensor(), &b, c.as_tensor(), d.as_tensor()])?;
        assert_eq!((value(&outputs[0])?, value(&outputs[1])?), (41., -5.));
        // The same graph walked for both outputs, for one and for the other.
        let both = (&outputs[0] + (&outputs[1] * 10.)?)?.backward()?;
        let first = outputs[0].backward()?;
        let second = outputs[1].backward()?;
        let gradient = |store: &candle_core::backprop::GradStore, x: &Var| value(store.get(x).unwrap());
        assert_eq!((gradient(&both, &a)?, gradient(&both, &c)?, gradient(&both, &d)?), (13., 7., -5.));
        assert_eq!((gradient(&first, &a)?, gradient(&first, &c)?, gradient(&first, &d)?), (3., 7., 5.));
        assert_eq!((gradient(&second, &a)?, gradient(&second, &c)?, gradient(&second, &d)?), (1., 0., -1.));
        assert!(both.get(&b).is_none());
        Ok(())
    }

    #[test]
    fn without_a_tracked_input_there_is_no_graph() -> Result<()> {
        let x = Tensor::new(&[1f64], &Device::Cpu)?;
        let outputs = apply_many(Pair, &[&x, &x, &x, &x])?;
        assert!(outputs.iter().all(|output| !output.track_op()));
        Ok(())
    }
}

//! The custom operations of candle that an applied function consists of.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Shape, Storage, Tensor};

use super::Node;
use crate::autograd::leaves;

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
pub(super) struct Direct {
    pub node: Node,
    /// Which inputs are variables.
    pub variables: Vec<bool>,
    /// The inputs whose gradients go past the graph, with their positions.
    pub leaves: Vec<(usize, Tensor)>,
    pub positions: Vec<usize>,
    pub result: Slot,
}

impl Direct {
    fn gradients(&self, result: &Tensor, gradient: &Tensor) -> candle_core::Result<Vec<Option<Tensor>>> {
        let (outputs, gradients) = ([self.node.uses_output(0).then(|| result.detach())], [Some(gradient.clone())]);
        let mut all = self.node.backward_with_zeros(&self.variables, &outputs, &gradients)?;
        leaves::take(&self.leaves, &mut all)?;
        Ok(self.positions.iter().map(|position| all.get_mut(*position).and_then(Option::take)).collect())
    }
}

impl CustomOp1 for Direct {
    fn name(&self) -> &'static str {
        self.node.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        take_cpu(&self.result, self.node.name())
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        take_cuda(&self.result, self.node.name())
    }
    fn bwd(&self, _: &Tensor, result: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(self.gradients(result, gradient)?[0].take())
    }
}

impl CustomOp2 for Direct {
    fn name(&self) -> &'static str {
        self.node.name()
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        take_cpu(&self.result, self.node.name())
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        take_cuda(&self.result, self.node.name())
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
        self.node.name()
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
        take_cpu(&self.result, self.node.name())
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
        take_cuda(&self.result, self.node.name())
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
pub(super) struct Shared {
    pub node: Node,
    /// Which inputs are variables.
    pub variables: Vec<bool>,
    /// The inputs whose gradients go past the graph, with their positions.
    pub leaves: Vec<(usize, Tensor)>,
    /// The outputs that the backward pass reads, set once they are there.
    pub outputs: OnceLock<Vec<Option<Tensor>>>,
    pub gradients: Mutex<Vec<Option<Tensor>>>,
    pub input_gradients: Mutex<Vec<Option<Tensor>>>,
}

/// Ties up to two more inputs to the token (the first: up to three inputs to a new one). The last one to be tied is the
/// first to be visited in the backward pass, after all outputs: it runs the function's backward pass for all.
pub(super) struct Join {
    pub shared: Arc<Shared>,
    /// Whether the first argument is the token so far.
    pub continues: bool,
    /// Of the inputs that are the other arguments.
    pub positions: Vec<usize>,
    pub last: bool,
}

impl Join {
    /// The gradients of the arguments; the token's is any number, for nobody reads it.
    fn gradients(&self, first: &Tensor) -> candle_core::Result<[Option<Tensor>; 3]> {
        if self.last {
            let gradients = std::mem::take(&mut *lock(&self.shared.gradients));
            // The slots are left empty but of the right length: the same graph may be walked again.
            *lock(&self.shared.gradients) = vec![None; gradients.len()];
            let outputs = self.shared.outputs.get().map_or(&[][..], Vec::as_slice);
            let mut computed = self.shared.node.backward_with_zeros(&self.shared.variables, outputs, &gradients)?;
            leaves::take(&self.shared.leaves, &mut computed)?;
            *lock(&self.shared.input_gradients) = computed;
        }
        let mut computed = lock(&self.shared.input_gradients);
        let mut arguments = [None, None, None];
        let token = self.continues.then(|| Some(first.detach()));
        let inputs = self.positions.iter().map(|position| computed.get_mut(*position).and_then(Option::take));
        arguments.iter_mut().zip(token.into_iter().chain(inputs)).for_each(|(argument, value)| *argument = value);
        Ok(arguments)
    }
}

fn scalar_cpu() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), Shape::from(()))
}

fn scalar_cuda(storage: &CudaStorage) -> candle_core::Result<(CudaStorage, Shape)> {
    let shape = Shape::from(());
    // SAFETY: the number of a token is added to others of its kind, and never looked at.
    let scalar = unsafe { storage.device().alloc_uninit(&shape, DType::F32)? };
    Ok((scalar, shape))
}

impl CustomOp1 for Join {
    fn name(&self) -> &'static str {
        self.shared.node.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(scalar_cpu())
    }
    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        scalar_cuda(storage)
    }
    fn bwd(&self, first: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let [first, ..] = self.gradients(first)?;
        Ok(first)
    }
}

impl CustomOp2 for Join {
    fn name(&self) -> &'static str {
        self.shared.node.name()
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
        first: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [first, second, _] = self.gradients(first)?;
        Ok((first, second))
    }
}

impl CustomOp3 for Join {
    fn name(&self) -> &'static str {
        self.shared.node.name()
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
        Ok(scalar_cpu())
    }
    fn cuda_fwd(
        &self,
        storage: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        scalar_cuda(storage)
    }
    fn bwd(
        &self,
        first: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [first, second, third] = self.gradients(first)?;
        Ok((first, second, third))
    }
}

/// One output of a tied function.
pub(super) struct Release {
    pub shared: Arc<Shared>,
    pub index: usize,
    pub result: Slot,
}

impl CustomOp1 for Release {
    fn name(&self) -> &'static str {
        self.shared.node.name()
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        take_cpu(&self.result, self.shared.node.name())
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        take_cuda(&self.result, self.shared.node.name())
    }
    fn bwd(&self, token: &Tensor, _: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        lock(&self.shared.gradients)[self.index] = Some(gradient.clone());
        Ok(Some(token.detach()))
    }
}

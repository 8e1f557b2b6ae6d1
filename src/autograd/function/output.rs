//! What a function computes.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{Layout, Shape, Storage, Tensor};

/// One value computed by [`Function::forward`](super::Function::forward).
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

    pub(super) fn into_storage(self) -> candle_core::Result<(Storage, Shape)> {
        match self {
            Output::Fresh(storage, shape) => Ok((storage, shape)),
            Output::Tensor(tensor) => {
                let (storage, layout) = tensor.storage_and_layout();
                Ok((dense(&storage, layout)?, layout.shape().clone()))
            }
        }
    }

    pub(crate) fn into_tensor(self) -> Tensor {
        match self {
            Output::Fresh(storage, shape) => Tensor::from_storage(storage, shape, BackpropOp::none(), false),
            Output::Tensor(tensor) => tensor.detach(),
        }
    }

    /// A tensor that candle takes for a variable: whatever an operation of candle makes of it is part of a graph, so a
    /// tape can tell that it was passed by. Numbers freshly computed are moved in; a tensor's are copied.
    pub(in crate::autograd) fn into_tracked(self) -> candle_core::Result<Tensor> {
        let (storage, shape) = self.into_storage()?;
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), true))
    }
}

/// What [`Function::forward`](super::Function::forward) returns.
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

/// A copy of the part of a storage that a layout describes, contiguous.
pub(crate) fn dense(storage: &Storage, layout: &Layout) -> candle_core::Result<Storage> {
    match storage {
        Storage::Cpu(storage) => Ok(Storage::Cpu(dense_on(storage, layout)?)),
        Storage::Cuda(storage) => Ok(Storage::Cuda(dense_on(storage, layout)?)),
        other => other.try_clone(layout),
    }
}

fn dense_on<S>(storage: &S, layout: &Layout) -> candle_core::Result<S>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    // SAFETY: the copy below writes every element before anything reads one.
    let mut copy = unsafe { storage.device().alloc_uninit(layout.shape(), storage.dtype())? };
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok(copy)
}

//! candle's elementwise operations on storages, where they yield numbers that an output takes over without a copy.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, Storage, Tensor, op};

use crate::autograd::Output;
use crate::{Error, Result};

fn mixed(operation: &'static str) -> Error {
    Error::argument(operation, "device", "all arguments on one CPU or CUDA device", "another, or several")
}

/// `a + b`, where `layout` reads `b` in the shape of `a`.
pub(super) fn add(operation: &'static str, a: &Tensor, b: &Tensor, layout: &Layout) -> Result<Output> {
    let ((a_storage, a_layout), (b_storage, _)) = (a.storage_and_layout(), b.storage_and_layout());
    let sum = match (&*a_storage, &*b_storage) {
        (Storage::Cpu(a), Storage::Cpu(b)) => Storage::Cpu(a.binary_impl::<op::Add>(b, a_layout, layout)?),
        (Storage::Cuda(a), Storage::Cuda(b)) => Storage::Cuda(a.binary_impl::<op::Add>(b, a_layout, layout)?),
        _ => return Err(mixed(operation)),
    };
    Ok(Output::Fresh(sum, a.shape().clone()))
}

/// `x * factor`.
pub(super) fn scale(operation: &'static str, x: &Tensor, factor: f64) -> Result<Output> {
    let (storage, layout) = x.storage_and_layout();
    let scaled = match &*storage {
        Storage::Cpu(storage) => Storage::Cpu(storage.affine(layout, factor, 0.0)?),
        Storage::Cuda(storage) => Storage::Cuda(storage.affine(layout, factor, 0.0)?),
        _ => return Err(mixed(operation)),
    };
    Ok(Output::Fresh(scaled, x.shape().clone()))
}

/// `x` in another dtype.
pub(super) fn cast(operation: &'static str, x: &Tensor, dtype: DType) -> Result<Output> {
    let (storage, layout) = x.storage_and_layout();
    let cast = match &*storage {
        Storage::Cpu(storage) => Storage::Cpu(storage.to_dtype(layout, dtype)?),
        Storage::Cuda(storage) => Storage::Cuda(storage.to_dtype(layout, dtype)?),
        _ => return Err(mixed(operation)),
    };
    Ok(Output::Fresh(cast, x.shape().clone()))
}

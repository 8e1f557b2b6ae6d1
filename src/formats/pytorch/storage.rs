//! How a pickle describes tensors: a storage, and a view of it.

use super::super::info::{StoredDtype, TensorInfo};

/// A storage: the numbers of one or more tensors.
#[derive(Clone, Debug)]
pub(super) struct StorageRecord {
    /// The member of the archive, in its folder `data`.
    pub key: String,
    pub dtype: StoredDtype,
    pub elements: usize,
}

/// A tensor: a view of a storage.
#[derive(Clone, Debug)]
pub(super) struct TensorRecord {
    pub storage: StorageRecord,
    /// In numbers.
    pub offset: usize,
    pub info: TensorInfo,
    /// In numbers.
    pub strides: Vec<usize>,
}

/// The number type of a storage class (`torch.FloatStorage`).
pub(super) fn storage_dtype(class: &str) -> Option<StoredDtype> {
    Some(match class {
        "DoubleStorage" => StoredDtype::F64,
        "FloatStorage" => StoredDtype::F32,
        "HalfStorage" => StoredDtype::F16,
        "BFloat16Storage" => StoredDtype::BF16,
        "LongStorage" => StoredDtype::I64,
        "IntStorage" => StoredDtype::I32,
        "ShortStorage" => StoredDtype::I16,
        "CharStorage" => StoredDtype::I8,
        "ByteStorage" => StoredDtype::U8,
        "BoolStorage" => StoredDtype::Bool,
        _ => return None,
    })
}

/// The storage class of a number type.
pub(super) fn storage_class(dtype: StoredDtype) -> Option<&'static str> {
    Some(match dtype {
        StoredDtype::F64 => "DoubleStorage",
        StoredDtype::F32 => "FloatStorage",
        StoredDtype::F16 => "HalfStorage",
        StoredDtype::BF16 => "BFloat16Storage",
        StoredDtype::I64 => "LongStorage",
        StoredDtype::I32 => "IntStorage",
        StoredDtype::I16 => "ShortStorage",
        StoredDtype::I8 => "CharStorage",
        StoredDtype::U8 => "ByteStorage",
        StoredDtype::Bool => "BoolStorage",
        StoredDtype::Other(_) => return None,
    })
}

/// The strides of a tensor that lies in order.
pub(super) fn contiguous_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1].max(1);
    }
    strides
}

/// Whether a tensor's numbers lie in order; the strides of dimensions of length one do not matter.
pub(super) fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    for (length, stride) in shape.iter().zip(strides).rev() {
        if *length > 1 && *stride != expected {
            return false;
        }
        expected *= (*length).max(1);
    }
    true
}

/// How far behind the first number the last one lies; `None` where that is absurd.
pub(super) fn reach(shape: &[usize], strides: &[usize]) -> Option<usize> {
    shape
        .iter()
        .zip(strides)
        .try_fold(0usize, |reach, (length, stride)| reach.checked_add(length.saturating_sub(1).checked_mul(*stride)?))
}

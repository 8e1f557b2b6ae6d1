//! What the CPU halves of the operations share: access to values, dispatch on the dtype, matrix products.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Deref;

use candle_core::{Device, Storage, StorageRef, Tensor, WithDType};
use rayon::prelude::*;

use super::vector;
use crate::{Error, Result};

/// The floating-point types the operations compute in on the CPU.
pub(crate) trait Real:
    WithDType
    + Send
    + Sync
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
    + std::ops::Neg<Output = Self>
    + std::iter::Sum
    + PartialOrd
{
    fn of(value: f64) -> Self;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    /// The normal distribution function.
    fn normal_distribution(self) -> Self;
    fn max(self, other: Self) -> Self;
}

macro_rules! real {
    ($type:ty, $exp:path, $normal_distribution:path) => {
        impl Real for $type {
            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                <$type>::ln(self)
            }
            #[inline(always)]
            fn normal_distribution(self) -> Self {
                $normal_distribution(self)
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                <$type>::max(self, other)
            }
        }
    };
}
real!(f32, vector::exp, vector::normal_distribution);
real!(f64, f64::exp, normal_distribution);

fn normal_distribution(x: f64) -> f64 {
    0.5 * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))
}

/// Runs `$body` with `$real` standing for the Rust type of a tensor's dtype; a typed error for other dtypes.
macro_rules! dispatch {
    ($operation:expr, $tensor:expr, $real:ident => $body:expr) => {
        match $tensor.dtype() {
            candle_core::DType::F32 => {
                type $real = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $real = f64;
                $body
            }
            other => Err($crate::Error::argument($operation, "dtype", "f32 or f64 on the CPU", format!("{other:?}"))),
        }
    };
}
pub(crate) use dispatch;

/// Returns `$body`, the CUDA half of an operation, where its first tensor lies on a GPU.
macro_rules! on_cuda {
    ($tensor:expr => $body:expr) => {
        #[cfg(feature = "cuda")]
        if $tensor.device().is_cuda() {
            return $body;
        }
    };
}
pub(crate) use on_cuda;

/// The numbers of a contiguous CPU tensor, as a slice.
pub(crate) struct Values<'a, T> {
    storage: StorageRef<'a>,
    start: usize,
    length: usize,
    kind: PhantomData<T>,
}

impl<T: Real> Deref for Values<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match &*self.storage {
            // `values` has checked the device and the dtype, and a storage never changes either.
            Storage::Cpu(storage) => match storage.as_slice::<T>() {
                Ok(slice) => &slice[self.start..self.start + self.length],
                Err(_) => &[],
            },
            _ => &[],
        }
    }
}

/// Borrows the numbers of a contiguous CPU tensor of the dtype `T`.
pub(crate) fn values<'a, T: Real>(operation: &'static str, tensor: &'a Tensor) -> Result<Values<'a, T>> {
    if !matches!(tensor.device(), Device::Cpu) {
        return Err(Error::argument(operation, "device", "the CPU", "a GPU, for which there is no kernel yet"));
    }
    if tensor.dtype() != T::DTYPE {
        return Err(Error::argument(
            operation,
            "dtype",
            format!("{:?}, as the first argument", T::DTYPE),
            format!("{:?}", tensor.dtype()),
        ));
    }
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::argument(operation, "layout", "contiguous", format!("strides {:?}", layout.stride())));
    };
    Ok(Values { storage, start, length: end - start, kind: PhantomData })
}

/// A dense tensor on the CPU from computed numbers.
pub(crate) fn tensor<T: Real>(values: Vec<T>, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?)
}

/// Numbers that are a task of their own where memory is filled.
const FILLED: usize = 64 << 10;

/// Numbers computed in parallel, a chunk at a time: `compute` gets the chunk's place in their order, and the chunk, which
/// is zero and in the cache.
pub(crate) fn computed<T: Real>(length: usize, chunk: usize, compute: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    let mut numbers: Vec<T> = Vec::with_capacity(length);
    let spare = &mut numbers.spare_capacity_mut()[..length];
    spare.par_chunks_mut(chunk.max(1)).enumerate().for_each(|(index, part)| {
        part.fill(MaybeUninit::new(T::of(0.0)));
        // SAFETY: all of the chunk has just been written; a `MaybeUninit` has the layout of what it holds.
        let part = unsafe { &mut *(std::ptr::from_mut(part) as *mut [T]) };
        compute(index, part);
    });
    // SAFETY: the chunks, all of which were written, make up the first `length` elements.
    unsafe { numbers.set_len(length) };
    numbers
}

/// Zeros, written in parallel.
pub(crate) fn zeros<T: Real>(length: usize) -> Vec<T> {
    computed(length, FILLED, |_, _| {})
}

/// Whether arguments of an operation share dtype and device, as they must.
pub(crate) fn same_kind(operation: &'static str, first: &Tensor, argument: &'static str, other: &Tensor) -> Result<()> {
    let kind = |t: &Tensor| (t.dtype(), t.device().location());
    if kind(first) != kind(other) {
        return Err(Error::argument(
            operation,
            argument,
            format!("{:?}, as the first argument", kind(first)),
            format!("{:?}", kind(other)),
        ));
    }
    Ok(())
}

/// A matrix in a slice: element `(row, column)` lies at `row * row_stride + column * column_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    pub values: &'a [T],
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// Rows one after the other.
    pub fn row_major(values: &'a [T], rows: usize, columns: usize) -> Self {
        Matrix { values, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// Rows `row_stride` apart, the columns of a row adjacent.
    pub fn strided(values: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        Matrix { values, rows, columns, row_stride, column_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn extent(&self) -> usize {
        if self.rows == 0 || self.columns == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}

/// Whether a product may use several threads. Use `No` inside a rayon loop that is parallel already.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Threads {
    All,
    No,
}

/// `destination = destination * keep + scale * left . right`, where `keep` is 0 or 1 and `destination` has rows
/// `row_stride` apart.
#[allow(clippy::too_many_arguments)] // the arguments of BLAS gemm
pub(crate) fn matmul<T: Real>(
    destination: &mut [T],
    row_stride: usize,
    keep: bool,
    left: Matrix<'_, T>,
    right: Matrix<'_, T>,
    scale: T,
    threads: Threads,
) {
    let (m, k, n) = (left.rows, left.columns, right.columns);
    // These are invariants of the callers in this crate, checked because the product below reads through pointers.
    assert_eq!(k, right.rows, "inner dimensions of a matrix product");
    assert!(left.extent() <= left.values.len() && right.extent() <= right.values.len(), "matrix exceeds its slice");
    assert!(m == 0 || n == 0 || (m - 1) * row_stride + n <= destination.len(), "product exceeds its slice");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !keep {
            for row in 0..m {
                destination[row * row_stride..row * row_stride + n].fill(T::of(0.0));
            }
        }
        return;
    }
    let parallelism = match threads {
        Threads::All => gemm::Parallelism::Rayon(rayon::current_num_threads()),
        Threads::No => gemm::Parallelism::None,
    };
    // SAFETY: the asserts above bound every element that `gemm` reads or writes by the slices' lengths, the
    // destination is borrowed mutably and so overlaps neither operand, and `T` is f32 or f64, which `gemm` supports.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            destination.as_mut_ptr(),
            1,
            row_stride as isize,
            keep,
            left.values.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.values.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            T::of(1.0),
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

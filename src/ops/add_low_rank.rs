//! A weight plus a low-rank product, on the CPU.

use candle_core::Tensor;

use super::support::{Matrix, Real, Threads, dispatch, matmul, same_kind, tensor, values};
use crate::Result;

/// `weight + scale * up . down` for frozen tensors on the CPU: `weight` `(out, ...)`, `up` `(out, rank)` and `down`
/// `(rank, ...)`, where both `...` have the same number of elements. Not differentiable.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) where dtypes or devices differ.
pub(crate) fn add_low_rank(weight: &Tensor, up: &Tensor, down: &Tensor, scale: f64) -> Result<Tensor> {
    fn run<T: Real>(weight: &Tensor, up: &Tensor, down: &Tensor, scale: f64) -> Result<Tensor> {
        let (out, rank) = (weight.dims()[0], down.dims()[0]);
        let mut sum = values::<T>("add_low_rank", weight)?.to_vec();
        let (ups, downs) = (values::<T>("add_low_rank", up)?, values::<T>("add_low_rank", down)?);
        let width = sum.len() / out.max(1);
        let (up, down) = (Matrix::row_major(&ups, out, rank), Matrix::row_major(&downs, rank, width));
        matmul(&mut sum, width, true, up, down, T::of(scale), Threads::All);
        tensor(sum, weight.dims())
    }
    same_kind("add_low_rank", weight, "up", up)?;
    same_kind("add_low_rank", weight, "down", down)?;
    dispatch!("add_low_rank", weight, T => run::<T>(weight, up, down, scale))
}

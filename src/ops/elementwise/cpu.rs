//! Sums and multiples on the CPU.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::autograd::Output;
use crate::ops::support::{Real, dispatch, values};
use crate::ops::vector::vectorised;

/// Numbers that are one task: less is not worth one.
const CHUNK: usize = 32 << 10;

/// Whether a tensor is one for the functions below.
pub(super) fn takes(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), candle_core::DType::F32 | candle_core::DType::F64)
}

/// `a + beta * b` of contiguous tensors of one shape.
pub(super) fn add_scaled(a: &Tensor, b: &Tensor, beta: f64) -> Result<Output> {
    fn run<T: Real>(a: &Tensor, b: &Tensor, beta: f64) -> Result<Output> {
        let bs = values::<T>("add", b)?;
        let mut sum = values::<T>("add", a)?.to_vec();
        sum.par_chunks_mut(CHUNK).zip(bs.par_chunks(CHUNK)).for_each(|(sum, b)| add_multiple(sum, b, T::of(beta)));
        Ok(Output::from_vec(sum, a.shape().clone()))
    }
    dispatch!("add", a, T => run::<T>(a, b, beta))
}

/// `x * factor` of a contiguous tensor.
pub(super) fn scale(x: &Tensor, factor: f64) -> Result<Output> {
    fn run<T: Real>(x: &Tensor, factor: f64) -> Result<Output> {
        let mut y = values::<T>("scale", x)?.to_vec();
        y.par_chunks_mut(CHUNK).for_each(|y| multiply(y, T::of(factor)));
        Ok(Output::from_vec(y, x.shape().clone()))
    }
    dispatch!("scale", x, T => run::<T>(x, factor))
}

vectorised! {
    fn add_multiple<T: Real>(sum: &mut [T], b: &[T], beta: T) {
        if beta == T::of(1.0) {
            sum.iter_mut().zip(b).for_each(|(sum, b)| *sum += *b);
        } else {
            sum.iter_mut().zip(b).for_each(|(sum, b)| *sum += *b * beta);
        }
    }

    fn multiply<T: Real>(xs: &mut [T], factor: T) {
        xs.iter_mut().for_each(|x| *x *= factor);
    }
}

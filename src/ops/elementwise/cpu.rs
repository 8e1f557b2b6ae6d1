//! Sums and multiples on the CPU.

use candle_core::Tensor;

use crate::Result;
use crate::autograd::Output;
use crate::ops::support::{Real, computed, dispatch, values};
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
        let (xs, ys) = (values::<T>("add", a)?, values::<T>("add", b)?);
        let (xs, ys): (&[T], &[T]) = (&xs, &ys);
        let sum = computed(xs.len(), CHUNK, |index, sum| {
            sum.copy_from_slice(&xs[index * CHUNK..][..sum.len()]);
            add_multiple(sum, &ys[index * CHUNK..], T::of(beta));
        });
        Ok(Output::from_vec(sum, a.shape().clone()))
    }
    dispatch!("add", a, T => run::<T>(a, b, beta))
}

/// `x * factor` of a contiguous tensor.
pub(super) fn scale(x: &Tensor, factor: f64) -> Result<Output> {
    fn run<T: Real>(x: &Tensor, factor: f64) -> Result<Output> {
        let xs = values::<T>("scale", x)?;
        let xs: &[T] = &xs;
        let y = computed(xs.len(), CHUNK, |index, y| {
            y.copy_from_slice(&xs[index * CHUNK..][..y.len()]);
            multiply(y, T::of(factor));
        });
        Ok(Output::from_vec(y, x.shape().clone()))
    }
    dispatch!("scale", x, T => run::<T>(x, factor))
}

/// Rows of so many channels that are one task.
fn rows(channels: usize) -> usize {
    (CHUNK / channels.max(1)).max(1)
}

/// The channels of `a`, then those of `b`, for contiguous tensors that differ in their number only.
pub(super) fn concat(a: &Tensor, b: &Tensor, widths: [usize; 2], shape: &[usize]) -> Result<Output> {
    fn run<T: Real>(a: &Tensor, b: &Tensor, [left, right]: [usize; 2], shape: &[usize]) -> Result<Output> {
        let (xs, ys) = (values::<T>("concat_channels", a)?, values::<T>("concat_channels", b)?);
        let (xs, ys): (&[T], &[T]) = (&xs, &ys);
        let (total, rows) = (left + right, rows(left + right));
        let joined = computed(xs.len() + ys.len(), rows * total, |index, joined| {
            for (row, joined) in joined.chunks_exact_mut(total).enumerate() {
                let row = index * rows + row;
                joined[..left].copy_from_slice(&xs[row * left..][..left]);
                joined[left..].copy_from_slice(&ys[row * right..][..right]);
            }
        });
        Ok(Output::from_vec(joined, shape))
    }
    dispatch!("concat_channels", a, T => run::<T>(a, b, widths, shape))
}

/// The channels of a contiguous tensor from `first` on, as many as `shape` says.
pub(super) fn channels(x: &Tensor, first: usize, shape: &[usize]) -> Result<Output> {
    fn run<T: Real>(x: &Tensor, first: usize, shape: &[usize]) -> Result<Output> {
        let xs = values::<T>("concat_channels", x)?;
        let xs: &[T] = &xs;
        let total = x.dims().last().copied().unwrap_or(0);
        let (width, count) = (shape.last().copied().unwrap_or(0), shape.iter().product());
        let rows = rows(width);
        let part = computed(count, rows * width, |index, part| {
            for (row, part) in part.chunks_exact_mut(width).enumerate() {
                part.copy_from_slice(&xs[(index * rows + row) * total + first..][..width]);
            }
        });
        Ok(Output::from_vec(part, shape))
    }
    dispatch!("concat_channels", x, T => run::<T>(x, first, shape))
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

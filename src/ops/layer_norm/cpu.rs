use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Real, computed, tensor, values, zeros};
use crate::ops::vector::vectorised;

/// Rows whose parts of the gradients of `weight` and `bias` are summed up together. A constant, so that the sums do
/// not depend on the number of threads.
const ROWS: usize = 128;

/// Sums formed side by side, which is also how vector instructions add.
const LANES: usize = 16;

/// The sum of a function of the elements of two rows, in f64.
#[inline(always)]
fn sum<T: Real>(a: &[T], b: &[T], term: impl Fn(T, T) -> f64) -> f64 {
    let mut lanes = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += term(a[i], b[i]);
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += term(*a, *b);
    }
    lanes.iter().sum()
}

/// Mean and reciprocal standard deviation of a row, in two passes, as one pass loses the digits of a large mean.
#[inline(always)]
fn statistics<T: Real>(row: &[T], eps: f64) -> (f64, f64) {
    let count = row.len() as f64;
    let mean = sum(row, row, |x, _| x.to_f64()) / count;
    let variance = sum(row, row, |x, _| (x.to_f64() - mean) * (x.to_f64() - mean)) / count;
    (mean, (variance + eps).sqrt().recip())
}

pub(super) fn forward<T: Real>(eps: f64, inputs: &[Tensor]) -> Result<Forward> {
    let xs = values::<T>("layer_norm", &inputs[0])?;
    let (weight, bias) = (values::<T>("layer_norm", &inputs[1])?, values::<T>("layer_norm", &inputs[2])?);
    let (weight, bias): (&[T], &[T]) = (&weight, &bias);
    let xs: &[T] = &xs;
    let chunk = weight.len() * ROWS;
    let y = computed(xs.len(), chunk, |index, y| normalise(eps, weight, bias, &xs[index * chunk..], y));
    Ok(Output::from_vec(y, inputs[0].shape()).into())
}

vectorised! {
    fn normalise<T: Real>(eps: f64, weight: &[T], bias: &[T], xs: &[T], ys: &mut [T]) {
        for (y, x) in ys.chunks_exact_mut(weight.len()).zip(xs.chunks_exact(weight.len())) {
            let (mean, scale) = statistics(x, eps);
            for ((y, x), (weight, bias)) in y.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
                *y = T::of((x.to_f64() - mean) * scale) * *weight + *bias;
            }
        }
    }

    /// Writes the gradients of the rows, and adds to the `sums` for weight and bias where they are wanted.
    fn gradients<T: Real>(eps: f64, weight: &[T], xs: &[T], gs: &[T], dxs: Option<&mut [T]>, sums: &mut [Vec<f64>; 2]) {
        let channels = weight.len();
        let count = channels as f64;
        let [weight_sums, bias_sums] = sums;
        let mut dxs = dxs.map(|dxs| dxs.chunks_exact_mut(channels));
        for (x, g) in xs.chunks_exact(channels).zip(gs.chunks_exact(channels)) {
            let (mean, scale) = statistics(x, eps);
            let normalised = |x: T| (x.to_f64() - mean) * scale;
            for ((weight, bias), (x, g)) in weight_sums.iter_mut().zip(bias_sums.iter_mut()).zip(x.iter().zip(g)) {
                *weight += g.to_f64() * normalised(*x);
                *bias += g.to_f64();
            }
            if let Some(dx) = dxs.as_mut().and_then(Iterator::next) {
                // First `g * weight`, which is wanted three times.
                dx.iter_mut().zip(g.iter().zip(weight)).for_each(|(dx, (g, weight))| *dx = *g * *weight);
                let mean_h = sum(dx, x, |h, _| h.to_f64()) / count;
                let mean_hn = sum(dx, x, |h, x| h.to_f64() * normalised(x)) / count;
                for (dx, x) in dx.iter_mut().zip(x) {
                    *dx = T::of(scale * (dx.to_f64() - mean_h - normalised(*x) * mean_hn));
                }
            }
        }
    }
}

/// With `n` the normalised row and `h = g * weight`: `dx = (h - mean(h) - n mean(h n)) / std`, `dweight = sum(g n)` and
/// `dbias = sum(g)` over the rows.
pub(super) fn backward<T: Real>(eps: f64, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let (xs, gs) = (values::<T>("layer_norm", x)?, values::<T>("layer_norm", context.gradient()?)?);
    let weight = values::<T>("layer_norm", &context.inputs[1])?;
    let weight: &[T] = &weight;
    let channels = weight.len();
    let needs_sums = context.needs[1] || context.needs[2];

    let mut dx = zeros::<T>(xs.len());
    let chunk = channels * ROWS;
    let pieces = dx.par_chunks_mut(chunk).zip(xs.par_chunks(chunk).zip(gs.par_chunks(chunk)));
    let sums: Vec<[Vec<f64>; 2]> = pieces
        .map(|(dx, (x, g))| {
            let mut sums = [(); 2].map(|()| vec![0.0; if needs_sums { channels } else { 0 }]);
            gradients(eps, weight, x, g, context.needs[0].then_some(dx), &mut sums);
            sums
        })
        .collect();

    let total = |part: usize| {
        let mut total = vec![0.0; channels];
        for piece in &sums {
            total.iter_mut().zip(&piece[part]).for_each(|(total, x)| *total += x);
        }
        tensor(total.into_iter().map(T::of).collect(), channels)
    };
    Ok(vec![
        context.needs[0].then(|| tensor(dx, x.shape())).transpose()?,
        context.needs[1].then(|| total(0)).transpose()?,
        context.needs[2].then(|| total(1)).transpose()?,
    ])
}

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Real, tensor, values};

/// Rows whose parts of the gradients of `weight` and `bias` are summed up together. A constant, so that the sums do
/// not depend on the number of threads.
const ROWS: usize = 64;

/// Mean and reciprocal standard deviation of a row, in two passes, as one pass loses the digits of a large mean.
fn statistics<T: Real>(row: &[T], eps: f64) -> (f64, f64) {
    let count = row.len() as f64;
    let mean = row.iter().map(|x| x.to_f64()).sum::<f64>() / count;
    let variance = row.iter().map(|x| (x.to_f64() - mean).powi(2)).sum::<f64>() / count;
    (mean, (variance + eps).sqrt().recip())
}

pub(super) fn forward<T: Real>(eps: f64, inputs: &[Tensor]) -> Result<Forward> {
    let xs = values::<T>("layer_norm", &inputs[0])?;
    let (weight, bias) = (values::<T>("layer_norm", &inputs[1])?, values::<T>("layer_norm", &inputs[2])?);
    let (weight, bias): (&[T], &[T]) = (&weight, &bias);
    let channels = weight.len();
    let mut y = vec![T::of(0.0); xs.len()];
    y.par_chunks_mut(channels * ROWS).zip(xs.par_chunks(channels * ROWS)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
            let (mean, scale) = statistics(x, eps);
            for ((y, x), (weight, bias)) in y.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
                *y = T::of((x.to_f64() - mean) * scale) * *weight + *bias;
            }
        }
    });
    Ok(Output::from_vec(y, inputs[0].shape()).into())
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

    let mut dx = vec![T::of(0.0); xs.len()];
    let pieces =
        dx.par_chunks_mut(channels * ROWS).zip(xs.par_chunks(channels * ROWS).zip(gs.par_chunks(channels * ROWS)));
    let sums: Vec<[Vec<f64>; 2]> = pieces
        .map(|(dx, (x, g))| {
            let mut sums = [(); 2].map(|()| vec![0.0; if needs_sums { channels } else { 0 }]);
            let [weight_sums, bias_sums] = &mut sums;
            let rows = x.chunks_exact(channels).zip(g.chunks_exact(channels));
            for (dx, (x, g)) in dx.chunks_exact_mut(channels).zip(rows) {
                let (mean, scale) = statistics(x, eps);
                let normalised = |x: &T| (x.to_f64() - mean) * scale;
                if needs_sums {
                    for ((weight, bias), (x, g)) in
                        weight_sums.iter_mut().zip(bias_sums.iter_mut()).zip(x.iter().zip(g))
                    {
                        *weight += g.to_f64() * normalised(x);
                        *bias += g.to_f64();
                    }
                }
                if context.needs[0] {
                    let (mut mean_h, mut mean_hn) = (0.0, 0.0);
                    for ((x, g), weight) in x.iter().zip(g).zip(weight) {
                        let h = g.to_f64() * weight.to_f64();
                        mean_h += h / channels as f64;
                        mean_hn += h * normalised(x) / channels as f64;
                    }
                    for ((dx, weight), (x, g)) in dx.iter_mut().zip(weight).zip(x.iter().zip(g)) {
                        let h = g.to_f64() * weight.to_f64();
                        *dx = T::of(scale * (h - mean_h - normalised(x) * mean_hn));
                    }
                }
            }
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

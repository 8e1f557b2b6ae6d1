use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::channels::{PIXELS, add_in_order};
use crate::ops::support::{Real, tensor, values};

pub(super) fn forward<T: Real>(x: &Tensor, slope: &Tensor) -> Result<Forward> {
    let (xs, slopes) = (values::<T>("prelu", x)?, values::<T>("prelu", slope)?);
    let slopes: &[T] = &slopes;
    let channels = slopes.len();
    let mut y = xs.to_vec();
    y.par_chunks_mut(PIXELS * channels).for_each(|part| {
        for pixel in part.chunks_exact_mut(channels) {
            for (value, slope) in pixel.iter_mut().zip(slopes) {
                *value = if *value > T::of(0.0) { *value } else { *value * *slope };
            }
        }
    });
    Ok(Output::from_vec(y, x.shape().clone()).into())
}

pub(super) fn backward<T: Real>(context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let [x, slope] = context.inputs else { return Ok(Vec::new()) };
    let (xs, gs) = (values::<T>("prelu", x)?, values::<T>("prelu", context.gradient()?)?);
    let slopes = values::<T>("prelu", slope)?;
    let slopes: &[T] = &slopes;
    let (channels, zero) = (slopes.len(), T::of(0.0));
    let mut gradients = vec![None; 2];
    if context.needs[0] {
        let mut dx = gs.to_vec();
        dx.par_chunks_mut(PIXELS * channels).zip(xs.par_chunks(PIXELS * channels)).for_each(|(dx, xs)| {
            for (pixel, x) in dx.chunks_exact_mut(channels).zip(xs.chunks_exact(channels)) {
                for ((value, x), slope) in pixel.iter_mut().zip(x).zip(slopes) {
                    *value *= if *x > zero { T::of(1.0) } else { *slope };
                }
            }
        });
        gradients[0] = Some(tensor(dx, x.dims())?);
    }
    if context.needs[1] {
        let parts = gs.par_chunks(PIXELS * channels).zip(xs.par_chunks(PIXELS * channels)).map(|(gs, xs)| {
            let mut sums = vec![zero; channels];
            for (g, x) in gs.chunks_exact(channels).zip(xs.chunks_exact(channels)) {
                for c in 0..channels {
                    sums[c] += if x[c] > zero { zero } else { g[c] * x[c] };
                }
            }
            sums
        });
        gradients[1] = Some(tensor(add_in_order(channels, parts.collect()), slope.dims())?);
    }
    Ok(gradients)
}

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::channels::{PIXELS, add_in_order};
use crate::ops::support::{Real, tensor, values};

pub(super) fn forward<T: Real>(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Forward> {
    let (xs, scale, shift) = (
        values::<T>("channel_affine", x)?,
        values::<T>("channel_affine", scale)?,
        values::<T>("channel_affine", shift)?,
    );
    let (scale, shift): (&[T], &[T]) = (&scale, &shift);
    let channels = scale.len();
    let mut y = xs.to_vec();
    y.par_chunks_mut(PIXELS * channels).for_each(|part| {
        for pixel in part.chunks_exact_mut(channels) {
            for (value, (scale, shift)) in pixel.iter_mut().zip(scale.iter().zip(shift)) {
                *value = *value * *scale + *shift;
            }
        }
    });
    Ok(Output::from_vec(y, x.shape().clone()).into())
}

pub(super) fn backward<T: Real>(context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let [x, scale, shift] = context.inputs else { return Ok(Vec::new()) };
    let (xs, gs) = (values::<T>("channel_affine", x)?, values::<T>("channel_affine", context.gradient()?)?);
    let scales = values::<T>("channel_affine", scale)?;
    let scales: &[T] = &scales;
    let channels = scales.len();
    let mut gradients = vec![None; 3];
    if context.needs[0] {
        let mut dx = gs.to_vec();
        dx.par_chunks_mut(PIXELS * channels).for_each(|part| {
            for pixel in part.chunks_exact_mut(channels) {
                pixel.iter_mut().zip(scales).for_each(|(value, scale)| *value *= *scale);
            }
        });
        gradients[0] = Some(tensor(dx, x.dims())?);
    }
    if context.needs[1] || context.needs[2] {
        let parts = gs.par_chunks(PIXELS * channels).zip(xs.par_chunks(PIXELS * channels)).map(|(gs, xs)| {
            let mut sums = vec![T::of(0.0); 2 * channels];
            let (scale, shift) = sums.split_at_mut(channels);
            for (g, x) in gs.chunks_exact(channels).zip(xs.chunks_exact(channels)) {
                for c in 0..channels {
                    scale[c] += g[c] * x[c];
                    shift[c] += g[c];
                }
            }
            sums
        });
        let mut sums = add_in_order(2 * channels, parts.collect());
        gradients[2] = Some(tensor(sums.split_off(channels), shift.dims())?);
        gradients[1] = Some(tensor(sums, scale.dims())?);
    }
    Ok(gradients)
}

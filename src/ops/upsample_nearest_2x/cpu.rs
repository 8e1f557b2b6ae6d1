use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Real, tensor, values, zeros};

pub(super) fn forward<T: Real>(x: &Tensor) -> Result<Forward> {
    let (batch, height, width, channels) = x.dims4()?;
    let xs = values::<T>("upsample_nearest_2x", x)?;
    let row = width * channels;
    let mut y = zeros::<T>(4 * xs.len());
    y.par_chunks_mut(4 * row).zip(xs.par_chunks(row)).for_each(|(y, x)| {
        let (above, below) = y.split_at_mut(2 * row);
        for (pair, pixel) in above.chunks_exact_mut(2 * channels).zip(x.chunks_exact(channels)) {
            pair[..channels].copy_from_slice(pixel);
            pair[channels..].copy_from_slice(pixel);
        }
        below.copy_from_slice(above);
    });
    Ok(Output::from_vec(y, (batch, 2 * height, 2 * width, channels)).into())
}

pub(super) fn backward<T: Real>(context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let (_, _, width, channels) = x.dims4()?;
    let gs = values::<T>("upsample_nearest_2x", context.gradient()?)?;
    let row = width * channels;
    let mut dx = zeros::<T>(x.elem_count());
    dx.par_chunks_mut(row).zip(gs.par_chunks(4 * row)).for_each(|(dx, g)| {
        let (above, below) = g.split_at(2 * row);
        let pairs = above.chunks_exact(2 * channels).zip(below.chunks_exact(2 * channels));
        for (pixel, (above, below)) in dx.chunks_exact_mut(channels).zip(pairs) {
            let ((a, b), (c, d)) = (above.split_at(channels), below.split_at(channels));
            for (i, value) in pixel.iter_mut().enumerate() {
                *value = (a[i] + b[i]) + (c[i] + d[i]);
            }
        }
    });
    Ok(vec![Some(tensor(dx, x.dims())?)])
}

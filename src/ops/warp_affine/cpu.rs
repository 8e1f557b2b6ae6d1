use candle_core::Tensor;
use rayon::prelude::*;

use super::WarpAffine;
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Real, tensor, values};

/// The up to four input pixels, `(index, weight)`, that output pixel `(column, row)` is mixed from.
#[inline(always)]
fn corners(
    [across, down]: &[[f64; 3]; 2],
    (column, row): (usize, usize),
    (height, width): (usize, usize),
) -> impl Iterator<Item = (usize, f64)> {
    let (x, y) = (column as f64, row as f64);
    let (x, y) = (across[0] * x + across[1] * y + across[2], down[0] * x + down[1] * y + down[2]);
    let (left, top) = (x.floor(), y.floor());
    let (right_share, bottom_share) = (x - left, y - top);
    // Far outside, the conversion saturates, and stays outside.
    let (left, top) = (left as isize, top as isize);
    let four = [
        (top, left, (1.0 - bottom_share) * (1.0 - right_share)),
        (top, left.saturating_add(1), (1.0 - bottom_share) * right_share),
        (top.saturating_add(1), left, bottom_share * (1.0 - right_share)),
        (top.saturating_add(1), left.saturating_add(1), bottom_share * right_share),
    ];
    four.into_iter().filter_map(move |(y, x, weight)| {
        let inside = y >= 0 && x >= 0 && (y as usize) < height && (x as usize) < width;
        (inside && weight != 0.0).then(|| (y as usize * width + x as usize, weight))
    })
}

pub(super) fn forward<T: Real>(warp: &WarpAffine, x: &Tensor) -> Result<Forward> {
    let (batch, height, width, channels) = x.dims4()?;
    let xs = values::<T>("warp_affine", x)?;
    let xs: &[T] = &xs;
    let sample_length = height * width * channels;
    let mut y = vec![T::of(0.0); batch * warp.height * warp.width * channels];
    y.par_chunks_mut(warp.width * channels).with_min_len(4).enumerate().for_each(|(line, y)| {
        let (sample, row) = (line / warp.height, line % warp.height);
        let x = &xs[sample * sample_length..(sample + 1) * sample_length];
        for (column, pixel) in y.chunks_exact_mut(channels).enumerate() {
            for (index, weight) in corners(&warp.matrices[sample], (column, row), (height, width)) {
                let weight = T::of(weight);
                let source = &x[index * channels..(index + 1) * channels];
                pixel.iter_mut().zip(source).for_each(|(value, source)| *value += *source * weight);
            }
        }
    });
    Ok(Output::from_vec(y, (batch, warp.height, warp.width, channels)).into())
}

pub(super) fn backward<T: Real>(warp: &WarpAffine, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let (_, height, width, channels) = x.dims4()?;
    let gs = values::<T>("warp_affine", context.gradient()?)?;
    let mut dx = vec![T::of(0.0); x.elem_count()];
    // A sample is one task: several output pixels add to one input pixel, and always in the same order.
    let samples = dx.par_chunks_mut(height * width * channels).zip(gs.par_chunks(warp.height * warp.width * channels));
    samples.zip(&warp.matrices).for_each(|((dx, g), matrix)| {
        for (position, pixel) in g.chunks_exact(channels).enumerate() {
            let at = (position % warp.width, position / warp.width);
            for (index, weight) in corners(matrix, at, (height, width)) {
                let weight = T::of(weight);
                let target = &mut dx[index * channels..(index + 1) * channels];
                target.iter_mut().zip(pixel).for_each(|(target, value)| *target += *value * weight);
            }
        }
    });
    Ok(vec![Some(tensor(dx, x.dims())?)])
}

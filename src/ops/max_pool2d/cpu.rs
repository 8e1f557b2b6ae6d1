use candle_core::Tensor;
use rayon::prelude::*;

use super::MaxPool2d;
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Real, tensor, values};

fn is_nan<T: Real>(value: T) -> bool {
    value.partial_cmp(&value).is_none()
}

/// The index of the largest value of the window whose first pixel is `(top, left)`, for one channel of one image.
fn largest<T: Real>(pool: &MaxPool2d, image: &[T], [width, channels]: [usize; 2], start: usize) -> usize {
    let mut best = start;
    for dy in 0..pool.kernel {
        for dx in 0..pool.kernel {
            let at = start + (dy * width + dx) * channels;
            // NaN wins and stays, as in torch.
            if image[at] > image[best] || (is_nan(image[at]) && !is_nan(image[best])) {
                best = at;
            }
        }
    }
    best
}

/// Calls `visit` for every output of one image with its place and the place of its first input.
fn windows(pool: &MaxPool2d, [height, width, channels]: [usize; 3], mut visit: impl FnMut(usize, usize)) {
    let (out_height, out_width) = ((height - pool.kernel) / pool.stride + 1, (width - pool.kernel) / pool.stride + 1);
    for y in 0..out_height {
        for x in 0..out_width {
            let (to, from) = ((y * out_width + x) * channels, (y * width + x) * pool.stride * channels);
            (0..channels).for_each(|c| visit(to + c, from + c));
        }
    }
}

pub(super) fn forward<T: Real>(pool: &MaxPool2d, x: &Tensor) -> Result<Forward> {
    let (batch, height, width, channels) = x.dims4()?;
    let (out_height, out_width) = ((height - pool.kernel) / pool.stride + 1, (width - pool.kernel) / pool.stride + 1);
    let xs = values::<T>("max_pool2d", x)?;
    let mut y = vec![T::of(0.0); batch * out_height * out_width * channels];
    y.par_chunks_mut(out_height * out_width * channels).zip(xs.par_chunks(height * width * channels)).for_each(
        |(y, image)| {
            windows(pool, [height, width, channels], |to, from| {
                y[to] = image[largest(pool, image, [width, channels], from)];
            });
        },
    );
    Ok(Output::from_vec(y, (batch, out_height, out_width, channels)).into())
}

pub(super) fn backward<T: Real>(pool: &MaxPool2d, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let (batch, height, width, channels) = x.dims4()?;
    let (xs, gs) = (values::<T>("max_pool2d", x)?, values::<T>("max_pool2d", context.gradient()?)?);
    let mut dx = vec![T::of(0.0); xs.len()];
    let image_size = height * width * channels;
    dx.par_chunks_mut(image_size).zip(xs.par_chunks(image_size)).zip(gs.par_chunks(gs.len() / batch)).for_each(
        |((dx, image), g)| {
            windows(pool, [height, width, channels], |to, from| {
                dx[largest(pool, image, [width, channels], from)] += g[to];
            });
        },
    );
    Ok(vec![Some(tensor(dx, x.dims())?)])
}

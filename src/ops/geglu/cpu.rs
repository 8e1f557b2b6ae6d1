use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::activation::Activation;
use crate::ops::support::{Real, computed, tensor, values};
use crate::ops::vector::vectorised;

/// Outputs that are one task: less is not worth one.
const CHUNK: usize = 8 << 10;

pub(super) fn forward<T: Real>(x: &Tensor) -> Result<Forward> {
    let mut shape = x.dims().to_vec();
    let channels = shape.pop().unwrap_or(0) / 2;
    shape.push(channels);
    let xs = values::<T>("geglu", x)?;
    let xs: &[T] = &xs;
    // No channels, no rows: chunks of one of nothing.
    let narrow = channels.max(1);
    let chunk = narrow * CHUNK.div_ceil(narrow);
    let y = computed(xs.len() / 2, chunk, |index, y| gate(narrow, &xs[2 * index * chunk..], y));
    Ok(Output::from_vec(y, shape).into())
}

pub(super) fn backward<T: Real>(context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let narrow = (x.dims().last().copied().unwrap_or(0) / 2).max(1);
    let (xs, gs) = (values::<T>("geglu", x)?, values::<T>("geglu", context.gradient()?)?);
    let (xs, gs): (&[T], &[T]) = (&xs, &gs);
    let chunk = narrow * CHUNK.div_ceil(narrow);
    let dx = computed(xs.len(), 2 * chunk, |index, dx| {
        gate_gradient(narrow, &xs[2 * index * chunk..], &gs[index * chunk..], dx);
    });
    Ok(vec![Some(tensor(dx, x.shape())?)])
}

vectorised! {
    fn gate<T: Real>(narrow: usize, xs: &[T], ys: &mut [T]) {
        for (y, x) in ys.chunks_exact_mut(narrow).zip(xs.chunks_exact(2 * narrow)) {
            let (a, b) = x.split_at(narrow);
            for (y, (a, b)) in y.iter_mut().zip(a.iter().zip(b)) {
                *y = *a * Activation::Gelu.value(*b);
            }
        }
    }

    fn gate_gradient<T: Real>(narrow: usize, xs: &[T], gs: &[T], dxs: &mut [T]) {
        let rows = xs.chunks_exact(2 * narrow).zip(gs.chunks_exact(narrow));
        for (dx, (x, g)) in dxs.chunks_exact_mut(2 * narrow).zip(rows) {
            let ((a, b), (da, db)) = (x.split_at(narrow), dx.split_at_mut(narrow));
            for ((da, db), (g, (a, b))) in da.iter_mut().zip(db).zip(g.iter().zip(a.iter().zip(b))) {
                *da = *g * Activation::Gelu.value(*b);
                *db = *g * *a * Activation::Gelu.derivative(*b);
            }
        }
    }
}

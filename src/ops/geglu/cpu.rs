use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::activation::Activation;
use crate::ops::support::{Real, tensor, values};

/// Elements a rayon task gets at least: less is not worth a task.
const GRAIN: usize = 4096;

pub(super) fn forward<T: Real>(x: &Tensor) -> Result<Forward> {
    let mut shape = x.dims().to_vec();
    let channels = shape.pop().unwrap_or(0) / 2;
    shape.push(channels);
    let xs = values::<T>("geglu", x)?;
    let mut y = vec![T::of(0.0); xs.len() / 2];
    // No channels, no rows: chunks of one of nothing.
    let (wide, narrow, grain) = (channels.max(1) * 2, channels.max(1), GRAIN.div_ceil(channels.max(1)));
    y.par_chunks_exact_mut(narrow).zip(xs.par_chunks_exact(wide)).with_min_len(grain).for_each(|(y, x)| {
        let (a, b) = x.split_at(narrow);
        for (y, (a, b)) in y.iter_mut().zip(a.iter().zip(b)) {
            *y = *a * Activation::Gelu.value(*b);
        }
    });
    Ok(Output::from_vec(y, shape).into())
}

pub(super) fn backward<T: Real>(context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let narrow = (x.dims().last().copied().unwrap_or(0) / 2).max(1);
    let (xs, gs) = (values::<T>("geglu", x)?, values::<T>("geglu", context.gradient()?)?);
    let mut dx = vec![T::of(0.0); xs.len()];
    let rows =
        dx.par_chunks_exact_mut(narrow * 2).zip(xs.par_chunks_exact(narrow * 2).zip(gs.par_chunks_exact(narrow)));
    rows.with_min_len(GRAIN.div_ceil(narrow)).for_each(|(dx, (x, g))| {
        let ((a, b), (da, db)) = (x.split_at(narrow), dx.split_at_mut(narrow));
        for ((da, db), (g, (a, b))) in da.iter_mut().zip(db).zip(g.iter().zip(a.iter().zip(b))) {
            *da = *g * Activation::Gelu.value(*b);
            *db = *g * *a * Activation::Gelu.derivative(*b);
        }
    });
    Ok(vec![Some(tensor(dx, x.shape())?)])
}

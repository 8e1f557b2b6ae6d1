use candle_core::Tensor;
use rayon::prelude::*;

use super::{ResizeBilinear, Taps};
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Real, tensor, values};

/// Applies `taps` to the middle axis of `(outer, taps.from, inner)`: `(outer, taps.rows, inner)`.
fn resample<T: Real>(taps: &Taps, source: &[T], inner: usize) -> Vec<T> {
    let rows: Vec<Vec<(usize, T)>> =
        taps.rows.iter().map(|row| row.iter().map(|(i, weight)| (i * inner, T::of(*weight))).collect()).collect();
    let (old, new) = (taps.from * inner, rows.len() * inner);
    let mut result = vec![T::of(0.0); source.len() / old * new];
    let line = |source: &[T], row: &[(usize, T)], line: &mut [T]| {
        for (start, weight) in row {
            for (value, input) in line.iter_mut().zip(&source[*start..*start + inner]) {
                *value += *input * *weight;
            }
        }
    };
    if source.len() / old >= 64 {
        // Many short slabs (the rows of images): a slab is a task.
        result.par_chunks_mut(new).zip(source.par_chunks(old)).with_min_len(4).for_each(|(result, source)| {
            result.chunks_exact_mut(inner).zip(&rows).for_each(|(result, row)| line(source, row, result));
        });
    } else {
        // Few long ones (images): a line of a slab is a task.
        result.par_chunks_mut(inner).with_min_len(4).enumerate().for_each(|(index, result)| {
            let slab = index / rows.len() * old;
            line(&source[slab..slab + old], &rows[index % rows.len()], result);
        });
    }
    result
}

pub(super) fn forward<T: Real>(resize: &ResizeBilinear, x: &Tensor) -> Result<Forward> {
    let (batch, _, _, channels) = x.dims4()?;
    let (height, width) = (resize.vertical.rows.len(), resize.horizontal.rows.len());
    let xs = values::<T>("resize_bilinear", x)?;
    let wide = resample(&resize.horizontal, &xs, channels);
    let y = resample(&resize.vertical, &wide, width * channels);
    Ok(Output::from_vec(y, (batch, height, width, channels)).into())
}

pub(super) fn backward<T: Real>(resize: &ResizeBilinear, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let channels = x.dims4()?.3;
    let gs = values::<T>("resize_bilinear", context.gradient()?)?;
    let wide = resample(&resize.vertical.transposed(), &gs, resize.horizontal.rows.len() * channels);
    let dx = resample(&resize.horizontal.transposed(), &wide, channels);
    Ok(vec![Some(tensor(dx, x.dims())?)])
}

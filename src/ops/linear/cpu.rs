use candle_core::Tensor;

use super::Linear;
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Matrix, Real, Threads, computed, matmul, tensor, values};

/// Products of fewer rows are one task for the matrix product to divide.
const FEW: usize = 256;

/// Rows that are one task, whose share of the product is still in the cache when it is made: depends on shapes only,
/// never on the machine.
fn chunk(rows: usize) -> usize {
    match rows < FEW {
        true => rows.max(1),
        false => rows.div_ceil(16).next_multiple_of(8).clamp(64, 512),
    }
}

/// `x . right` for rows `x`, added to what `start` writes for the rows from a first one on, where it says it has.
fn product<T: Real>(x: &[T], right: Matrix<'_, T>, start: impl Fn(usize, &mut [T]) -> bool + Sync) -> Vec<T> {
    let (inner, out) = (right.rows, right.columns);
    let rows = x.len() / inner.max(1);
    let chunk = chunk(rows);
    let threads = if chunk >= rows { Threads::All } else { Threads::No };
    let part = |index: usize, y: &mut [T]| {
        let (first, rows) = (index * chunk, y.len() / out);
        let keep = start(first, y);
        let x = Matrix::row_major(&x[first * inner..][..rows * inner], rows, inner);
        matmul(y, out, keep, x, right, T::of(1.0), threads);
    };
    // One chunk is computed here, not as a task, by all threads together.
    computed(rows * out, chunk * out, part)
}

pub(super) fn forward<T: Real>(linear: &Linear, inputs: &[Tensor]) -> Result<Forward> {
    let (x, weight) = (&inputs[0], &inputs[1]);
    let (out, inner) = weight.dims2()?;
    let rows = x.elem_count() / inner.max(1);
    let (xs, ws) = (values::<T>("linear", x)?, values::<T>("linear", weight)?);
    let addends = linear.places.numbers::<T>("linear", inputs, out, rows)?;
    let y = product(&xs, Matrix::row_major(&ws, out, inner).transposed(), |first, y| addends.write(first, y));
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(out);
    Ok(Output::from_vec(y, shape).into())
}

pub(super) fn backward<T: Real>(linear: &Linear, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (&context.inputs[0], &context.inputs[1]);
    let (out, inner) = weight.dims2()?;
    let rows = x.elem_count() / inner.max(1);
    let gradient = context.gradient()?;
    let gs = values::<T>("linear", gradient)?;
    let mut gradients = vec![None; context.inputs.len()];
    if context.needs[0] {
        let ws = values::<T>("linear", weight)?;
        let dx = product(&gs, Matrix::row_major(&ws, out, inner), |_, _| false);
        gradients[0] = Some(tensor(dx, x.dims())?);
    }
    if context.needs[1] {
        let xs = values::<T>("linear", x)?;
        let mut dw = vec![T::of(0.0); out * inner];
        let (g_matrix, x_matrix) = (Matrix::row_major(&gs, rows, out), Matrix::row_major(&xs, rows, inner));
        matmul(&mut dw, inner, false, g_matrix.transposed(), x_matrix, T::of(1.0), Threads::All);
        gradients[1] = Some(tensor(dw, weight.dims())?);
    }
    if let Some(bias) = linear.places.bias.filter(|place| context.needs[*place]) {
        let mut db = vec![T::of(0.0); out];
        for row in gs.chunks_exact(out) {
            db.iter_mut().zip(row).for_each(|(sum, value)| *sum += *value);
        }
        gradients[bias] = Some(tensor(db, out)?);
    }
    linear.places.gradients(context, &mut gradients)?;
    Ok(gradients)
}

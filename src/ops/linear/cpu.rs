use candle_core::Tensor;

use super::Linear;
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Matrix, Real, Threads, matmul, tensor, values};

pub(super) fn forward<T: Real>(linear: &Linear, inputs: &[Tensor]) -> Result<Forward> {
    let (x, weight, bias) = (&inputs[0], &inputs[1], linear.places.bias.map(|place| &inputs[place]));
    let (out, inner) = weight.dims2()?;
    let rows = x.elem_count() / inner.max(1);
    let (xs, ws) = (values::<T>("linear", x)?, values::<T>("linear", weight)?);
    let mut y = Vec::with_capacity(rows * out);
    match bias {
        Some(bias) => {
            let bias = values::<T>("linear", bias)?;
            (0..rows).for_each(|_| y.extend_from_slice(&bias));
        }
        None => y.resize(rows * out, T::of(0.0)),
    }
    let (x_matrix, w_matrix) = (Matrix::row_major(&xs, rows, inner), Matrix::row_major(&ws, out, inner));
    matmul(&mut y, out, bias.is_some(), x_matrix, w_matrix.transposed(), T::of(1.0), Threads::All);
    linear.places.add("linear", inputs, &mut y)?;
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
    let g_matrix = Matrix::row_major(&gs, rows, out);
    let mut gradients = vec![None; context.inputs.len()];
    if context.needs[0] {
        let ws = values::<T>("linear", weight)?;
        let mut dx = vec![T::of(0.0); rows * inner];
        matmul(&mut dx, inner, false, g_matrix, Matrix::row_major(&ws, out, inner), T::of(1.0), Threads::All);
        gradients[0] = Some(tensor(dx, x.dims())?);
    }
    if context.needs[1] {
        let xs = values::<T>("linear", x)?;
        let mut dw = vec![T::of(0.0); out * inner];
        let x_matrix = Matrix::row_major(&xs, rows, inner);
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

use candle_core::Tensor;

use super::Activation;
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Real, computed, tensor, values};
use crate::ops::vector::vectorised;

/// Numbers that are one task: less is not worth one.
const CHUNK: usize = 16 << 10;

pub(super) fn forward<T: Real>(activation: Activation, x: &Tensor) -> Result<Forward> {
    let xs = values::<T>("activation", x)?;
    let xs: &[T] = &xs;
    let y = computed(xs.len(), CHUNK, |index, y| {
        y.copy_from_slice(&xs[index * CHUNK..][..y.len()]);
        replace(activation, y);
    });
    Ok(Output::from_vec(y, x.shape()).into())
}

pub(super) fn backward<T: Real>(activation: Activation, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let (xs, gs) = (values::<T>("activation", x)?, values::<T>("activation", context.gradient()?)?);
    let (xs, gs): (&[T], &[T]) = (&xs, &gs);
    let dx = computed(xs.len(), CHUNK, |index, dx| {
        dx.copy_from_slice(&xs[index * CHUNK..][..dx.len()]);
        replace_by_gradient(activation, dx, &gs[index * CHUNK..]);
    });
    Ok(vec![Some(tensor(dx, x.shape())?)])
}

vectorised! {
    fn replace<T: Real>(activation: Activation, xs: &mut [T]) {
        activation.replace(xs);
    }

    fn replace_by_gradient<T: Real>(activation: Activation, xs: &mut [T], gradient: &[T]) {
        activation.replace_by_gradient(xs, gradient);
    }
}

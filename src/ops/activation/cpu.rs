use candle_core::Tensor;
use rayon::prelude::*;

use super::Activation;
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Real, tensor, values};
use crate::ops::vector::vectorised;

/// Numbers that are one task: less is not worth one.
const CHUNK: usize = 16 << 10;

pub(super) fn forward<T: Real>(activation: Activation, x: &Tensor) -> Result<Forward> {
    let mut y = values::<T>("activation", x)?.to_vec();
    y.par_chunks_mut(CHUNK).for_each(|y| replace(activation, y));
    Ok(Output::from_vec(y, x.shape()).into())
}

pub(super) fn backward<T: Real>(activation: Activation, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let gs = values::<T>("activation", context.gradient()?)?;
    let mut dx = values::<T>("activation", x)?.to_vec();
    dx.par_chunks_mut(CHUNK).zip(gs.par_chunks(CHUNK)).for_each(|(dx, g)| replace_by_gradient(activation, dx, g));
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

use candle_core::Tensor;
use rayon::prelude::*;

use super::Activation;
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Real, tensor, values};

/// Elements a rayon task gets at least: less is not worth a task.
const GRAIN: usize = 4096;

pub(super) fn forward<T: Real>(activation: Activation, x: &Tensor) -> Result<Forward> {
    let xs = values::<T>("activation", x)?;
    let xs: &[T] = &xs;
    let y: Vec<T> = xs.par_iter().with_min_len(GRAIN).map(|x| activation.value(*x)).collect();
    Ok(Output::from_vec(y, x.shape()).into())
}

pub(super) fn backward<T: Real>(activation: Activation, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let x = &context.inputs[0];
    let (xs, gs) = (values::<T>("activation", x)?, values::<T>("activation", context.gradient()?)?);
    let (xs, gs): (&[T], &[T]) = (&xs, &gs);
    let dx: Vec<T> = xs.par_iter().zip(gs).with_min_len(GRAIN).map(|(x, g)| *g * activation.derivative(*x)).collect();
    Ok(vec![Some(tensor(dx, x.shape())?)])
}

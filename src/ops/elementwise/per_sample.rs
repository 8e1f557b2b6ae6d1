//! Addition of one vector per sample.

use candle_core::{Device, Layout, Tensor};
use rayon::prelude::*;

use super::storage;
use crate::autograd::{Backward, Forward, Function, Output, Value, apply};
use crate::ops::support::{Real, dispatch, same_kind, tensor, values};
use crate::{Error, Result};

/// `x` plus, at every place of a sample, that sample's vector: how a resnet takes in the time embedding.
///
/// `x`: `(batch, ..., channels)`; `vectors`: `(batch, channels)`. Returns the shape of `x`.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit.
pub fn add_per_sample(x: &Tensor, vectors: &Tensor) -> Result<Tensor> {
    same_kind("add_per_sample", x, "vectors", vectors)?;
    match (x.dims(), vectors.dims()) {
        ([batch, .., channels], [samples, width]) if batch == samples && channels == width => {
            apply(AddPerSample, &[x, vectors])
        }
        _ => Err(Error::argument(
            "add_per_sample",
            "vectors",
            format!("(batch, channels) of x, which is {:?}", x.dims()),
            format!("{:?}", vectors.dims()),
        )),
    }
}

struct AddPerSample;

fn on_cpu(tensor: &Tensor) -> bool {
    matches!(tensor.device(), Device::Cpu)
        && matches!(tensor.dtype(), candle_core::DType::F32 | candle_core::DType::F64)
}

/// Samples, places of a sample, channels.
fn sizes(x: &Tensor) -> (usize, usize, usize) {
    let dims = x.dims();
    let (batch, channels) = (dims[0], dims[dims.len() - 1]);
    (batch, dims[1..dims.len() - 1].iter().product(), channels)
}

impl Function for AddPerSample {
    fn name(&self) -> &'static str {
        "add_per_sample"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let (x, vectors) = (&inputs[0], &inputs[1]);
        if on_cpu(x) {
            return dispatch!("add_per_sample", x, T => forward::<T>(x, vectors));
        }
        #[cfg(feature = "cuda")]
        if super::cuda::takes(x) {
            return Ok(super::cuda::add_per_sample(x, vectors)?.into());
        }
        let (batch, _, channels) = sizes(x);
        let mut shape = vec![1; x.rank()];
        (shape[0], shape[x.rank() - 1]) = (batch, channels);
        let layout = Layout::contiguous_with_offset(shape, vectors.layout().start_offset());
        Ok(storage::add("add_per_sample", x, vectors, &layout.broadcast_as(x.shape())?)?.into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let gradient = context.gradient()?;
        let of_vectors = match context.needs[1] {
            false => None,
            true if on_cpu(gradient) => Some(dispatch!("add_per_sample", gradient, T => sum_of_places::<T>(gradient))?),
            true => Some(sum_of_places_elsewhere(gradient)?),
        };
        Ok(vec![Some(gradient.clone()), of_vectors])
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

fn forward<T: Real>(x: &Tensor, vectors: &Tensor) -> Result<Forward> {
    let (_, places, channels) = sizes(x);
    let (xs, vs) = (values::<T>("add_per_sample", x)?, values::<T>("add_per_sample", vectors)?);
    let mut y = xs.to_vec();
    // No channels or places, no rows: chunks of one of nothing.
    let samples = y.par_chunks_exact_mut((places * channels).max(1)).zip(vs.par_chunks_exact(channels.max(1)));
    samples.for_each(|(y, vector)| {
        for row in y.chunks_exact_mut(vector.len()) {
            row.iter_mut().zip(vector).for_each(|(y, v)| *y += *v);
        }
    });
    Ok(Output::from_vec(y, x.shape().clone()).into())
}

fn sum_of_places<T: Real>(gradient: &Tensor) -> Result<Tensor> {
    let (batch, places, channels) = sizes(gradient);
    let gs = values::<T>("add_per_sample", gradient)?;
    let mut sums = vec![T::of(0.0); batch * channels];
    let samples = sums.par_chunks_exact_mut(channels.max(1)).zip(gs.par_chunks_exact((places * channels).max(1)));
    samples.for_each(|(sums, gradient)| {
        for row in gradient.chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(sum, g)| *sum += *g);
        }
    });
    tensor(sums, (batch, channels))
}

/// The same on other devices and in other dtypes.
fn sum_of_places_elsewhere(gradient: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::takes(gradient) {
        return crate::cuda::sum_positions(gradient, true);
    }
    let (batch, places, channels) = sizes(gradient);
    Ok(gradient.reshape((batch, places, channels))?.sum(1)?)
}

use candle_core::Tensor;
use rayon::prelude::*;

use super::{NONE, TokenSelection};
use crate::Result;
use crate::autograd::{Forward, Output};
use crate::ops::support::{Real, tensor, values, zeros};

/// The rows at `indices` of every sample's rows; zeros for [`NONE`].
fn rows<T: Real>(x: &Tensor, indices: &[u32]) -> Result<Vec<T>> {
    let (batch, tokens, channels) = x.dims3()?;
    let xs = values::<T>("select_tokens", x)?;
    let mut y = zeros::<T>(batch * indices.len() * channels);
    y.par_chunks_mut(indices.len() * channels).zip(xs.par_chunks(tokens * channels)).for_each(|(y, x)| {
        for (row, index) in y.chunks_exact_mut(channels).zip(indices).filter(|(_, index)| **index != NONE) {
            row.copy_from_slice(&x[*index as usize * channels..][..channels]);
        }
    });
    Ok(y)
}

pub(super) fn forward<T: Real>(selection: &TokenSelection, x: &Tensor) -> Result<Forward> {
    let (batch, _, channels) = x.dims3()?;
    Ok(Output::from_vec(rows::<T>(x, &selection.kept)?, (batch, selection.len(), channels)).into())
}

pub(super) fn backward<T: Real>(selection: &TokenSelection, gradient: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let (batch, _, channels) = gradient.dims3()?;
    let dx = rows::<T>(gradient, &selection.places)?;
    Ok(vec![Some(tensor(dx, &[batch, selection.tokens(), channels])?)])
}

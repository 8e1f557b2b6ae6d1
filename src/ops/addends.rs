//! What a linear map or a convolution adds to its product in the same operation.

use candle_core::Tensor;
use rayon::prelude::*;

use super::support::{Real, on_cuda, same_kind, values};
use crate::autograd::Backward;
use crate::{Error, Result};

/// Tensors added to the product of a linear map or a convolution as it is written, which spares reading and writing it
/// again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Addends<'a> {
    /// `(out,)`: added at every position.
    pub bias: Option<&'a Tensor>,
    /// `(batch, out)`: added at every position of its sample (the time embedding in a resnet).
    pub per_sample: Option<&'a Tensor>,
    /// Of the shape of the result (a residual stream).
    pub residual: Option<&'a Tensor>,
}

impl<'a> Addends<'a> {
    /// A bias or nothing.
    pub fn bias(bias: Option<&'a Tensor>) -> Self {
        Addends { bias, ..Addends::default() }
    }

    /// Checks shapes and kinds against a result of this shape, and says where in the inputs of a function, of which the
    /// first two are others, the tensors lie.
    pub(super) fn place(
        &self,
        operation: &'static str,
        x: &'a Tensor,
        shape: &[usize],
        inputs: &mut Vec<&'a Tensor>,
    ) -> Result<Places> {
        let out = shape[shape.len() - 1];
        let mut place = |argument, tensor: Option<&'a Tensor>, expected: &[usize]| {
            let Some(tensor) = tensor else { return Ok(None) };
            same_kind(operation, x, argument, tensor)?;
            if tensor.dims() != expected {
                let expected = match expected {
                    [size] => format!("({size},)"),
                    shape => format!("{shape:?}"),
                };
                let found = format!("{:?}", tensor.dims());
                return Err(Error::argument(operation, argument, expected, found));
            }
            inputs.push(tensor);
            Ok(Some(inputs.len() - 1))
        };
        Ok(Places {
            bias: place("bias", self.bias, &[out])?,
            per_sample: place("per_sample", self.per_sample, &[shape[0], out])?,
            residual: place("residual", self.residual, shape)?,
        })
    }
}

/// Where the addends lie in the inputs of a function.
#[derive(Clone, Copy, Default)]
pub(super) struct Places {
    pub bias: Option<usize>,
    pub per_sample: Option<usize>,
    pub residual: Option<usize>,
}

impl Places {
    /// Adds the per-sample vectors and the residual to a product on the CPU, which has its bias.
    pub fn add<T: Real>(&self, operation: &'static str, inputs: &[Tensor], product: &mut [T]) -> Result<()> {
        if let Some(per_sample) = self.per_sample {
            let (batch, out) = inputs[per_sample].dims2()?;
            let vectors = values::<T>(operation, &inputs[per_sample])?;
            let vectors: &[T] = &vectors;
            let sample = product.len() / batch.max(1);
            product.par_chunks_mut(sample.max(1)).zip(vectors.par_chunks(out.max(1))).for_each(|(sample, vector)| {
                for position in sample.chunks_exact_mut(out) {
                    position.iter_mut().zip(vector).for_each(|(value, addend)| *value += *addend);
                }
            });
        }
        if let Some(residual) = self.residual {
            let residual = values::<T>(operation, &inputs[residual])?;
            let residual: &[T] = &residual;
            product.par_chunks_mut(1 << 14).zip(residual.par_chunks(1 << 14)).for_each(|(product, residual)| {
                product.iter_mut().zip(residual).for_each(|(value, addend)| *value += *addend);
            });
        }
        Ok(())
    }

    /// Fills in the gradients of the per-sample vectors and of the residual.
    pub fn gradients(&self, context: &Backward<'_>, gradients: &mut [Option<Tensor>]) -> Result<()> {
        let wanted = |place: Option<usize>| place.filter(|place| context.needs[*place]);
        if let Some(place) = wanted(self.per_sample) {
            gradients[place] = Some(sum_of_samples(context.gradient()?)?);
        }
        if let Some(place) = wanted(self.residual) {
            gradients[place] = Some(context.gradient()?.clone());
        }
        Ok(())
    }
}

/// `(batch, ..., out)` summed over all positions of a sample: `(batch, out)`.
fn sum_of_samples(gradient: &Tensor) -> Result<Tensor> {
    on_cuda!(gradient => crate::cuda::sum_positions(gradient, true));
    let (batch, out) = (gradient.dims()[0], gradient.dims()[gradient.rank() - 1]);
    Ok(gradient.reshape((batch, (), out))?.sum(1)?)
}

//! What a linear map or a convolution adds to its product in the same operation.

use candle_core::Tensor;

use super::support::{Real, Values, on_cuda, same_kind, values};
use super::vector::vectorised;
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
    /// The addends' numbers on the CPU, for a result of so many channels.
    pub fn numbers<'a, T: Real>(
        &self,
        operation: &'static str,
        inputs: &'a [Tensor],
        channels: usize,
        positions: usize,
    ) -> Result<Numbers<'a, T>> {
        let numbers = |place: Option<usize>| place.map(|place| values::<T>(operation, &inputs[place])).transpose();
        let per_sample = numbers(self.per_sample)?;
        let samples = per_sample.as_ref().map_or(1, |vectors| (vectors.len() / channels.max(1)).max(1));
        let (bias, residual) = (numbers(self.bias)?, numbers(self.residual)?);
        Ok(Numbers { bias, per_sample, residual, channels, positions: (positions / samples).max(1) })
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

/// The addends on the CPU.
pub(super) struct Numbers<'a, T> {
    bias: Option<Values<'a, T>>,
    per_sample: Option<Values<'a, T>>,
    residual: Option<Values<'a, T>>,
    channels: usize,
    /// Positions of a sample.
    positions: usize,
}

impl<T: Real> Numbers<'_, T> {
    /// Writes the sum of the addends to the rows of the result from `first` on, and says whether there are any.
    pub fn write(&self, first: usize, rows: &mut [T]) -> bool {
        let channels = self.channels.max(1);
        match (&self.residual, &self.bias) {
            (None, None) if self.per_sample.is_none() => return false,
            (None, None) => rows.fill(T::of(0.0)),
            (Some(residual), bias) => {
                rows.copy_from_slice(&residual[first * channels..][..rows.len()]);
                if let Some(bias) = bias {
                    add_to_rows(rows, bias);
                }
            }
            (None, Some(bias)) => rows.chunks_exact_mut(channels).for_each(|row| row.copy_from_slice(bias)),
        }
        if let Some(vectors) = &self.per_sample {
            let (mut rest, mut position) = (rows, first);
            while !rest.is_empty() {
                let (sample, within) = (position / self.positions, position % self.positions);
                let length = ((self.positions - within) * channels).min(rest.len());
                let (part, others) = rest.split_at_mut(length);
                add_to_rows(part, &vectors[sample * channels..][..channels]);
                (rest, position) = (others, position + length / channels);
            }
        }
        true
    }
}

vectorised! {
    fn add_to_rows<T: Real>(rows: &mut [T], addend: &[T]) {
        for row in rows.chunks_exact_mut(addend.len()) {
            row.iter_mut().zip(addend).for_each(|(value, addend)| *value += *addend);
        }
    }
}

/// `(batch, ..., out)` summed over all positions of a sample: `(batch, out)`.
fn sum_of_samples(gradient: &Tensor) -> Result<Tensor> {
    on_cuda!(gradient => crate::cuda::sum_positions(gradient, true));
    let (batch, out) = (gradient.dims()[0], gradient.dims()[gradient.rank() - 1]);
    Ok(gradient.reshape((batch, (), out))?.sum(1)?)
}

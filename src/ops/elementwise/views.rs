//! Other shapes, and parts, of a tensor, in the same memory.

use candle_core::{D, Shape, Tensor};

use crate::autograd::{Backward, View, apply_views};
use crate::{Error, Result};

/// The numbers of `x` in another shape. Shares the storage where `x` is contiguous.
///
/// # Errors
/// [`Error::Argument`] where the shape has another number of elements.
pub fn reshape(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    if shape.elem_count() != x.elem_count() {
        let expected = format!("{} elements, as in {:?}", x.elem_count(), x.dims());
        return Err(Error::argument("reshape", "shape", expected, format!("{:?}", shape.dims())));
    }
    if shape == *x.shape() {
        return Ok(x.clone());
    }
    first(apply_views(Reshape { shape }, x)?)
}

/// The channels `start..start + length` of `x`, in the same memory.
///
/// # Errors
/// [`Error::Argument`] where they are not all there.
pub fn narrow(x: &Tensor, start: usize, length: usize) -> Result<Tensor> {
    let channels = channels("narrow", x)?;
    let rest = start.checked_add(length).and_then(|end| channels.checked_sub(end));
    let Some(rest) = rest else {
        let found = format!("{length} channels from {start}");
        return Err(Error::argument("narrow", "length", format!("a part of {channels} channels"), found));
    };
    first(apply_views(Narrow { before: start, length, after: rest }, x)?)
}

/// `x` cut along the channels into parts of the given widths, all in the same memory.
///
/// # Errors
/// [`Error::Argument`] where the widths do not add up to the channels of `x`.
pub fn split(x: &Tensor, widths: &[usize]) -> Result<Vec<Tensor>> {
    let channels = channels("split", x)?;
    if widths.iter().sum::<usize>() != channels {
        let expected = format!("a sum of {channels}, the channels of x");
        return Err(Error::argument("split", "widths", expected, format!("{widths:?}")));
    }
    apply_views(Split { widths: widths.to_vec() }, x)
}

fn channels(operation: &'static str, x: &Tensor) -> Result<usize> {
    x.dims().last().copied().ok_or_else(|| Error::argument(operation, "x", "(..., channels)", "no dimension"))
}

fn first(mut views: Vec<Tensor>) -> Result<Tensor> {
    views.pop().ok_or_else(|| Error::argument("view", "outputs", "one output", "none"))
}

struct Reshape {
    shape: Shape,
}

impl View for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }

    fn views(&self, x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        Ok(vec![x.reshape(&self.shape)?])
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Tensor> {
        Ok(context.gradient()?.reshape(context.inputs[0].shape())?)
    }
}

struct Narrow {
    before: usize,
    length: usize,
    after: usize,
}

impl View for Narrow {
    fn name(&self) -> &'static str {
        "narrow"
    }

    fn views(&self, x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        Ok(vec![x.narrow(D::Minus1, self.before, self.length)?])
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Tensor> {
        Ok(context.gradient()?.pad_with_zeros(D::Minus1, self.before, self.after)?)
    }
}

struct Split {
    widths: Vec<usize>,
}

impl View for Split {
    fn name(&self) -> &'static str {
        "split"
    }

    fn views(&self, x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        let starts = self.widths.iter().scan(0, |next, width| {
            *next += width;
            Some(*next - width)
        });
        starts.zip(&self.widths).map(|(start, width)| x.narrow(D::Minus1, start, *width)).collect()
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Tensor> {
        let x = &context.inputs[0];
        let part = |(gradient, width): (&Option<Tensor>, &usize)| match gradient {
            Some(gradient) => Ok(gradient.clone()),
            None => {
                let mut shape = x.dims().to_vec();
                shape.pop();
                shape.push(*width);
                Tensor::zeros(shape, x.dtype(), x.device())
            }
        };
        let parts = context.gradients.iter().zip(&self.widths).map(part);
        Ok(Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, D::Minus1)?)
    }
}

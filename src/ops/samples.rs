//! Whole samples of a batch: repeated, selected, apart and together.
//!
//! They do what candle's own operations do, and can be noted on a [`tape`](crate::autograd::tape).

use candle_core::Tensor;

use super::{TokenSelection, reshape, select_tokens};
use crate::autograd::{Backward, Forward, Function, Output, Value, View, apply, apply_views};
use crate::{Error, Result};

fn batch(operation: &'static str, x: &Tensor) -> Result<usize> {
    x.dims().first().copied().ok_or_else(|| Error::argument(operation, "x", "(batch, ...)", "no dimension"))
}

/// `x` `(1, ...)` as a batch of `count` samples that are the same, in the same memory.
///
/// # Errors
/// [`Error::Argument`] where `x` is no batch of one.
pub(crate) fn repeat_sample(x: &Tensor, count: usize) -> Result<Tensor> {
    if batch("repeat_sample", x)? != 1 {
        return Err(Error::argument("repeat_sample", "x", "(1, ...)", format!("{:?}", x.dims())));
    }
    let mut views = apply_views(Repeat { count }, x)?;
    Ok(views.swap_remove(0)) // it makes one
}

struct Repeat {
    count: usize,
}

impl View for Repeat {
    fn name(&self) -> &'static str {
        "repeat_sample"
    }

    fn views(&self, x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        let mut shape = x.dims().to_vec();
        shape[0] = self.count;
        Ok(vec![x.broadcast_as(shape)?])
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Tensor> {
        Ok(context.gradient()?.sum_keepdim(0)?)
    }
}

/// The samples of `x` at these places, each at most once; `x` itself where they are all of them in order.
///
/// # Errors
/// [`Error::Argument`] where there is none, or a place is not there or given twice.
pub(crate) fn select_samples(x: &Tensor, places: &[usize]) -> Result<Tensor> {
    let count = batch("select_samples", x)?;
    if places.iter().copied().eq(0..count) {
        return Ok(x.clone());
    }
    // Rows of one long sequence: candle's index_select adds up in its gradient, which is slow for large samples.
    let places: Vec<u32> = places.iter().map(|place| u32::try_from(*place).unwrap_or(u32::MAX)).collect();
    let (kept, selection) = (places.len(), TokenSelection::new(places, count, x.device())?);
    let rows = reshape(x, (1, count, x.elem_count() / count.max(1)))?;
    reshape(&select_tokens(&rows, &selection)?, [&[kept], &x.dims()[1..]].concat())
}

/// The samples of `x`, each a batch of one in the same memory.
///
/// # Errors
/// [`Error::Argument`] where `x` has no dimension.
pub(crate) fn split_samples(x: &Tensor) -> Result<Vec<Tensor>> {
    batch("split_samples", x)?;
    apply_views(Split, x)
}

struct Split;

impl View for Split {
    fn name(&self) -> &'static str {
        "split_samples"
    }

    fn views(&self, x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        (0..x.dims()[0]).map(|i| x.narrow(0, i, 1)).collect()
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Tensor> {
        let x = &context.inputs[0];
        let mut shape = x.dims().to_vec();
        shape[0] = 1;
        let part = |gradient: &Option<Tensor>| match gradient {
            Some(gradient) => Ok(gradient.clone()),
            None => Tensor::zeros(&shape[..], x.dtype(), x.device()),
        };
        Ok(Tensor::cat(&context.gradients.iter().map(part).collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }
}

/// Batches one after the other.
///
/// # Errors
/// [`Error::Candle`] where they differ in more than the number of samples, or there is none.
pub(crate) fn join_samples(batches: &[Tensor]) -> Result<Tensor> {
    apply(Join, &batches.iter().collect::<Vec<_>>())
}

struct Join;

impl Function for Join {
    fn name(&self) -> &'static str {
        "join_samples"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        Ok(Output::Tensor(Tensor::cat(inputs, 0)?).into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (gradient, mut start) = (context.gradient()?, 0);
        let part = |input: &Tensor| {
            let count = input.dims()[0];
            start += count;
            Ok(Some(gradient.narrow(0, start - count, count)?))
        };
        context.inputs.iter().map(part).collect()
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::autograd::{check_gradients, taped};
    use crate::random::Address;

    fn random(shape: &[usize]) -> Result<Tensor> {
        Address::new(11, "samples").normal(shape, DType::F64, &Device::Cpu)
    }

    /// Gradients by candle's graph and on a tape.
    fn check(x: Tensor, function: fn(&Tensor) -> Result<Vec<Tensor>>) -> Result<()> {
        for on_tape in [false, true] {
            let check = check_gradients(std::slice::from_ref(&x), |x| match on_tape {
                true => taped(&[&x[0]], move |x| function(&x[0])),
                false => function(&x[0]),
            })?;
            assert!(check.worst() < 1e-8 && check.norms[0] > 0.1, "{check:?}");
        }
        Ok(())
    }

    #[test]
    fn selected_samples_are_those_asked_for_in_their_order() -> Result<()> {
        let x = random(&[4, 2, 3])?;
        let selected = select_samples(&x, &[3, 1])?;
        for (place, sample) in [3, 1].into_iter().enumerate() {
            let (found, expected) = (selected.get(place)?, x.get(sample)?);
            assert_eq!(found.to_vec2::<f64>()?, expected.to_vec2::<f64>()?);
        }
        assert_eq!(select_samples(&x, &[0, 1, 2, 3])?.id(), x.id());
        for places in [[0, 4], [2, 2]] {
            assert!(select_samples(&x, &places).unwrap_err().to_string().contains("below 4, each once"));
        }
        check(x, |x| Ok(vec![select_samples(x, &[3, 1])?]))
    }

    #[test]
    fn a_repeated_sample_gets_the_sum_of_all_gradients() -> Result<()> {
        let x = random(&[1, 2, 3])?;
        assert_eq!(repeat_sample(&x, 3)?.sum(0)?.to_vec2::<f64>()?, (x.squeeze(0)? * 3.0)?.to_vec2::<f64>()?);
        assert!(repeat_sample(&random(&[2, 3])?, 2).unwrap_err().to_string().contains("(1, ...)"));
        check(x, |x| Ok(vec![repeat_sample(x, 3)?]))
    }

    #[test]
    fn what_was_split_is_joined_again() -> Result<()> {
        let x = random(&[3, 2, 2])?;
        let joined = join_samples(&split_samples(&x)?)?;
        assert_eq!(joined.flatten_all()?.to_vec1::<f64>()?, x.flatten_all()?.to_vec1::<f64>()?);
        check(x, |x| {
            let parts = split_samples(x)?;
            // The last sample is no part of it.
            Ok(vec![join_samples(&[parts[1].clone(), parts[0].clone()])?])
        })
    }
}

//! Concatenation along the channels.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{D, Storage, Tensor};

use crate::autograd::{Backward, Forward, Function, Output, Value, apply};
use crate::ops::support::same_kind;
use crate::{Error, Result};

/// `a` and `b` side by side: how an up block takes in a skip connection.
///
/// `a`: `(..., a channels)`; `b`: `(..., b channels)`, equal but for the channels. Returns `(..., a + b channels)`.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit.
pub fn concat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_kind("concat_channels", a, "b", b)?;
    match (a.dims().split_last(), b.dims().split_last()) {
        (Some((a_channels, a_rest)), Some((b_channels, b_rest))) if a_rest == b_rest => {
            apply(ConcatChannels { widths: [*a_channels, *b_channels] }, &[a, b])
        }
        _ => {
            let expected = format!("{:?}, but for the channels", a.dims());
            Err(Error::argument("concat_channels", "b", expected, format!("{:?}", b.dims())))
        }
    }
}

struct ConcatChannels {
    widths: [usize; 2],
}

impl Function for ConcatChannels {
    fn name(&self) -> &'static str {
        "concat_channels"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let (a, b) = (&inputs[0], &inputs[1]);
        #[cfg(feature = "cuda")]
        if super::cuda::takes(a) {
            let shape = shape(a, self.widths.iter().sum()).into();
            return Ok(super::cuda::concat(a, b, self.widths, shape)?.into());
        }
        if super::cpu::takes(a) {
            return Ok(super::cpu::concat(a, b, self.widths, &shape(a, self.widths.iter().sum()))?.into());
        }
        let ((a_storage, _), (b_storage, _)) = (a.storage_and_layout(), b.storage_and_layout());
        let storage = match (&*a_storage, &*b_storage) {
            (Storage::Cpu(left), Storage::Cpu(right)) => Storage::Cpu(concat([(left, a), (right, b)])?),
            (Storage::Cuda(left), Storage::Cuda(right)) => Storage::Cuda(concat([(left, a), (right, b)])?),
            _ => return Err(Error::argument("concat_channels", "device", "a CPU or CUDA device", "another")),
        };
        Ok(Output::Fresh(storage, shape(a, self.widths.iter().sum()).into()).into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let gradient = context.gradient()?;
        #[cfg(feature = "cuda")]
        if super::cuda::takes(gradient) {
            return Ok(super::cuda::split(gradient, self.widths, [context.needs[0], context.needs[1]])?.into());
        }
        let [a, b] = self.widths;
        if super::cpu::takes(gradient) {
            let part = |first: usize, width: usize, needed: bool| {
                let shape = shape(gradient, width);
                needed.then(|| super::cpu::channels(gradient, first, &shape).map(Output::into_tensor)).transpose()
            };
            return Ok(vec![part(0, a, context.needs[0])?, part(a, b, context.needs[1])?]);
        }
        Ok(vec![Some(gradient.narrow(D::Minus1, 0, a)?), Some(gradient.narrow(D::Minus1, a, b)?)])
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

/// The shape of `x` with another number of channels.
fn shape(x: &Tensor, channels: usize) -> Vec<usize> {
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = channels;
    }
    shape
}

fn concat<S>(parts: [(&S, &Tensor); 2]) -> candle_core::Result<S>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let widths = parts.map(|(_, x)| x.dims().last().copied().unwrap_or(0));
    let (storage, x) = parts[0];
    let total: usize = widths.iter().sum();
    let rows = x.dims().iter().rev().skip(1).product();
    // SAFETY: the copies below write every element before anything reads one.
    let mut joined = unsafe { storage.device().alloc_uninit(&shape(x, total).into(), storage.dtype())? };
    let mut start = 0;
    for ((storage, x), width) in parts.into_iter().zip(widths) {
        if rows * width > 0 {
            storage.copy2d(&mut joined, rows, width, width, total, x.layout().start_offset(), start)?;
        }
        start += width;
    }
    Ok(joined)
}

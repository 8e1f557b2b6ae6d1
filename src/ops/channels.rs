//! What the operations that treat every channel by itself share.

use candle_core::Tensor;

use super::support::{Real, same_kind};
use crate::{Error, Result};

/// Pixels that are one parallel task. A constant, so that no sum depends on the number of threads.
pub(super) const PIXELS: usize = 512;

/// The sum of vectors of a length, in their order.
pub(super) fn add_in_order<T: Real>(length: usize, parts: Vec<Vec<T>>) -> Vec<T> {
    let mut total = vec![T::of(0.0); length];
    for part in parts {
        total.iter_mut().zip(&part).for_each(|(total, value)| *total += *value);
    }
    total
}

/// Refuses a parameter that has not one number for every channel of `x` `(..., channels)`.
pub(super) fn check_per_channel(
    function: &'static str,
    x: &Tensor,
    argument: &'static str,
    parameter: &Tensor,
) -> Result<()> {
    same_kind(function, x, argument, parameter)?;
    match x.dims().last() {
        Some(&channels) if channels > 0 && parameter.dims() == [channels] => Ok(()),
        channels => {
            let expected = format!("one number for each of the channels ({channels:?})");
            Err(Error::argument(function, argument, expected, format!("{:?}", parameter.dims())))
        }
    }
}

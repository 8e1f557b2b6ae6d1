//! Bicubic resizing, channels last.

#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::resize_bilinear::{Filter, ResizeBilinear, Taps, filtered};
use crate::autograd::apply;
use crate::{Error, Result};

/// Bicubic resizing with Keys' filter, a = -0.5, which is stretched by the factor of a reduction (torch:
/// `F.interpolate(mode="bicubic", align_corners=False, antialias=True)`; Pillow: `BICUBIC`, but not rounded to bytes).
///
/// `x`: `(batch, height, width, channels)`. Returns `(batch, height, width, channels)` of the height and width given.
/// The result may overshoot the range of `x`. Gradient for `x`: the transposed resampling.
///
/// # Errors
/// [`Error::Argument`] where `x` has another rank or is empty, or the new height or width is 0.
pub fn resize_bicubic(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    if x.rank() != 4 || x.elem_count() == 0 {
        let expected = "(batch, height, width, channels), none of them 0";
        return Err(Error::argument("resize_bicubic", "x", expected, format!("{:?}", x.dims())));
    }
    for (argument, size) in [("height", height), ("width", width)] {
        if size == 0 {
            return Err(Error::argument("resize_bicubic", argument, "at least 1", "0"));
        }
    }
    let (_, old_height, old_width, _) = x.dims4()?;
    let along = |from: usize, to: usize| Taps { from, rows: (0..to).map(|output| taps(from, to, output)).collect() };
    let (vertical, horizontal) = (along(old_height, height), along(old_width, width));
    apply(ResizeBilinear { vertical, horizontal, filter: Filter::Bicubic }, &[x])
}

/// The input pixels that an output pixel of an axis is made of, with their weights.
pub(crate) fn taps(from: usize, to: usize, output: usize) -> Vec<(usize, f64)> {
    filtered(from, from as f64 / to as f64, output, 2.0, |x| {
        const A: f64 = -0.5;
        let x = x.abs();
        if x < 1.0 {
            ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
        } else if x < 2.0 {
            (((x - 5.0) * x + 8.0) * x - 4.0) * A
        } else {
            0.0
        }
    })
}

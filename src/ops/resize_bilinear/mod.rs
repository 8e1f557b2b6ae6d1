//! Bilinear resizing, channels last.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::support::{dispatch, on_cuda};
use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::{Error, Result};

/// Bilinear resizing (torch: `F.interpolate(mode="bilinear", align_corners=False, antialias=antialias)`, in
/// channels-last layout).
///
/// `x`: `(batch, height, width, channels)`. Returns `(batch, height, width, channels)` of the height and width given.
/// With `antialias`, the triangle filter is stretched by the factor of a reduction, so every input pixel counts; an
/// enlargement is the same with and without. Gradient for `x`: the transposed resampling.
///
/// # Errors
/// [`Error::Argument`] where `x` has another rank or is empty, or the new height or width is 0.
pub fn resize_bilinear(x: &Tensor, height: usize, width: usize, antialias: bool) -> Result<Tensor> {
    if x.rank() != 4 || x.elem_count() == 0 {
        let expected = "(batch, height, width, channels), none of them 0";
        return Err(Error::argument("resize_bilinear", "x", expected, format!("{:?}", x.dims())));
    }
    for (argument, size) in [("height", height), ("width", width)] {
        if size == 0 {
            return Err(Error::argument("resize_bilinear", argument, "at least 1", "0"));
        }
    }
    let (_, old_height, old_width, _) = x.dims4()?;
    let vertical = Taps::new(old_height, height, antialias);
    let horizontal = Taps::new(old_width, width, antialias);
    let filter = if antialias { Filter::Triangle } else { Filter::Linear };
    apply(ResizeBilinear { vertical, horizontal, filter }, &[x])
}

/// Resizing by a filter that treats the axes one after the other.
pub(super) struct ResizeBilinear {
    pub(super) vertical: Taps,
    pub(super) horizontal: Taps,
    /// What the taps were made of.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "the CPU goes by the taps alone"))]
    pub(super) filter: Filter,
}

/// The filters, as the GPU's kernels count them.
#[derive(Clone, Copy)]
pub(super) enum Filter {
    /// Between the two pixels at the sides of a point.
    Linear,
    /// The same, stretched by the factor of a reduction.
    Triangle,
    /// Keys' cubic with a = -0.5, stretched likewise.
    Bicubic,
}

/// The linear map from the pixels of one axis to those of its resized version.
pub(super) struct Taps {
    pub(super) from: usize,
    /// For every output pixel, input pixels and their weights.
    pub(super) rows: Vec<Vec<(usize, f64)>>,
}

/// The taps of one output pixel: a filter that reaches `support` pixels to both sides, stretched by the factor of a
/// reduction, sampled at the centres of the pixels and normalised (Pillow: `precompute_coeffs`).
pub(super) fn filtered(
    from: usize,
    scale: f64,
    output: usize,
    support: f64,
    filter: impl Fn(f64) -> f64,
) -> Vec<(usize, f64)> {
    let (centre, stretch) = (scale * (output as f64 + 0.5), scale.max(1.0));
    let reach = support * stretch;
    let first = (centre - reach + 0.5).max(0.0) as usize;
    let end = ((centre + reach + 0.5) as usize).min(from);
    let weight = |i: usize| filter((i as f64 - centre + 0.5) / stretch);
    let total: f64 = (first..end).map(weight).sum();
    (first..end).map(|i| (i, weight(i) / total)).collect()
}

impl Taps {
    fn new(from: usize, to: usize, antialias: bool) -> Self {
        let scale = from as f64 / to as f64;
        let row = |output: usize| {
            let centre = scale * (output as f64 + 0.5);
            if antialias {
                return filtered(from, scale, output, 1.0, |x| (1.0 - x.abs()).max(0.0));
            }
            let position = (centre - 0.5).max(0.0);
            let first = (position as usize).min(from - 1);
            let second = (first + 1).min(from - 1);
            let share = position - first as f64;
            if first == second { vec![(first, 1.0)] } else { vec![(first, 1.0 - share), (second, share)] }
        };
        Taps { from, rows: (0..to).map(row).collect() }
    }

    fn transposed(&self) -> Self {
        let mut rows = vec![Vec::new(); self.from];
        for (output, taps) in self.rows.iter().enumerate() {
            taps.iter().for_each(|(input, weight)| rows[*input].push((output, *weight)));
        }
        Taps { from: self.rows.len(), rows }
    }
}

impl Function for ResizeBilinear {
    fn name(&self) -> &'static str {
        "resize_bilinear"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(self, &inputs[0]));
        dispatch!("resize_bilinear", inputs[0], T => cpu::forward::<T>(self, &inputs[0]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(self, context));
        dispatch!("resize_bilinear", context.inputs[0], T => cpu::backward::<T>(self, context))
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

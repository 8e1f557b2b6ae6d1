//! Affine warping, channels last.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::support::{dispatch, on_cuda};
use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::{Error, Result};

/// Samples every picture at affinely mapped positions, bilinearly, with zeros outside (OpenCV: `warpAffine` with
/// `WARP_INVERSE_MAP`, exact rather than in fixed point).
///
/// `x`: `(batch, height, width, channels)`. `matrices`: one for each sample, which maps an output pixel `(x, y, 1)` to
/// its position `(x, y)` in the input; pixel centres have whole coordinates. Returns `(batch, height, width,
/// channels)` of the height and width given. Gradient for `x`; the matrices are constants.
///
/// # Errors
/// [`Error::Argument`] where `x` has another rank or is empty, there is not one matrix for each sample, a matrix is not
/// finite, or the new height or width is 0.
pub fn warp_affine(x: &Tensor, matrices: &[[[f64; 3]; 2]], height: usize, width: usize) -> Result<Tensor> {
    let wrong =
        |argument, expected: String, found: String| Err(Error::argument("warp_affine", argument, expected, found));
    if x.rank() != 4 || x.elem_count() == 0 {
        let expected = "(batch, height, width, channels), none of them 0".to_owned();
        return wrong("x", expected, format!("{:?}", x.dims()));
    }
    if matrices.len() != x.dims()[0] {
        return wrong("matrices", format!("{}, one for each sample", x.dims()[0]), matrices.len().to_string());
    }
    if let Some(matrix) = matrices.iter().find(|matrix| !matrix.as_flattened().iter().all(|m| m.is_finite())) {
        return wrong("matrices", "finite numbers".to_owned(), format!("{matrix:?}"));
    }
    for (argument, size) in [("height", height), ("width", width)] {
        if size == 0 {
            return wrong(argument, "at least 1".to_owned(), "0".to_owned());
        }
    }
    apply(WarpAffine { matrices: matrices.to_vec(), height, width }, &[x])
}

struct WarpAffine {
    matrices: Vec<[[f64; 3]; 2]>,
    height: usize,
    width: usize,
}

impl Function for WarpAffine {
    fn name(&self) -> &'static str {
        "warp_affine"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(self, &inputs[0]));
        dispatch!("warp_affine", inputs[0], T => cpu::forward::<T>(self, &inputs[0]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(self, context));
        dispatch!("warp_affine", context.inputs[0], T => cpu::backward::<T>(self, context))
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

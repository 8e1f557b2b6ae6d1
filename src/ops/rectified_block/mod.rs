//! Three convolutions with rectifiers and a skip, the block TAESD is made of, as one operation where its weights are frozen.
//!
//! At 1024 pixels every intermediate is 134 MB a picture in bf16, and the convolutions of 64 channels take hardly longer
//! than reading and writing it. So nothing but the block's input and output is kept, rectifiers are applied as the
//! convolutions write, and so are their derivatives in the backward pass.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::Tensor;

use super::conv2d::conv2d_with;
use super::{Activation, Addends, activation};
use crate::Result;

/// `relu(x + c(relu(b(relu(a(x))))))` with 3 x 3 convolutions `a`, `b` and `c` of stride 1, padded by 1, each given by
/// weight and bias.
///
/// `x`: `(batch, height, width, channels)`; weights `(channels, 3, 3, channels)`. Returns the shape of `x`.
///
/// # Errors
/// As [`conv2d`](super::conv2d).
pub fn rectified_block(x: &Tensor, convolutions: [(&Tensor, &Tensor); 3]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if is_lean(x, convolutions) {
        let [a, b, c] = convolutions;
        return crate::autograd::apply(cuda::RectifiedBlock, &[x, a.0, a.1, b.0, b.1, c.0, c.1]);
    }
    let [a, b, c] = convolutions;
    let y = activation(&conv2d_with(x, a.0, &Addends::bias(Some(a.1)), 1, 1)?, Activation::Relu)?;
    let y = activation(&conv2d_with(&y, b.0, &Addends::bias(Some(b.1)), 1, 1)?, Activation::Relu)?;
    let addends = Addends { bias: Some(c.1), residual: Some(x), ..Addends::default() };
    activation(&conv2d_with(&y, c.0, &addends, 1, 1)?, Activation::Relu)
}

/// Whether [`rectified_block`] keeps nothing but input and output: on a GPU, with frozen weights that fit the input.
pub(crate) fn is_lean(x: &Tensor, convolutions: [(&Tensor, &Tensor); 3]) -> bool {
    let fits = |(weight, bias): (&Tensor, &Tensor)| {
        let channels = x.dims()[x.rank() - 1];
        let frozen = |tensor: &Tensor| {
            !tensor.track_op() && tensor.dtype() == x.dtype() && tensor.device().same_device(x.device())
        };
        frozen(weight) && frozen(bias) && weight.dims() == [channels, 3, 3, channels] && bias.dims() == [channels]
    };
    x.device().is_cuda() && x.rank() == 4 && x.elem_count() > 0 && convolutions.into_iter().all(fits)
}

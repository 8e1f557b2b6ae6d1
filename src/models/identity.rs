//! What a network must do to tell persons apart.

use candle_core::{D, Tensor};

use super::image_dims;
use crate::{Error, Result, ops};

/// A network that maps a face to a vector of unit length, near those of the same person (ArcFace and its kin).
pub trait IdentityNetwork: Send + Sync {
    /// Embeds aligned crops `(batch, 3, crop_size, crop_size)`, RGB in `[-1, 1]`, as
    /// [`aligned_crop`](crate::face::aligned_crop) makes them, to `(batch, dimension)`, of unit length, in f32 where the
    /// network computes in bf16 or f16. Differentiable in the pixels.
    ///
    /// # Errors
    /// Where the shape is another.
    fn embed(&self, faces: &Tensor) -> Result<Tensor>;

    /// Width and height of the crops.
    fn crop_size(&self) -> usize;

    /// Length of an embedding.
    fn dimension(&self) -> usize;
}

/// Vectors of unit length: `x` `(..., dimension)` divided by its norm, in f32 for bf16 and f16. The zero vector stays
/// zero.
pub(crate) fn normalise(x: &Tensor) -> Result<Tensor> {
    let x = ops::widen(x)?;
    // Small enough not to be seen in f32 beside any norm that means something.
    let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
    Ok(x.broadcast_div(&norm)?)
}

/// Refuses crops of another shape than `(batch, 3, size, size)`.
pub(crate) fn check_faces(function: &'static str, faces: &Tensor, size: usize) -> Result<()> {
    let (_, height, width) = image_dims(function, faces)?;
    if (height, width) != (size, size) {
        let expected = format!("(batch, 3, {size}, {size})");
        return Err(Error::argument(function, "faces", expected, format!("{:?}", faces.dims())));
    }
    Ok(())
}

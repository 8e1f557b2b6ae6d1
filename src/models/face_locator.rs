//! What a network must do to find a face.

use candle_core::Tensor;

use crate::Result;
use crate::face::Landmarks;

/// A network that finds the five landmarks of the face in a picture.
pub trait FaceLocator: Send + Sync {
    /// The landmarks of the face in each of the images `(batch, 3, height, width)` in `[-1, 1]`, in pixels; `None`
    /// where no face is found. Of several faces the most prominent one. No gradient passes.
    ///
    /// # Errors
    /// Where the shape is another.
    fn locate(&self, images: &Tensor) -> Result<Vec<Option<Landmarks>>>;
}

//! The lookahead loss (equation 4): an image-space distance between the decoded preview and the conditioning image.

use candle_core::Tensor;

use crate::Result;

/// The value of an image loss.
#[derive(Clone, Debug)]
pub struct LossValue {
    /// The mean over the samples that counted; a scalar. Zero, and no part of a graph, where none did.
    pub loss: Tensor,
    /// How many samples counted.
    pub counted: usize,
}

/// D(D_VAE(z_0), I_c) of equation 4: any distance between images through which a gradient flows to the preview.
pub trait ImageLoss: Send + Sync {
    /// A short name for logs (`"identity"`).
    fn name(&self) -> &str;

    /// The distance between previews and conditioning images, both `(batch, 3, height, width)`, RGB in [-1, 1].
    ///
    /// # Errors
    /// Where the shapes do not fit.
    fn loss(&self, previews: &Tensor, conditioning_images: &Tensor) -> Result<LossValue>;
}

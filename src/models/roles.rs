//! What the method asks of the networks around the U-Net. Anything that fills a role can take part: the published
//! networks, the miniature's, or a user's own.

use candle_core::{Device, Tensor};

use super::clip_text::{ClipText, TextEmbeddings};
use super::clip_vision::ClipVision;
use super::taesd::Taesd;
use super::tokenizer::PromptTokenizer;
use crate::Result;
use crate::random::Address;

/// Turns images into latents.
pub trait LatentEncoder: Send + Sync {
    /// `images`: `(batch, 3, height, width)`, RGB in [-1, 1]. Returns scaled latents (variance near one),
    /// `(batch, channels, height / factor, width / factor)`. An encoder that samples its posterior draws at `noise`.
    ///
    /// # Errors
    /// Where the shape does not fit.
    fn encode(&self, images: &Tensor, noise: Address) -> Result<Tensor>;

    /// Pixels a latent stands for, in each direction (8 for SDXL).
    fn factor(&self) -> usize;
}

/// Turns latents into images.
pub trait LatentDecoder: Send + Sync {
    /// `latents`: scaled latents `(batch, channels, height, width)`. Returns images in [-1, 1], not clamped. The
    /// gradient flows.
    ///
    /// # Errors
    /// Where the shape does not fit.
    fn decode(&self, latents: &Tensor) -> Result<Tensor>;
}

/// Turns prompts into text embeddings.
pub trait TextEncoder: Send + Sync {
    /// Embeds the prompts of a batch.
    ///
    /// # Errors
    /// Where a prompt cannot be tokenised.
    fn encode(&self, prompts: &[String]) -> Result<TextEmbeddings>;

    /// Embeds the prompts of several batches. For encoders that have to be made ready first, or to which one large
    /// batch is less work than several small ones.
    ///
    /// # Errors
    /// Those of [`TextEncoder::encode`].
    fn encode_batches(&self, batches: &[&[String]]) -> Result<Vec<TextEmbeddings>> {
        batches.iter().map(|prompts| self.encode(prompts)).collect()
    }
}

/// Turns images into features for the resampler.
pub trait ImageEncoder: Send + Sync {
    /// `images`: `(batch, 3, height, width)`, RGB in [-1, 1]. Returns the penultimate hidden states,
    /// `(batch, patches + 1, width)`. No gradient need reach the images.
    ///
    /// # Errors
    /// Where the shape does not fit.
    fn features(&self, images: &Tensor) -> Result<Tensor>;

    /// The features of "no image": a picture that is zero after normalisation, `(1, patches + 1, width)`.
    ///
    /// # Errors
    /// Where memory is out.
    fn null_features(&self) -> Result<Tensor>;
}

impl LatentEncoder for Taesd {
    fn encode(&self, images: &Tensor, _noise: Address) -> Result<Tensor> {
        Taesd::encode(self, images)
    }

    fn factor(&self) -> usize {
        self.config().downscale()
    }
}

impl LatentDecoder for Taesd {
    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        Taesd::decode(self, latents)
    }
}

/// One CLIP text encoder with its tokenizer.
#[derive(Clone, Debug)]
pub struct TokenizedClipText {
    /// Prompts to token ids.
    pub tokenizer: PromptTokenizer,
    /// Token ids to embeddings.
    pub network: ClipText,
}

impl TextEncoder for TokenizedClipText {
    fn encode(&self, prompts: &[String]) -> Result<TextEmbeddings> {
        self.network.forward(&self.tokenizer.encode(prompts, &Device::Cpu)?)
    }

    fn encode_batches(&self, batches: &[&[String]]) -> Result<Vec<TextEmbeddings>> {
        self.encode(&batches.concat())?.split(batches)
    }
}

impl ImageEncoder for ClipVision {
    fn features(&self, images: &Tensor) -> Result<Tensor> {
        // On a GPU the pictures stay there: the same filter, without the original's rounding to bytes in between.
        let pixel_values = match images.device().is_cuda() {
            true => self.preprocess(images)?,
            false => self.pixel_values(images)?,
        };
        self.penultimate_hidden_states(&pixel_values)
    }

    fn null_features(&self) -> Result<Tensor> {
        ClipVision::null_features(self)
    }
}

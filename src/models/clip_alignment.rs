//! How well pictures fit texts, by CLIP (Radford et al. 2021): the CLIP-T of evaluations, and a loss.

use candle_core::Tensor;

use super::clip_text::{self, ClipText};
use super::clip_vision::{self, ClipVision};
use super::identity::normalise;
use super::roles::TokenizedClipText;
use super::tokenizer::PromptTokenizer;
use crate::nn::{Init, Weights};
use crate::{Error, Result};

/// Both towers of a CLIP model, with the tensor names of transformers' `CLIPModel`.
#[derive(Clone, Debug)]
pub struct ClipAlignment {
    text: TokenizedClipText,
    vision: ClipVision,
    logit_scale: Tensor,
}

impl ClipAlignment {
    /// Loads `text_model.*`, `text_projection`, `vision_model.*`, `visual_projection` and `logit_scale`; for OpenAI's
    /// ViT-B/16 with [`clip_text::Config::vit_b_16`] and [`clip_vision::Config::vit_b_16`].
    ///
    /// # Errors
    /// [`Error::Config`] where the towers do not end in the same space, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(
        text: &clip_text::Config,
        vision: &clip_vision::Config,
        tokenizer: PromptTokenizer,
        weights: &Weights,
    ) -> Result<Self> {
        if text.projection_dim != Some(vision.projection_dim) {
            return Err(Error::Config {
                source_name: "clip_alignment".into(),
                field: "projection_dim".into(),
                reason: format!(
                    "must be the image tower's ({}), found {:?}",
                    vision.projection_dim, text.projection_dim
                ),
            });
        }
        Ok(ClipAlignment {
            text: TokenizedClipText { tokenizer, network: ClipText::load(text, weights)? },
            vision: ClipVision::load(vision, weights)?,
            logit_scale: weights.get((), "logit_scale", Init::Zeros)?,
        })
    }

    /// The embeddings of texts, of unit length: `(texts, projection_dim)`.
    ///
    /// # Errors
    /// Where a text cannot be tokenised.
    pub fn embed_texts(&self, texts: &[String]) -> Result<Tensor> {
        self.embed_ids(&self.text.tokenizer.encode(texts, self.text.network.device())?)
    }

    /// The same for token ids, u32 `(texts, tokens)`.
    ///
    /// # Errors
    /// Those of [`ClipText::forward`].
    pub fn embed_ids(&self, ids: &Tensor) -> Result<Tensor> {
        normalise(&self.text.network.forward(ids)?.pooled)
    }

    /// The embeddings of images `(batch, 3, height, width)` in [-1, 1], of unit length: `(batch, projection_dim)`.
    /// Differentiable in the pixels.
    ///
    /// # Errors
    /// Where the shape is another.
    pub fn embed_images(&self, images: &Tensor) -> Result<Tensor> {
        self.embed_pixel_values(&self.vision.preprocess(images)?)
    }

    /// The same for images that are preprocessed already, as
    /// [`clip_pixel_values`](super::clip_image_processor::clip_pixel_values) makes them.
    ///
    /// # Errors
    /// Where the shape is another.
    pub fn embed_pixel_values(&self, pixel_values: &Tensor) -> Result<Tensor> {
        normalise(&self.vision.forward(pixel_values)?.pooled)
    }

    /// Cosines of images with texts, `(images, texts)`, from their embeddings. CLIP-T is their mean, times 100.
    ///
    /// # Errors
    /// Where the widths differ.
    pub fn cosines(&self, images: &Tensor, texts: &Tensor) -> Result<Tensor> {
        Ok(images.matmul(&texts.t()?)?)
    }

    /// The cosines times the model's learnt scale (transformers: `logits_per_image`), about 100 for OpenAI's models.
    ///
    /// # Errors
    /// Where the widths differ.
    pub fn logits(&self, images: &Tensor, texts: &Tensor) -> Result<Tensor> {
        Ok(self.cosines(images, texts)?.broadcast_mul(&self.logit_scale.exp()?)?)
    }
}

//! The frozen networks the method stands on.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::IdentityLoss;
use crate::models::clip_text::TextEmbeddings;
use crate::models::face_locator::FaceLocator;
use crate::models::identity::IdentityNetwork;
use crate::models::roles::{ImageEncoder, LatentDecoder, LatentEncoder, TextEncoder};
use crate::models::unet::{Conditioning, UNet};
use crate::nn::LoraSet;
use crate::random::Address;
use crate::schedule::NoiseSchedule;
use crate::{Error, Result};

/// All frozen networks of the method: one U-Net, which serves as KV encoder, denoiser and (with the LCM-LoRA) preview
/// denoiser; and the networks around it. Cheap to clone: clones share the weights.
#[derive(Clone)]
pub struct Base {
    /// The denoiser.
    pub unet: UNet,
    /// The LoRA that makes the denoiser a latent consistency model (Luo et al. 2023b).
    pub lcm_lora: LoraSet,
    /// The diffusion process the U-Net was trained with.
    pub schedule: NoiseSchedule,
    /// Images to latents.
    pub encoder: Arc<dyn LatentEncoder>,
    /// Latents to the final images.
    pub decoder: Arc<dyn LatentDecoder>,
    /// Latents to previews; small, for the gradient passes through it (the paper uses TinyVAE).
    pub preview_decoder: Arc<dyn LatentDecoder>,
    /// Prompts to embeddings.
    pub text_encoder: Arc<dyn TextEncoder>,
    /// Conditioning images to features.
    pub image_encoder: Arc<dyn ImageEncoder>,
    /// Aligned faces to embeddings, for the identity loss.
    pub identity_network: Arc<dyn IdentityNetwork>,
    /// Images to facial landmarks.
    pub face_locator: Arc<dyn FaceLocator>,
    /// Height and width of the images, in pixels.
    pub resolution: usize,
    /// Type the networks compute in.
    pub dtype: DType,
    /// Where they lie.
    pub device: Device,
}

impl Base {
    /// Text conditioning for pictures of this base's resolution.
    ///
    /// # Errors
    /// Those of the text encoder.
    pub fn conditioning(&self, prompts: &[String]) -> Result<Conditioning> {
        Ok(self.square(&self.text_encoder.encode(prompts)?))
    }

    /// The same for two batches of prompts.
    pub(crate) fn conditionings(&self, batches: [&[String]; 2]) -> Result<[Conditioning; 2]> {
        let texts = self.text_encoder.encode_batches(&batches)?;
        match <[TextEmbeddings; 2]>::try_from(texts) {
            Ok(texts) => Ok(texts.map(|text| self.square(&text))),
            Err(texts) => {
                let found = texts.len().to_string();
                Err(Error::argument("TextEncoder::encode_batches", "batches", "as many results, 2", found))
            }
        }
    }

    fn square(&self, text: &TextEmbeddings) -> Conditioning {
        Conditioning::square(text.hidden_states.detach(), text.pooled.detach(), self.resolution)
    }

    /// The latents of images `(batch, 3, height, width)` in [-1, 1]; no gradient.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn latents(&self, images: &Tensor, noise: Address) -> Result<Tensor> {
        let images = images.to_dtype(self.dtype)?.to_device(&self.device)?;
        Ok(self.encoder.encode(&images, noise)?.detach())
    }

    /// The image features of conditioning images `(batch, 3, height, width)` in [-1, 1]; no gradient.
    ///
    /// # Errors
    /// Those of the image encoder.
    pub fn image_features(&self, images: &Tensor) -> Result<Tensor> {
        let images = images.to_dtype(self.dtype)?.to_device(&self.device)?;
        Ok(self.image_encoder.features(&images)?.detach())
    }

    /// The identity loss of this base's networks.
    pub fn identity_loss(&self) -> IdentityLoss {
        IdentityLoss::new(self.identity_network.clone(), self.face_locator.clone())
    }
}

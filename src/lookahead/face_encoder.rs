//! The encoder E(I_c) of equation 2: one photograph in, conditions for the denoiser out.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{KvEncoder, KvEncoderConfig};
use crate::Result;
use crate::models::ip_adapter::IpAdapter;
use crate::models::resampler::{self, Resampler};
use crate::models::unet::{ImageTokens, UNet};
use crate::nn::Weights;

/// The shape of a [`FaceEncoder`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaceEncoderConfig {
    /// The resampler from image features to image tokens.
    pub resampler: resampler::Config,
    /// The KV branch; `None` for an encoder that has only the adapter branch.
    pub kv_encoder: Option<KvEncoderConfig>,
}

/// Image tokens of a batch, and the tokens that stand for "no image".
#[derive(Clone, Debug)]
pub struct AdapterTokens {
    /// `(batch, tokens, cross_attention_dim)`.
    pub conditional: Tensor,
    /// `(1, tokens, cross_attention_dim)`.
    pub unconditional: Tensor,
}

/// The trainable half of the method (figure 3, left): the adapter branch (resampler and decoupled cross-attention,
/// IP-Adapter Plus) and the KV branch. The networks it stands on stay frozen.
///
/// Tensors: `image_proj.*` and `ip_adapter.*` as IP-Adapter names them, `kv_encoder.*` as [`KvEncoder`] does.
#[derive(Clone, Debug)]
pub struct FaceEncoder {
    resampler: Resampler,
    ip_adapter: IpAdapter,
    kv_encoder: Option<KvEncoder>,
}

impl FaceEncoder {
    /// Loads the adapter branch from one place and the KV branch from another, so that either can be frozen.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] for missing or misshapen tensors.
    pub fn load(
        config: &FaceEncoderConfig,
        unet: &UNet,
        adapter_weights: &Weights,
        kv_weights: &Weights,
    ) -> Result<Self> {
        let kv_encoder = match &config.kv_encoder {
            Some(kv) => Some(KvEncoder::load(kv, unet, &kv_weights.pp("kv_encoder"))?),
            None => None,
        };
        Ok(FaceEncoder {
            resampler: Resampler::load(&config.resampler, &adapter_weights.pp("image_proj"))?,
            ip_adapter: IpAdapter::load(unet, &adapter_weights.pp("ip_adapter"))?,
            kv_encoder,
        })
    }

    /// Whether the tensor of this name belongs to the adapter branch (the second learning rate's group).
    pub fn is_adapter_parameter(name: &str) -> bool {
        name.starts_with("image_proj.") || name.starts_with("ip_adapter.")
    }

    /// Image tokens from the image encoder's features.
    ///
    /// `features`: penultimate hidden states of the conditioning images, `(batch, patches + 1, width)`;
    /// `null_features`: those of a picture that is zero after normalisation, `(1, patches + 1, width)`.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] where the width is not the resampler's.
    pub fn tokens(&self, features: &Tensor, null_features: &Tensor) -> Result<AdapterTokens> {
        Ok(AdapterTokens { conditional: self.resample(features)?, unconditional: self.resample(null_features)? })
    }

    /// Image tokens `(batch, tokens, cross_attention_dim)` of the features of pictures, each by itself.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] where the width is not the resampler's.
    pub fn resample(&self, features: &Tensor) -> Result<Tensor> {
        self.resampler.forward(features)
    }

    /// What a denoising pass needs of image tokens `(batch, tokens, cross_attention_dim)`.
    ///
    /// # Errors
    /// Those of [`IpAdapter::project`].
    pub fn image_tokens(&self, tokens: &Tensor, scale: f64) -> Result<ImageTokens> {
        Ok(ImageTokens { key_values: self.ip_adapter.project(tokens)?, scale })
    }

    /// The KV branch, where the encoder has one.
    pub fn kv_encoder(&self) -> Option<&KvEncoder> {
        self.kv_encoder.as_ref()
    }
}

//! The shapes of the miniature's networks.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::RESOLUTION;
use crate::Result;
use crate::lookahead::{Base, FaceEncoderConfig, KvEncoderConfig};
use crate::models::roles::TokenizedClipText;
use crate::models::{clip_text, clip_vision, mini_face_locator, mini_identity, resampler, taesd, tokenizer, unet};
use crate::nn::{Init, LoraSet, Weights};
use crate::schedule::NoiseSchedule;

/// The layers of the U-Net that the LCM-LoRA adapts: those of the published LCM-LoRA for SDXL.
const LCM_LORA_LAYERS: [&str; 14] = [
    ".to_q",
    ".to_k",
    ".to_v",
    ".to_out.0",
    ".proj_in",
    ".proj_out",
    ".ff.net.0.proj",
    ".ff.net.2",
    ".conv1",
    ".conv2",
    ".conv_shortcut",
    ".downsamplers.0.conv",
    ".upsamplers.0.conv",
    ".time_emb_proj",
];

/// The shapes of all networks of a miniature. Each network is loaded from a prefix of its own.
#[derive(Clone, Debug)]
pub struct MiniConfig {
    /// `unet.*`
    pub unet: unet::Config,
    /// `autoencoder.*`; its scale and shift are not these but those stored beside its weights.
    pub autoencoder: taesd::Config,
    /// `text_encoder.*`
    pub text_encoder: clip_text::Config,
    /// `image_encoder.*`
    pub image_encoder: clip_vision::Config,
    /// `identity_network.*`
    pub identity_network: mini_identity::Config,
    /// `face_locator.*`
    pub face_locator: mini_face_locator::Config,
    /// `adapter.image_proj.*`
    pub resampler: resampler::Config,
    /// Rank of `lcm_lora.*`.
    pub lcm_lora_rank: usize,
    /// Height and width of the images, in pixels.
    pub resolution: usize,
}

impl MiniConfig {
    /// The miniature that is part of the crate.
    pub fn mini() -> Self {
        MiniConfig {
            unet: unet::Config::mini(),
            autoencoder: taesd::Config::mini(),
            text_encoder: clip_text::Config::mini(),
            image_encoder: clip_vision::Config::mini(),
            identity_network: mini_identity::Config::mini(),
            face_locator: mini_face_locator::Config::mini(),
            resampler: resampler::Config::mini(),
            lcm_lora_rank: 16,
            resolution: RESOLUTION,
        }
    }

    /// A smaller one for tests, which have no use for good pictures: images of 32 pixels, latents `(4, 8, 8)`.
    pub fn tiny() -> Self {
        let mini = Self::mini();
        MiniConfig {
            unet: unet::Config {
                block_out_channels: vec![8, 16, 16],
                transformer_layers_per_block: vec![0, 1, 1],
                attention_heads: vec![1, 2, 2],
                cross_attention_dim: 16,
                norm_num_groups: 4,
                addition_time_embed_dim: 4,
                pooled_dim: 16,
                ..mini.unet
            },
            autoencoder: taesd::Config {
                width: 4,
                num_encoder_blocks: vec![1, 1, 1],
                num_decoder_blocks: vec![1, 1, 1],
                ..mini.autoencoder
            },
            text_encoder: clip_text::Config {
                hidden_size: 16,
                intermediate_size: 32,
                projection_dim: Some(16),
                ..mini.text_encoder
            },
            image_encoder: clip_vision::Config {
                image_size: 32,
                patch_size: 8,
                hidden_size: 16,
                intermediate_size: 32,
                num_hidden_layers: 2,
                num_attention_heads: 2,
                projection_dim: 16,
                ..mini.image_encoder
            },
            identity_network: mini_identity::Config {
                crop_size: 16,
                widths: vec![8, 8, 8],
                group_width: 4,
                dimension: 16,
            },
            face_locator: mini_face_locator::Config { size: 16, widths: vec![8, 8], group_width: 4, hidden: 16 },
            resampler: resampler::Config {
                dim: 16,
                depth: 1,
                dim_head: 8,
                heads: 2,
                num_queries: 4,
                embedding_dim: 16,
                output_dim: 16,
                ff_mult: 2,
            },
            lcm_lora_rank: 2,
            resolution: 32,
        }
    }

    /// The face encoder that fits: adapter branch and KV branch with the paper's ranks.
    pub fn face_encoder(&self) -> FaceEncoderConfig {
        FaceEncoderConfig { resampler: self.resampler.clone(), kv_encoder: Some(KvEncoderConfig::default()) }
    }

    /// The layers of the LCM-LoRA with the shapes of the weights they adapt.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for a U-Net that does not fit together.
    pub fn lcm_lora_layers(&self) -> Result<BTreeMap<String, Vec<usize>>> {
        let layer = |(name, shape): (String, Vec<usize>)| {
            let path = name.strip_suffix(".weight")?;
            LCM_LORA_LAYERS.iter().any(|layer| path.ends_with(layer)).then(|| (path.to_string(), shape))
        };
        Ok(unet::UNet::shapes(&self.unet)?.into_iter().filter_map(layer).collect())
    }

    /// The U-Net, from `unet.*`.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] for a missing or misshapen tensor; so for the other networks.
    pub fn load_unet(&self, weights: &Weights) -> Result<unet::UNet> {
        unet::UNet::load(&self.unet, &weights.pp("unet"))
    }

    /// The LCM-LoRA, from `lcm_lora.*`.
    ///
    /// # Errors
    /// As [`load_unet`](Self::load_unet).
    pub fn load_lcm_lora(&self, weights: &Weights) -> Result<LoraSet> {
        LoraSet::load(&self.lcm_lora_layers()?, self.lcm_lora_rank, &weights.pp("lcm_lora"))
    }

    /// The autoencoder, from `autoencoder.*`, with the scale and shift stored there.
    ///
    /// # Errors
    /// As [`load_unet`](Self::load_unet).
    pub fn load_autoencoder(&self, weights: &Weights) -> Result<taesd::Taesd> {
        let weights = weights.pp("autoencoder");
        let number = |name: &str, init: Init| -> Result<f64> {
            Ok(weights.get(1, name, init)?.to_dtype(DType::F64)?.get(0)?.to_scalar()?)
        };
        let (scaling_factor, shift) = (number("scaling_factor", Init::Ones)?, number("shift", Init::Zeros)?);
        taesd::Taesd::load(&taesd::Config { scaling_factor, shift, ..self.autoencoder.clone() }, &weights)
    }

    /// The text encoder with its tokenizer, from `text_encoder.*`.
    ///
    /// # Errors
    /// As [`load_unet`](Self::load_unet).
    pub fn load_text_encoder(&self, weights: &Weights) -> Result<TokenizedClipText> {
        Ok(TokenizedClipText {
            tokenizer: tokenizer::PromptTokenizer::mini()?,
            network: clip_text::ClipText::load(&self.text_encoder, &weights.pp("text_encoder"))?,
        })
    }

    /// The image encoder, from `image_encoder.*`.
    ///
    /// # Errors
    /// As [`load_unet`](Self::load_unet).
    pub fn load_image_encoder(&self, weights: &Weights) -> Result<clip_vision::ClipVision> {
        clip_vision::ClipVision::load(&self.image_encoder, &weights.pp("image_encoder"))
    }

    /// The identity network, from `identity_network.*`.
    ///
    /// # Errors
    /// As [`load_unet`](Self::load_unet).
    pub fn load_identity_network(&self, weights: &Weights) -> Result<mini_identity::MiniIdentity> {
        mini_identity::MiniIdentity::load(&self.identity_network, &weights.pp("identity_network"))
    }

    /// The face locator, from `face_locator.*`.
    ///
    /// # Errors
    /// As [`load_unet`](Self::load_unet).
    pub fn load_face_locator(&self, weights: &Weights) -> Result<mini_face_locator::MiniFaceLocator> {
        mini_face_locator::MiniFaceLocator::load(&self.face_locator, &weights.pp("face_locator"))
    }

    /// All frozen networks.
    ///
    /// # Errors
    /// As [`load_unet`](Self::load_unet).
    pub fn load_base(&self, weights: &Weights) -> Result<Base> {
        // Any tensor of the file tells its type and place.
        let probe: Tensor = weights.pp("autoencoder").get(1, "scaling_factor", Init::Ones)?;
        let autoencoder = Arc::new(self.load_autoencoder(weights)?);
        Ok(Base {
            unet: self.load_unet(weights)?,
            lcm_lora: self.load_lcm_lora(weights)?,
            schedule: NoiseSchedule::sdxl(),
            encoder: autoencoder.clone(),
            decoder: autoencoder.clone(),
            preview_decoder: autoencoder,
            text_encoder: Arc::new(self.load_text_encoder(weights)?),
            image_encoder: Arc::new(self.load_image_encoder(weights)?),
            identity_network: Arc::new(self.load_identity_network(weights)?),
            face_locator: Arc::new(self.load_face_locator(weights)?),
            resolution: self.resolution,
            dtype: probe.dtype(),
            device: probe.device().clone(),
        })
    }
}

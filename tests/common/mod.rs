//! A base whose networks all are tiny and random, for tests of what is built on top.

#![allow(dead_code)] // each test file uses its own part

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lcm_lookahead::Result;
use lcm_lookahead::data::{DatasetConfig, FaceDataset, GenerateConfig, generate_dataset};
use lcm_lookahead::face::Landmarks;
use lcm_lookahead::lookahead::Base;
use lcm_lookahead::models::clip_text::ClipText;
use lcm_lookahead::models::clip_vision::ClipVision;
use lcm_lookahead::models::face_locator::FaceLocator;
use lcm_lookahead::models::mini_identity::MiniIdentity;
use lcm_lookahead::models::roles::TokenizedClipText;
use lcm_lookahead::models::taesd::Taesd;
use lcm_lookahead::models::tokenizer::PromptTokenizer;
use lcm_lookahead::models::unet::{Config, UNet};
use lcm_lookahead::models::{clip_text, clip_vision, mini_identity, resampler, taesd};
use lcm_lookahead::nn::{LoraSet, Parameters, Weights};
use lcm_lookahead::random::Address;
use lcm_lookahead::schedule::NoiseSchedule;
use lcm_lookahead::train::{AdapterInit, TrainConfig};

/// Height and width of the pictures of the tiny base.
pub const RESOLUTION: usize = 16;

/// Says where the face is without looking, or that there is none.
pub struct FixedLocator(pub Option<Landmarks>);

impl FaceLocator for FixedLocator {
    fn locate(&self, images: &Tensor) -> Result<Vec<Option<Landmarks>>> {
        Ok(vec![self.0; images.dim(0)?])
    }
}

/// Landmarks of a face that fills a tiny picture.
pub const FACE: Landmarks = [[5.2, 6.1], [10.3, 6.4], [7.9, 8.8], [5.9, 11.2], [9.8, 11.3]];

/// Builds a network with random weights that are frozen.
fn frozen<T>(seed: u64, dtype: DType, load: impl Fn(&Weights) -> Result<T>) -> Result<T> {
    let parameters = Parameters::new();
    load(&Weights::trainable(&parameters, seed, dtype, &Device::Cpu))?;
    let mut tensors = HashMap::new();
    for (i, (name, variable)) in parameters.all().into_iter().enumerate() {
        // LoRA layers start at zero, which would hide them.
        let value = match name.ends_with("lora_B.weight") {
            true => (Address::new(seed, "up").sample(i).normal(variable.shape(), dtype, &Device::Cpu)? * 0.2)?,
            false => variable.as_tensor().detach(),
        };
        tensors.insert(name, value);
    }
    load(&Weights::frozen("random weights", tensors))
}

fn unet_config() -> Config {
    Config {
        block_out_channels: vec![4, 8, 8],
        layers_per_block: 1,
        transformer_layers_per_block: vec![0, 1, 1],
        attention_heads: vec![1, 2, 2],
        cross_attention_dim: 8,
        norm_num_groups: 2,
        addition_time_embed_dim: 4,
        pooled_dim: 8,
        ..Config::mini()
    }
}

/// All networks of the method, tiny, with random frozen weights.
pub fn tiny_base(dtype: DType, face: Option<Landmarks>) -> Result<Base> {
    let unet = frozen(1, dtype, |weights| UNet::load(&unet_config(), weights))?;
    let layers: std::collections::BTreeMap<String, Vec<usize>> = UNet::shapes(&unet_config())?
        .into_iter()
        .filter(|(name, shape)| shape.len() >= 2 && (name.contains("attn") || name.contains("resnets")))
        .map(|(name, shape)| (name.trim_end_matches(".weight").to_string(), shape))
        .collect();
    let lcm_lora = frozen(2, dtype, |weights| LoraSet::load(&layers, 2, weights))?;
    let taesd_config = taesd::Config {
        width: 4,
        num_encoder_blocks: vec![1, 1],
        num_decoder_blocks: vec![1, 1],
        ..taesd::Config::mini()
    };
    let taesd = Arc::new(frozen(3, dtype, |weights| Taesd::load(&taesd_config, weights))?);
    let text_config = clip_text::Config {
        hidden_size: 8,
        intermediate_size: 16,
        num_attention_heads: 2,
        projection_dim: Some(8),
        ..clip_text::Config::mini()
    };
    let text = frozen(4, dtype, |weights| ClipText::load(&text_config, weights))?;
    let vision_config = clip_vision::Config {
        image_size: RESOLUTION,
        patch_size: 8,
        hidden_size: 8,
        intermediate_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        projection_dim: 8,
        ..clip_vision::Config::mini()
    };
    let vision = frozen(5, dtype, |weights| ClipVision::load(&vision_config, weights))?;
    let identity_config = mini_identity::Config { crop_size: 8, widths: vec![4, 8], group_width: 4, dimension: 8 };
    let identity = frozen(6, dtype, |weights| MiniIdentity::load(&identity_config, weights))?;
    Ok(Base {
        unet,
        lcm_lora,
        schedule: NoiseSchedule::sdxl(),
        encoder: taesd.clone(),
        decoder: taesd.clone(),
        preview_decoder: taesd,
        text_encoder: Arc::new(TokenizedClipText { tokenizer: PromptTokenizer::mini()?, network: text }),
        image_encoder: Arc::new(vision),
        identity_network: Arc::new(identity),
        face_locator: Arc::new(FixedLocator(face)),
        resolution: RESOLUTION,
        dtype,
        device: Device::Cpu,
    })
}

/// An adapter that starts at random.
pub fn tiny_adapter() -> AdapterInit {
    AdapterInit {
        resampler: resampler::Config {
            dim: 8,
            depth: 1,
            dim_head: 4,
            heads: 2,
            num_queries: 2,
            embedding_dim: 8,
            output_dim: 8,
            ff_mult: 2,
        },
        tensors: HashMap::new(),
    }
}

/// A configuration for runs of the tiny base: constant learning rates, no validation.
pub fn tiny_config() -> TrainConfig {
    let mut config = TrainConfig::mini();
    config.train_batch_size = 2;
    config.data.resolution = RESOLUTION;
    config.lookahead.batch_size = 2;
    config.optimizer.lr_warmup_steps = 0;
    config.checkpointing.every_n_steps = 0;
    config.validation.every_n_steps = 0;
    config.adapter.encoder_lora_rank = 2;
    config.adapter.kv_lora_rank = 2;
    config
}

/// A data set of procedural portraits in a folder.
pub fn portraits(folder: &Path, identities: usize, images: usize) -> Result<FaceDataset> {
    let config = GenerateConfig {
        out: folder.to_path_buf(),
        identities: identities as _,
        images_per_identity: images as _,
        size: 32,
        ..GenerateConfig::default()
    };
    generate_dataset(&config, |_, _| {})?;
    FaceDataset::open(&DatasetConfig::new(folder, RESOLUTION as u32))
}

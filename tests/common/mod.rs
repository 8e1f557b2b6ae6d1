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
use lcm_lookahead::mini::{self, MiniConfig};
use lcm_lookahead::models::face_locator::FaceLocator;
use lcm_lookahead::train::{AdapterInit, TrainConfig};

/// Height and width of the pictures of the tiny base.
pub const RESOLUTION: usize = 32;

/// Says where the face is without looking, or that there is none.
pub struct FixedLocator(pub Option<Landmarks>);

impl FaceLocator for FixedLocator {
    fn locate(&self, images: &Tensor) -> Result<Vec<Option<Landmarks>>> {
        Ok(vec![self.0; images.dim(0)?])
    }
}

/// Landmarks of a face that fills a tiny picture.
pub const FACE: Landmarks = [[10.4, 12.2], [20.6, 12.8], [15.8, 17.6], [11.8, 22.4], [19.6, 22.6]];

/// All networks of the method, tiny, with random frozen weights, and a face at the given place in every picture.
pub fn tiny_base(dtype: DType, face: Option<Landmarks>) -> Result<Base> {
    Ok(Base { face_locator: Arc::new(FixedLocator(face)), ..mini::tiny_base(1, dtype, &Device::Cpu)? })
}

/// An adapter that starts at random.
pub fn tiny_adapter() -> AdapterInit {
    AdapterInit { resampler: MiniConfig::tiny().resampler, tensors: HashMap::new() }
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

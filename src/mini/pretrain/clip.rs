//! Text and image encoder: two towers that agree on which caption belongs to which picture.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor};
use rand::Rng;

use super::pool::{TRAINING_IDENTITIES, draw_pool, images};
use super::training::{Losses, Options, Recipe, train};
use super::workers::Workers;
use crate::Result;
use crate::mini::MiniConfig;
use crate::models::clip_vision::ClipVision;
use crate::models::roles::{TextEncoder, TokenizedClipText};
use crate::nn::{Init, Parameters, Weights};
use crate::ops;

/// Trains both encoders by the symmetric contrastive loss of CLIP (Radford et al. 2021) on described captions, with
/// the negatives of one worker's part of the batch.
///
/// # Errors
/// Those of [`train`].
pub fn clip(options: &Options) -> Result<()> {
    let workers = Workers::new(options.threads)?;
    let config = MiniConfig::mini();
    let photos = draw_pool(&workers, options.pool, 1, TRAINING_IDENTITIES, options.seed ^ 1, config.resolution)?;
    let parameters = Parameters::new();
    let weights = Weights::trainable(&parameters, options.seed, DType::F32, &Device::Cpu);
    let (text, vision) = (config.load_text_encoder(&weights)?, config.load_image_encoder(&weights)?);
    // exp(0) ten times over: the temperature starts at 0.1.
    let scale = weights.pp("clip").get((), "logit_scale", Init::Zeros)?;
    let recipe = Recipe {
        stage: "clip",
        parameters: &parameters,
        batch: 32 * workers.count(),
        learning_rate: 1e-3,
        weight_decay: 0.01,
        ema_decay: 0.99,
        mirror: None,
        constants: HashMap::new(),
    };
    train(options, &workers, &recipe, |micro| {
        let chosen = micro.each("clip portrait", |address| &photos[address.rng().random_range(0..photos.len())]);
        let captions: Vec<String> = chosen.iter().map(|photo| photo.portrait.described_prompt()).collect();
        let pictures = images(chosen.iter().copied())?;
        contrast(&text, &vision, &captions, &pictures, &scale)
    })
}

fn contrast(
    text: &TokenizedClipText,
    vision: &ClipVision,
    captions: &[String],
    pictures: &Tensor,
    scale: &Tensor,
) -> Result<Losses> {
    let captions_embedded = normalise(&text.encode(captions)?.pooled)?;
    let pictures_embedded = normalise(&vision.forward(&vision.preprocess(pictures)?)?.pooled)?;
    // Rows: pictures; columns: captions.
    let similarity = ops::linear(&pictures_embedded, &captions_embedded, None)?;
    let logits = similarity.broadcast_mul(&(scale.clamp(-2.0, 2.3)?.exp()? * 10.0)?)?;
    let count = captions.len();
    let by_picture = cross_entropy(&logits, &(0..count as u32).collect::<Vec<_>>())?;
    let by_caption = cross_entropy(&logits.t()?.contiguous()?, &(0..count as u32).collect::<Vec<_>>())?;
    let right = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
    let right = right.iter().zip(0..).filter(|(guess, truth)| **guess == *truth).count();
    let parts = vec![("accuracy", right as f64 / count as f64)];
    Ok(Losses { loss: ((by_picture + by_caption)? * 0.5)?, parts })
}

fn normalise(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?)?)
}

/// The mean cross-entropy of logits `(batch, classes)` with the right classes.
pub(super) fn cross_entropy(logits: &Tensor, classes: &[u32]) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let normaliser = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let index = Tensor::from_slice(classes, (classes.len(), 1), logits.device())?;
    Ok((normaliser - shifted.gather(&index, 1)?)?.mean_all()?)
}

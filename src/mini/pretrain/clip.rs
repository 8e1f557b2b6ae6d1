//! Text and image encoder: two towers that agree on which caption belongs to which picture.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor};
use rand::Rng;

use super::pool::Pool;
use super::training::{Losses, Options, Recipe, train};

use crate::mini::MiniConfig;
use crate::models::clip_text::ClipText;
use crate::models::clip_vision::ClipVision;
use crate::nn::{Init, Parameters};
use crate::{Result, ops};

/// Trains both encoders by the symmetric contrastive loss of CLIP (Radford et al. 2021) on described captions, with
/// the negatives of one worker's part of the batch.
///
/// # Errors
/// Those of [`train`].
pub fn clip(options: &Options) -> Result<()> {
    let (workers, config, pool) = (options.workers()?, MiniConfig::mini(), Pool::of(options)?);
    let parameters = Parameters::new();
    let weights = options.trainable(&parameters);
    let (text, vision) = (config.load_text_encoder(&weights)?, config.load_image_encoder(&weights)?);
    // exp(0) ten times over: the temperature starts at 0.1.
    let scale = weights.pp("clip").get((), "logit_scale", Init::Zeros)?;
    let recipe = Recipe {
        stage: "clip",
        parameters: &parameters,
        batch: options.batch_or(32 * workers.count(), 256),
        learning_rate: 1e-3,
        weight_decay: 0.01,
        ema_decay: 0.99,
        mirror: None,
        constants: HashMap::new(),
    };
    let tokens = |pool: &Pool| -> Result<Tensor> {
        let captions: Vec<String> = pool.portraits.iter().map(|portrait| portrait.described_prompt()).collect();
        text.tokenizer.encode(&captions, &Device::Cpu)
    };
    let ids = tokens(&pool)?;
    let towers = Towers { text: &text.network, vision: &vision, scale: &scale };
    train(options, &workers, &recipe, |micro| {
        let chosen = micro.each("clip portrait", |address| address.rng().random_range(0..pool.len()));
        towers.contrast(options, &pool, &ids, &chosen)
    })?;
    let held_out = Pool::draw_held_out(options, 256)?;
    let chosen: Vec<usize> = (0..held_out.len()).collect();
    let losses = towers.contrast(options, &held_out, &tokens(&held_out)?, &chosen)?;
    let accuracy = losses.parts[0].1.to_scalar::<f32>()?;
    println!("clip: {} held-out portraits: {:.1} % of the captions found among all", chosen.len(), 100.0 * accuracy);
    Ok(())
}

struct Towers<'a> {
    text: &'a ClipText,
    vision: &'a ClipVision,
    scale: &'a Tensor,
}

impl Towers<'_> {
    /// The loss of some portraits and their captions' tokens.
    fn contrast(&self, options: &Options, pool: &Pool, ids: &Tensor, chosen: &[usize]) -> Result<Losses> {
        let count = chosen.len();
        let rows: Vec<u32> = chosen.iter().map(|index| *index as u32).collect();
        let ids = ids.index_select(&Tensor::from_vec(rows, count, &Device::Cpu)?, 0)?.to_device(&options.device)?;
        let pictures = options.input(&pool.images(chosen)?)?;
        let captions = normalise(&ops::cast(&self.text.forward(&ids)?.pooled, DType::F32)?)?;
        let pictures = self.vision.forward(&self.vision.preprocess(&pictures)?)?.pooled;
        let pictures = normalise(&ops::cast(&pictures, DType::F32)?)?;
        // Rows: pictures; columns: captions.
        let similarity = ops::linear(&pictures, &captions, None)?;
        let logits = similarity.broadcast_mul(&(self.scale.clamp(-2.0, 2.3)?.exp()? * 10.0)?)?;
        let own = one_hot(&(0..count as u32).collect::<Vec<_>>(), count, &options.device)?;
        let by_picture = cross_entropy(&logits, &own)?;
        let by_caption = cross_entropy(&logits.t()?.contiguous()?, &own)?;
        Ok(Losses { loss: ((by_picture + by_caption)? * 0.5)?, parts: vec![("accuracy", accuracy(&logits, &own)?)] })
    }
}

fn normalise(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?)?)
}

/// Rows `(batch, classes)` that are one at each sample's class, else zero; f32.
pub(super) fn one_hot(classes: &[u32], count: usize, device: &Device) -> Result<Tensor> {
    let all = Tensor::arange(0u32, count as u32, device)?.reshape((1, count))?;
    let classes = Tensor::from_slice(classes, (classes.len(), 1), device)?;
    Ok(all.broadcast_eq(&classes)?.to_dtype(DType::F32)?)
}

/// The mean cross-entropy of logits `(batch, classes)` with the right classes, which are [`one_hot`].
pub(super) fn cross_entropy(logits: &Tensor, classes: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let normaliser = shifted.exp()?.sum(D::Minus1)?.log()?;
    Ok((normaliser - (shifted * classes)?.sum(D::Minus1)?)?.mean_all()?)
}

/// The part of the samples whose largest logit is that of the right class, which is [`one_hot`].
pub(super) fn accuracy(logits: &Tensor, classes: &Tensor) -> Result<Tensor> {
    let right = logits.detach().argmax(D::Minus1)?.eq(&classes.argmax(D::Minus1)?)?;
    Ok(right.to_dtype(DType::F32)?.mean_all()?)
}

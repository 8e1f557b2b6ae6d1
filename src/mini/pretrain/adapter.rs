//! The IP-Adapter that training starts from.

use std::collections::HashMap;

use candle_core::Tensor;
use rand::Rng;

use super::encoded::{Captions, Encoded, Encoders, noise_loss};
use super::files::load_stages;
use super::pool::PER_IDENTITY;
use super::sampling::{piece, sample, sheet_of};
use super::training::{MicroBatch, Options, Recipe, train};
use super::workers::Workers;
use crate::data::save_png;
use crate::lookahead::{AdapterTokens, FaceEncoder, FaceEncoderConfig};
use crate::mini::MiniConfig;
use crate::models::unet::{Pass, UNet};
use crate::nn::{Parameters, Weights};
use crate::random::Address;
use crate::schedule::NoiseSchedule;
use crate::{Error, Result};

/// Trains resampler and image attention on the frozen denoiser. The conditioning image is the picture itself or, more
/// often, another one of the same person; a tenth of the samples has none, and a tenth no text. Then samples.
///
/// # Errors
/// Those of [`train`].
pub fn adapter(options: &Options) -> Result<()> {
    let (workers, config, schedule) = (options.workers()?, MiniConfig::mini(), NoiseSchedule::sdxl());
    let encoders = Encoders::load(options)?;
    let pool = Encoded::new(&workers, options, &encoders, true)?;
    let unet = config.load_unet(&load_stages(options, &["denoiser"])?)?;
    let null_features = encoders.vision.null_features()?.detach();
    let parameters = Parameters::new();
    let shape = FaceEncoderConfig { kv_encoder: None, ..config.face_encoder() };
    let load = |weights: &Weights| FaceEncoder::load(&shape, &unet, &weights.pp("adapter"), weights);
    let face = load(&options.trainable(&parameters))?;
    let recipe = Recipe {
        stage: "adapter",
        parameters: &parameters,
        batch: options.batch_or(32, 256),
        learning_rate: 1e-3,
        weight_decay: 1e-2,
        ema_decay: 0.995,
        mirror: None,
        constants: HashMap::new(),
    };
    train(options, &workers, &recipe, |micro| {
        let batch = pool.noised(micro, &schedule, Captions::Compressed)?;
        let features = conditioning_features(&pool, micro, &batch.portraits, &null_features)?;
        let tokens = face.tokens(&features, &null_features)?;
        let pass = Pass { image_tokens: Some(face.image_tokens(&tokens.conditional, 1.0)?), ..Pass::default() };
        let prediction = unet.forward(&options.input(&batch.noisy)?, &batch.timesteps, &batch.conditioning, &pass)?;
        Ok(noise_loss(&prediction, &batch, &schedule)?.into())
    })?;

    let face = load(&load_stages(options, &["adapter"])?)?;
    samples(options, &workers, &encoders, &unet, &face, &pool, &null_features)
}

/// The features of the conditioning images of some portraits.
fn conditioning_features(
    pool: &Encoded,
    micro: &MicroBatch,
    portraits: &[usize],
    null_features: &Tensor,
) -> Result<Tensor> {
    let draws = micro.each("conditioning image", |address: Address| {
        let mut rng = address.rng();
        (rng.random_bool(0.4), rng.random_range(0..PER_IDENTITY), rng.random_bool(0.1))
    });
    let shown = portraits.iter().zip(&draws).map(|(portrait, (same, other, _))| match same {
        true => *portrait,
        false => (portrait - portrait % PER_IDENTITY + other).min(pool.pool.len() - 1),
    });
    let features = features(pool, &shown.collect::<Vec<_>>())?;
    let none: Vec<f32> = draws.iter().map(|(.., none)| if *none { 1.0 } else { 0.0 }).collect();
    let none = Tensor::from_vec(none, (draws.len(), 1, 1), features.device())?.to_dtype(features.dtype())?;
    let kept = features.broadcast_mul(&none.affine(-1.0, 1.0)?)?;
    Ok((kept + null_features.broadcast_mul(&none)?)?)
}

fn features(pool: &Encoded, portraits: &[usize]) -> Result<Tensor> {
    let missing = || Error::argument("adapter", "pool", "image features", "none");
    pool.features(portraits)?.ok_or_else(missing)
}

/// For some people: the conditioning image, and samples of three prompts.
fn samples(
    options: &Options,
    workers: &Workers,
    encoders: &Encoders,
    unet: &UNet,
    face: &FaceEncoder,
    pool: &Encoded,
    null_features: &Tensor,
) -> Result<()> {
    let prompts = [
        "a photo of a face",
        "a photo of a face in a forest",
        "an oil painting of a face",
        "a pop art print of a face",
    ];
    let people = 8.min(pool.pool.len() / PER_IDENTITY);
    let pictures = workers.map(people * prompts.len(), piece(options, people), |range| {
        let shown: Vec<usize> = range.clone().map(|i| i % people * PER_IDENTITY).collect();
        let texts: Vec<String> = range.clone().map(|i| prompts[i / people].to_string()).collect();
        let AdapterTokens { conditional, unconditional } = face.tokens(&features(pool, &shown)?, null_features)?;
        let tokens = AdapterTokens { conditional: conditional.detach(), unconditional: unconditional.detach() };
        sample(options, unet, encoders, &texts, Some((face, &tokens)), 3.0, range.start % people)
    })?;
    let shown = (0..people).map(|person| {
        let index = person * PER_IDENTITY;
        Ok((pool.pool.portraits[index].prompt(), pool.pool.picture(index)?))
    });
    let mut all = shown.collect::<Result<Vec<_>>>()?;
    all.extend(pictures.into_iter().flatten());
    save_png(&sheet_of(&all, people)?, options.out.join("adapter.png"))
}

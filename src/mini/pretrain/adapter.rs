//! The IP-Adapter that training starts from.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use rand::Rng;

use super::encoded::{Captions, Encoded, Encoders, PER_IDENTITY, noise_loss};
use super::files::load_stages;
use super::sampling::{sample, sheet_of};
use super::training::{MicroBatch, Options, Recipe, train};
use super::workers::Workers;
use crate::data::save_png;
use crate::lookahead::{AdapterTokens, FaceEncoder, FaceEncoderConfig};
use crate::mini::MiniConfig;
use crate::models::roles::ImageEncoder;
use crate::models::unet::{Pass, UNet};
use crate::nn::{Parameters, Weights};
use crate::random::Address;
use crate::schedule::NoiseSchedule;
use crate::{Error, Result};

/// Trains resampler and image attention on the frozen denoiser. The conditioning image is the picture itself or, as
/// often, another one of the same person; a tenth of the samples has none, and a tenth no text. Then samples.
///
/// # Errors
/// Those of [`train`].
pub fn adapter(options: &Options) -> Result<()> {
    let (workers, config, schedule) = (Workers::new(options.threads)?, MiniConfig::mini(), NoiseSchedule::sdxl());
    let encoders = Encoders::load(&options.out)?;
    let pool = Encoded::draw(&workers, options, &encoders, true)?;
    let unet = config.load_unet(&load_stages(&options.out, &["denoiser"])?)?;
    let null_features = encoders.vision.null_features()?.detach();
    let parameters = Parameters::new();
    let shape = FaceEncoderConfig { kv_encoder: None, ..config.face_encoder() };
    let load = |weights: &Weights| FaceEncoder::load(&shape, &unet, &weights.pp("adapter"), weights);
    let face = load(&Weights::trainable(&parameters, options.seed, DType::F32, &Device::Cpu))?;
    let recipe = Recipe {
        stage: "adapter",
        parameters: &parameters,
        batch: 32,
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
        let prediction = unet.forward(&batch.noisy, &batch.timesteps, &batch.conditioning, &pass)?;
        Ok(noise_loss(&prediction, &batch, &schedule)?.into())
    })?;

    let face = load(&load_stages(&options.out, &["adapter"])?)?;
    samples(options, &workers, &encoders, &unet, &face, &pool, &null_features)
}

/// The features of the conditioning images of some portraits.
fn conditioning_features(
    pool: &Encoded,
    micro: &MicroBatch,
    portraits: &[usize],
    null_features: &Tensor,
) -> Result<Tensor> {
    let mut generators = micro.each("conditioning image", Address::rng).into_iter();
    let mut rows = Vec::with_capacity(portraits.len());
    for portrait in portraits {
        let Some(mut rng) = generators.next() else { break };
        let first = portrait - portrait % PER_IDENTITY;
        let shown = match rng.random_bool(0.5) {
            true => *portrait,
            false => (first + rng.random_range(0..PER_IDENTITY)).min(pool.photos.len() - 1),
        };
        rows.push(if rng.random_bool(0.1) { null_features.clone() } else { features(pool, shown)? });
    }
    Ok(Tensor::cat(&rows, 0)?)
}

fn features(pool: &Encoded, portrait: usize) -> Result<Tensor> {
    let missing = || Error::argument("adapter", "pool", "image features", "none");
    pool.features(&[portrait])?.ok_or_else(missing)
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
    let people = 8.min(pool.photos.len() / PER_IDENTITY);
    let pictures = workers.map(people * prompts.len(), 1, |range| {
        let (person, prompt) = (range.start % people, prompts[range.start / people]);
        let features = features(pool, person * PER_IDENTITY)?;
        let AdapterTokens { conditional, unconditional } = face.tokens(&features, null_features)?;
        let tokens = AdapterTokens { conditional: conditional.detach(), unconditional: unconditional.detach() };
        sample(unet, encoders, &[prompt.to_string()], Some((face, &tokens)), 3.0, person)
    })?;
    let shown = (0..people).map(|person| {
        let photo = &pool.photos[person * PER_IDENTITY];
        (photo.portrait.prompt(), photo.image.clone())
    });
    let all: Vec<_> = shown.chain(pictures.into_iter().flatten()).collect();
    save_png(&sheet_of(&all, people)?, options.out.join("adapter.png"))
}

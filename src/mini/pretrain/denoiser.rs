//! The denoiser: SDXL's objective on latents of portraits.

use std::collections::HashMap;

use candle_core::{DType, Device};

use super::encoded::{Captions, Encoded, Encoders, noise_loss};
use super::sampling::{PROMPTS, sample, sheet_of};
use super::training::{Losses, Options, Recipe, train};
use super::workers::Workers;
use crate::Result;
use crate::data::save_png;
use crate::mini::MiniConfig;
use crate::models::unet::Pass;
use crate::nn::{Parameters, Weights};
use crate::schedule::NoiseSchedule;

/// Trains the U-Net to predict the noise, with both forms of captions and a tenth of the samples without text; then
/// samples some prompts.
///
/// # Errors
/// Those of [`train`].
pub fn denoiser(options: &Options) -> Result<()> {
    let (workers, config, schedule) = (Workers::new(options.threads)?, MiniConfig::mini(), NoiseSchedule::sdxl());
    let encoders = Encoders::load(&options.out)?;
    let pool = Encoded::draw(&workers, options, &encoders, false)?;
    let parameters = Parameters::new();
    let unet = config.load_unet(&Weights::trainable(&parameters, options.seed, DType::F32, &Device::Cpu))?;
    let recipe = Recipe {
        stage: "denoiser",
        parameters: &parameters,
        batch: 32,
        learning_rate: 1.2e-3,
        weight_decay: 1e-2,
        ema_decay: 0.996,
        mirror: None,
        constants: HashMap::new(),
    };
    train(options, &workers, &recipe, |micro| {
        let batch = pool.noised(micro, &schedule, Captions::Both)?;
        let prediction = unet.forward(&batch.noisy, &batch.timesteps, &batch.conditioning, &Pass::default())?;
        let plain = (&prediction.detach() - &batch.noise)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
        let loss = noise_loss(&prediction, &batch, &schedule)?;
        Ok(Losses { loss, parts: vec![("mse", f64::from(plain))] })
    })?;
    // Fixed parameters from here on: nothing is kept for a backward pass.
    let frozen = super::files::load_stages(&options.out, &["denoiser"])?;
    let unet = config.load_unet(&frozen)?;
    let pictures = workers.map(2 * PROMPTS.len(), 1, |range| {
        let prompt = [PROMPTS[range.start % PROMPTS.len()].to_string()];
        sample(&unet, &encoders, &prompt, None, 3.0, range.start)
    })?;
    save_png(
        &sheet_of(&pictures.into_iter().flatten().collect::<Vec<_>>(), PROMPTS.len())?,
        options.out.join("denoiser.png"),
    )
}

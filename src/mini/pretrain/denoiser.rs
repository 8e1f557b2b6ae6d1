//! The denoiser: SDXL's objective on latents of portraits.

use std::collections::HashMap;

use candle_core::DType;

use super::encoded::{Captions, Encoded, Encoders, noise_loss};
use super::sampling::{PROMPTS, piece, sample, sheet_of};
use super::training::{Losses, Options, Recipe, train};
use crate::data::save_png;
use crate::mini::MiniConfig;
use crate::models::unet::Pass;
use crate::nn::Parameters;
use crate::schedule::NoiseSchedule;
use crate::{Result, ops};

/// Trains the U-Net to predict the noise, with both forms of captions and a tenth of the samples without text; then
/// samples some prompts.
///
/// # Errors
/// Those of [`train`].
pub fn denoiser(options: &Options) -> Result<()> {
    let (workers, config, schedule) = (options.workers()?, MiniConfig::mini(), NoiseSchedule::sdxl());
    let encoders = Encoders::load(options)?;
    let pool = Encoded::new(&workers, options, &encoders, false)?;
    let parameters = Parameters::new();
    let unet = config.load_unet(&options.trainable(&parameters))?;
    let recipe = Recipe {
        stage: "denoiser",
        parameters: &parameters,
        batch: options.batch_or(32, 256),
        learning_rate: 1.2e-3,
        weight_decay: 1e-2,
        ema_decay: if options.device.is_cpu() { 0.996 } else { 0.999 },
        mirror: None,
        constants: HashMap::new(),
    };
    train(options, &workers, &recipe, |micro| {
        let batch = pool.noised(micro, &schedule, Captions::Both)?;
        let prediction =
            unet.forward(&options.input(&batch.noisy)?, &batch.timesteps, &batch.conditioning, &Pass::default())?;
        let plain = (ops::cast(&prediction.detach(), DType::F32)? - &batch.noise)?.sqr()?.mean_all()?;
        let loss = noise_loss(&prediction, &batch, &schedule)?;
        Ok(Losses { loss, parts: vec![("mse", plain)] })
    })?;
    // Fixed parameters from here on: nothing is kept for a backward pass.
    let frozen = super::files::load_stages(options, &["denoiser"])?;
    let unet = config.load_unet(&frozen)?;
    let pictures = workers.map(2 * PROMPTS.len(), piece(options, PROMPTS.len()), |range| {
        let prompts: Vec<String> = range.clone().map(|i| PROMPTS[i % PROMPTS.len()].to_string()).collect();
        sample(options, &unet, &encoders, &prompts, None, 3.0, range.start)
    })?;
    save_png(
        &sheet_of(&pictures.into_iter().flatten().collect::<Vec<_>>(), PROMPTS.len())?,
        options.out.join("denoiser.png"),
    )
}

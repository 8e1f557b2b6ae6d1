//! The LCM-LoRA: latent consistency distillation (Luo et al. 2023) of the denoiser.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use rand::Rng;

use super::encoded::{Captions, Encoded, Encoders};
use super::files::load_stages;
use super::sampling::{decoded, sheet_of};
use super::training::{Losses, MicroBatch, Options, Recipe, train};
use crate::data::save_png;
use crate::lookahead::{consistency_function, ddim_step, earlier_timesteps};
use crate::mini::MiniConfig;
use crate::models::unet::{Conditioning, Pass, UNet};
use crate::nn::{LoraSet, Loras, Parameters};
use crate::random::Address;
use crate::schedule::NoiseSchedule;
use crate::{Result, ops};

/// Timesteps the teacher's DDIM step skips.
const SKIP: usize = 20;
/// Guidance scales the teacher uses.
const GUIDANCE: std::ops::Range<f64> = 2.0..4.0;
/// Where the loss turns from quadratic to linear.
const HUBER: f64 = 0.01;

/// Distils the denoiser into a LoRA whose prediction is the same all along a path of the teacher's DDIM, and so the end
/// of the path; then shows its previews next to the denoiser's.
///
/// # Errors
/// Those of [`train`].
pub fn lcm(options: &Options) -> Result<()> {
    let (workers, config, schedule) = (options.workers()?, MiniConfig::mini(), NoiseSchedule::sdxl());
    let encoders = Encoders::load(options)?;
    let pool = Encoded::new(&workers, options, &encoders, false)?;
    let unet = config.load_unet(&load_stages(options, &["denoiser"])?)?;
    let (parameters, averages) = (Parameters::new(), Parameters::new());
    let student = config.load_lcm_lora(&options.trainable(&parameters))?;
    let target = config.load_lcm_lora(&options.trainable(&averages))?;
    let recipe = Recipe {
        stage: "lcm",
        parameters: &parameters,
        batch: options.batch_or(32, 128),
        learning_rate: 1e-3,
        weight_decay: 0.0,
        ema_decay: 0.97,
        mirror: Some(&averages),
        constants: HashMap::new(),
    };
    let stage = Distillation { options, unet: &unet, schedule: &schedule, student: &student, target: &target };
    train(options, &workers, &recipe, |micro| stage.loss(&pool, micro))?;

    let trained = config.load_lcm_lora(&load_stages(options, &["lcm"])?)?;
    let mut pictures = Vec::new();
    for timestep in [999, 759, 499, 259] {
        pictures.extend(previews(options, &unet, &trained, &pool, &encoders, timestep)?);
    }
    save_png(&sheet_of(&pictures, PREVIEWS)?, options.out.join("lcm.png"))
}

struct Distillation<'a> {
    options: &'a Options,
    unet: &'a UNet,
    schedule: &'a NoiseSchedule,
    student: &'a LoraSet,
    target: &'a LoraSet,
}

impl Distillation<'_> {
    fn loss(&self, pool: &Encoded, micro: &MicroBatch) -> Result<Losses> {
        let (_, latents, conditioning) = pool.batch(micro, Captions::Both)?;
        let count = micro.size();
        let last = self.schedule.timestep_count() / SKIP;
        let starts = micro.each("timestep", |address: Address| (address.rng().random_range(0..last) + 1) * SKIP - 1);
        let ends = earlier_timesteps(&starts, SKIP);
        let noise = micro.noise("noise", &latents.dims()[1..])?;
        let noisy = self.schedule.add_noise(&latents, &noise, &starts)?;

        // The teacher's guided DDIM step.
        let both = Tensor::cat(&[&noisy, &noisy], 0)?;
        let twice = [starts.clone(), starts.clone()].concat();
        let texts = Conditioning::cat(&[&conditioning.without_text()?, &conditioning])?;
        let teacher = self.unet.forward(&self.options.input(&both)?, &twice, &texts, &Pass::default())?.detach();
        let teacher = ops::cast(&teacher, DType::F32)?;
        let (without, with) = (teacher.narrow(0, 0, count)?, teacher.narrow(0, count, count)?);
        let scales = micro.each("guidance", |address| address.rng().random_range(GUIDANCE) as f32);
        let scales = Tensor::from_vec(scales, (count, 1, 1, 1), latents.device())?;
        let guided = (&without + (with - &without)?.broadcast_mul(&scales)?)?;
        let stepped = ddim_step(self.schedule, &noisy, &guided, &starts, &ends)?;

        let target = self.predict(&stepped, &ends, &conditioning, self.target)?.detach();
        let prediction = self.predict(&noisy, &starts, &conditioning, self.student)?;
        let loss = ((((prediction - target)?.sqr()? + HUBER * HUBER)?.sqrt()? - HUBER)?).mean_all()?;
        Ok(loss.into())
    }

    /// The consistency function.
    fn predict(&self, noisy: &Tensor, timesteps: &[usize], text: &Conditioning, lora: &LoraSet) -> Result<Tensor> {
        let pass = Pass { loras: Loras::one(lora, 1.0), ..Pass::default() };
        let noise = self.unet.forward(&self.options.input(noisy)?, timesteps, text, &pass)?;
        let noise = ops::cast(&noise, DType::F32)?;
        consistency_function(self.schedule, noisy, &noise, timesteps)
    }
}

const PREVIEWS: usize = 8;

/// For some portraits noised to a timestep: the clean picture as the denoiser sees it, and as the LCM denoiser does.
fn previews(
    options: &Options,
    unet: &UNet,
    lora: &LoraSet,
    pool: &Encoded,
    encoders: &Encoders,
    timestep: usize,
) -> Result<Vec<(String, image::RgbImage)>> {
    let schedule = NoiseSchedule::sdxl();
    let portraits: Vec<usize> = (0..PREVIEWS.min(pool.pool.len())).map(|i| i * 5 % pool.pool.len()).collect();
    let prompts: Vec<String> = portraits.iter().map(|i| pool.pool.portraits[*i].described_prompt()).collect();
    let (latents, text) = (pool.latents(&portraits)?, encoders.conditioning(&prompts)?);
    let timesteps = vec![timestep; portraits.len()];
    let noise = Address::new(3, "preview noise").normal(latents.shape(), DType::F32, latents.device())?;
    let noisy = schedule.add_noise(&latents, &noise, &timesteps)?;
    let mut pictures = Vec::new();
    for (name, loras) in [("ddpm", Loras::none()), ("lcm", Loras::one(lora, 1.0))] {
        let pass = Pass { loras, ..Pass::default() };
        let noise = unet.forward(&options.input(&noisy)?, &timesteps, &text, &pass)?.detach().to_dtype(DType::F32)?;
        let clean = schedule.predict_x0(&noisy, &noise, &timesteps)?;
        pictures.extend(decoded(options, encoders, &clean, &vec![format!("{name} {timestep}"); portraits.len()])?);
    }
    Ok(pictures)
}

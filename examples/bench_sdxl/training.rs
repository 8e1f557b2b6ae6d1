//! Training iterations of the official recipe.

use candle_core::{DType, Tensor};
use lcm_lookahead::autograd::{self, with_large_stack};
use lcm_lookahead::data::Batch;
use lcm_lookahead::nn::Parameters;
use lcm_lookahead::train::{AdamW, AdamWConfig, Gradients, ParameterGroup, PendingReport, Prepared, StepLosses};
use lcm_lookahead::{AnnealedTimestepSampler, Base, FaceEncoder, ImageLoss, Result, TrainConfig, cuda};

use crate::measure::Report;
use crate::networks::{RESOLUTION, base, trainable_encoder};
use crate::unet::FORWARD;

/// Work of one sample in a joint iteration, in forward passes of the U-Net: KV encoder, denoiser and preview each run
/// and are differentiated to their inputs. What is computed again is not counted: how much that is, is a choice.
const JOINT_PASSES: f64 = 6.0;
/// The same for the two updates of an alternating iteration, each with its own run of the KV encoder.
const ALTERNATING_PASSES: f64 = 8.0;

pub fn measure(report: &mut Report, batches: &[usize], keep_attention: bool) -> Result<()> {
    let base = base(&report.device)?;
    let (encoder, parameters) = trainable_encoder(&base.unet, &report.device)?;
    println!("trainable parameters: {}", parameters.all().iter().map(|(_, v)| v.elem_count()).sum::<usize>());
    let mut training = Training::new(report, &base, &encoder, &parameters)?;
    for &batch in batches {
        training.iterations(batch, keep_attention, true)?;
    }
    Ok(())
}

/// An encoder in training.
pub struct Training<'a> {
    report: &'a Report,
    base: &'a Base,
    encoder: &'a FaceEncoder,
    parameters: &'a Parameters,
    optimizer: AdamW,
}

impl<'a> Training<'a> {
    pub fn new(
        report: &'a Report,
        base: &'a Base,
        encoder: &'a FaceEncoder,
        parameters: &'a Parameters,
    ) -> Result<Self> {
        let groups = vec![group(parameters, true), group(parameters, false)];
        let optimizer = AdamW::new(groups, AdamWConfig::default())?;
        Ok(Training { report, base, encoder, parameters, optimizer })
    }

    /// Measures the joint iteration, whose seconds it returns, and, where `official` is set, what else the official recipe
    /// has.
    pub fn iterations(&mut self, batch: usize, keep_attention: bool, official: bool) -> Result<f64> {
        let Training { report, base, encoder, parameters, optimizer } = self;
        let image_losses: Vec<(Box<dyn ImageLoss>, f64)> = vec![(Box::new(base.identity_loss()), 1.0)];
        let timesteps = AnnealedTimestepSampler::new(0.2, 1000, 1000)?;
        let mut config = TrainConfig::official();
        config.keep_attention = keep_attention;
        config.train_batch_size = batch;
        config.lookahead.batch_size = batch;
        config.timesteps.lcm_max_timestep = 1000;
        let losses = StepLosses {
            base,
            encoder,
            config: &config,
            image_losses: &image_losses,
            diffusion_timesteps: &timesteps,
            lookahead_timesteps: &timesteps,
        };
        let pictures = random_batch(batch, report)?;
        let prepared = losses.prepare(&pictures, 0)?;
        if official {
            report.line(&format!("frozen encoders B{batch}"), 0.0, 3, || losses.prepare(&pictures, 0).map(|_| ()))?;
        }
        let mut step = |loss: &mut dyn FnMut() -> Result<Option<Tensor>>| -> Result<()> {
            if let Some(store) = autograd::gradients(loss)? {
                let gradients = Gradients::extract(&store, parameters);
                drop(store);
                optimizer.clip_and_step(gradients, 1.0, 1.0)?;
            }
            Ok(())
        };
        let work = FORWARD * batch as f64;
        let mut part = PendingReport::default();
        let seconds = with_large_stack(|| {
            let seconds = report.line(&format!("joint iteration B{batch}"), JOINT_PASSES * work, 3, || {
                part = PendingReport::default();
                step(&mut || losses.joint(&prepared, 1, 0, true, &mut part).map(Some))
            })?;
            let name = format!("official iteration B{batch}, with the frozen encoders");
            if official {
                report.line(&name, ALTERNATING_PASSES * work, 3, || {
                    part = PendingReport::default();
                    let prepared: Prepared = losses.prepare(&pictures, 0)?;
                    step(&mut || losses.diffusion(&prepared, 0, &mut part).map(Some))?;
                    step(&mut || losses.lookahead(&prepared, 1, 0, &mut part))
                })?;
            }
            Ok(seconds)
        })?;
        let values = part.read()?;
        println!("losses: diffusion {:?}, image {:?}", values.diffusion, values.lookahead.last());
        cuda::synchronize(&report.device)?;
        Ok(seconds)
    }
}

fn group(parameters: &Parameters, adapter: bool) -> ParameterGroup {
    ParameterGroup {
        parameters: parameters.filter(|name| FaceEncoder::is_adapter_parameter(name) == adapter),
        learning_rate: if adapter { 1e-5 } else { 5e-6 },
        weight_decay: 0.01,
    }
}

fn random_batch(batch: usize, report: &Report) -> Result<Batch> {
    let picture = || Tensor::rand(-1f32, 1.0, (batch, 3, RESOLUTION, RESOLUTION), &report.device);
    let prompts = |prompt: &str| vec![prompt.to_string(); batch];
    Ok(Batch {
        pixel_values: picture()?.to_dtype(DType::BF16)?,
        encoder_pixel_values: picture()?.to_dtype(DType::BF16)?,
        prompts: prompts("an oil painting of a face"),
        encoder_prompts: prompts("a photo of a face"),
        identities: prompts("nobody"),
    })
}

//! Training iterations of the official recipe.

use candle_core::{DType, Tensor};
use lcm_lookahead::autograd::{self, with_large_stack};
use lcm_lookahead::data::Batch;
use lcm_lookahead::train::{AdamW, AdamWConfig, Gradients, LossReport, ParameterGroup, Prepared, StepLosses};
use lcm_lookahead::{AnnealedTimestepSampler, FaceEncoder, ImageLoss, Result, TrainConfig, cuda};

use crate::measure::Report;
use crate::networks::{RESOLUTION, base, trainable_encoder};
use crate::unet::FORWARD;

/// Passes of one sample through the U-Net in a joint iteration, in forward passes: the KV encoder, the denoiser and the
/// preview each run, run again and are differentiated to their inputs.
const JOINT_PASSES: f64 = 9.0;
/// The same for the two updates of an alternating iteration, each with its own run of the KV encoder.
const ALTERNATING_PASSES: f64 = 12.0;

pub fn measure(report: &mut Report, batches: &[usize], keep_attention: bool) -> Result<()> {
    let device = report.device.clone();
    let base = base(&device)?;
    let (encoder, parameters) = trainable_encoder(&base.unet, &device)?;
    println!("trainable parameters: {}", parameters.all().iter().map(|(_, v)| v.elem_count()).sum::<usize>());
    let group = |name| -> ParameterGroup { group(&parameters, name) };
    let mut optimizer = AdamW::new(vec![group(true), group(false)], AdamWConfig::default())?;
    let image_losses: Vec<(Box<dyn ImageLoss>, f64)> = vec![(Box::new(base.identity_loss()), 1.0)];
    let timesteps = AnnealedTimestepSampler::new(0.2, 1000, 1000)?;
    for &batch in batches {
        let mut config = TrainConfig::official();
        config.keep_attention = keep_attention;
        config.train_batch_size = batch;
        config.lookahead.batch_size = batch;
        config.timesteps.lcm_max_timestep = 1000;
        let losses = StepLosses {
            base: &base,
            encoder: &encoder,
            config: &config,
            image_losses: &image_losses,
            diffusion_timesteps: &timesteps,
            lookahead_timesteps: &timesteps,
        };
        let pictures = random_batch(batch, report)?;
        let prepared = losses.prepare(&pictures, 0)?;
        report.line(&format!("frozen encoders B{batch}"), 0.0, 3, || losses.prepare(&pictures, 0).map(|_| ()))?;
        let mut step = |loss: &mut dyn FnMut() -> Result<Option<Tensor>>| -> Result<()> {
            if let Some(store) = autograd::gradients(loss)? {
                let gradients = Gradients::extract(&store, &parameters);
                drop(store);
                optimizer.clip_and_step(gradients, 1.0, 1.0)?;
            }
            Ok(())
        };
        let work = FORWARD * batch as f64;
        let mut part = LossReport::default();
        with_large_stack(|| {
            report.line(&format!("joint iteration B{batch}"), JOINT_PASSES * work, 3, || {
                step(&mut || losses.joint(&prepared, 1, 0, true, &mut part).map(Some))
            })?;
            report.line(
                &format!("official iteration B{batch}, with the frozen encoders"),
                ALTERNATING_PASSES * work,
                3,
                || {
                    let prepared: Prepared = losses.prepare(&pictures, 0)?;
                    step(&mut || losses.diffusion(&prepared, 0, &mut part).map(Some))?;
                    step(&mut || losses.lookahead(&prepared, 1, 0, &mut part))
                },
            )
        })?;
        println!("losses: diffusion {:?}, image {:?}", part.diffusion, part.lookahead.last());
        cuda::synchronize(&device)?;
    }
    Ok(())
}

fn group(parameters: &lcm_lookahead::nn::Parameters, adapter: bool) -> ParameterGroup {
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

//! The parts of a training iteration, each by itself, and their sum beside the joint iteration's time.

use candle_core::{DType, Tensor, Var};
use lcm_lookahead::autograd::{Backward, Forward, Function, Output, apply, gradients, with_large_stack};
use lcm_lookahead::lookahead::dropout::ReferenceDropout;
use lcm_lookahead::lookahead::{ImageLoss, PreviewForm, preview};
use lcm_lookahead::nn::Parameters;
use lcm_lookahead::random::Address;
use lcm_lookahead::train::{AdamW, AdamWConfig, Gradients, ParameterGroup};
use lcm_lookahead::{Base, Conditioning, FaceEncoder, KeyValues, Loras, Pass, Result, TrainConfig};

use crate::measure::Report;
use crate::networks::{RESOLUTION, base, trainable_encoder};
use crate::training::Training;
use crate::unet::{FORWARD, random_inputs};

pub fn measure(report: &mut Report, batches: &[usize]) -> Result<()> {
    let base = base(&report.device)?;
    let (encoder, parameters) = trainable_encoder(&base.unet, &report.device)?;
    for &batch in batches {
        let parts = with_large_stack(|| Parts { report, base: &base, encoder: &encoder, batch }.measure())?;
        let sum = parts + optimizer(report, &parameters)?;
        let keep_attention = TrainConfig::official().keep_attention;
        let joint = Training::new(report, &base, &encoder, &parameters)?.iterations(batch, keep_attention, false)?;
        println!(
            "parts of a joint iteration B{batch}: {:.3} ms in all, the iteration {:.3} ms",
            sum * 1e3,
            joint * 1e3
        );
    }
    Ok(())
}

struct Parts<'a> {
    report: &'a Report,
    base: &'a Base,
    encoder: &'a FaceEncoder,
    batch: usize,
}

/// Half the sum of squares of tensors, as far as its gradient goes: that is the tensors themselves, and costs nothing.
struct HalfSquares;

impl Function for HalfSquares {
    fn name(&self) -> &'static str {
        "half the sum of squares"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let zero = Tensor::zeros((), inputs[0].dtype(), inputs[0].device())?;
        Ok(Output::Tensor(zero).into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(context.inputs.iter().cloned().map(Some).collect())
    }
}

fn differentiate(tensors: impl FnOnce() -> Result<Vec<Tensor>>) -> Result<()> {
    let loss = || Ok(Some(apply(HalfSquares, &tensors()?.iter().collect::<Vec<_>>())?));
    gradients(loss).map(|_| ())
}

fn all(key_values: &KeyValues) -> Vec<Tensor> {
    key_values.iter().flat_map(|(_, (key, value))| [key.clone(), value.clone()]).collect()
}

impl Parts<'_> {
    /// Measures them, and returns the seconds of those that a joint iteration consists of, but for the optimizer.
    fn measure(&self) -> Result<f64> {
        let (report, base, batch) = (self.report, self.base, self.batch);
        let (latents, conditioning) = random_inputs(batch, &report.device)?;
        let timesteps = vec![300; batch];
        let work = FORWARD * batch as f64;
        let name = |what: &str| format!("{what} B{batch}");

        let Some(kv_encoder) = self.encoder.kv_encoder() else { return Ok(0.0) };
        let recomputing = Pass { recompute: true, ..Pass::default() };
        let encode = || kv_encoder.encode(&base.unet, &latents, &timesteps, &conditioning, &recomputing);
        report.line(&name("KV encoder, forward"), work, 3, || encode().map(|_| ()))?;
        let mut parts = Vec::new();
        let probability = TrainConfig::official().dropout.kv_drop_chance;
        let dropout = ReferenceDropout { probability, address: Address::new(0, "kv drop") };
        parts.push(report.line(
            &name("KV encoder with tokens dropped, forward and backward"),
            2.0 * work,
            3,
            || {
                let unet = &base.unet;
                differentiate(|| {
                    kv_encoder
                        .encode_dropping(unet, &latents, &timesteps, &conditioning, &dropout, &recomputing)
                        .map(|key_values| all(&key_values))
                })
            },
        )?);

        let features = Tensor::randn(0f32, 1.0, (batch, 257, 1280), &report.device)?.to_dtype(DType::BF16)?;
        let image_tokens = || self.encoder.image_tokens(&self.encoder.resample(&features)?, 1.0);
        parts.push(report.line(&name("image tokens of features, forward and backward"), 0.0, 3, || {
            differentiate(|| image_tokens().map(|tokens| all(&tokens.key_values)))
        })?);

        let variables =
            |key_values: &KeyValues| key_values.map(|_, tensor| Ok(Var::from_tensor(&tensor.detach())?.into_inner()));
        let mut image_tokens = image_tokens()?;
        image_tokens.key_values = variables(&image_tokens.key_values)?;
        let pass = Pass {
            reference: Some(variables(&kv_encoder.encode_dropping(
                &base.unet,
                &latents,
                &timesteps,
                &conditioning,
                &dropout,
                &recomputing,
            )?)?),
            image_tokens: Some(image_tokens),
            recompute: true,
            ..Pass::default()
        };
        parts.push(self.denoiser("denoiser", &latents, &timesteps, &conditioning, &pass)?);
        let kept = Pass { keep_attention: true, ..pass.clone() };
        self.denoiser("denoiser, attention kept", &latents, &timesteps, &conditioning, &kept)?;
        let lcm = Pass { loras: Loras::one(&base.lcm_lora, 0.7), ..pass };
        parts.push(self.denoiser("preview denoiser", &latents, &timesteps, &conditioning, &lcm)?);

        let prediction = Var::from_tensor(&latents)?;
        let pictures = Tensor::rand(-1f32, 1.0, (batch, 3, RESOLUTION, RESOLUTION), &report.device)?;
        let pictures = pictures.to_dtype(DType::BF16)?;
        parts.push(report.line(&name("decoder and identity loss, forward and backward"), 0.0, 3, || {
            differentiate(|| {
                let form = PreviewForm::Equation3;
                let clean = preview(&base.schedule, &latents, prediction.as_tensor(), &timesteps, form)?;
                let loss = base.identity_loss().loss(&base.preview_decoder.decode(&clean)?, &pictures)?;
                Ok(vec![loss.loss])
            })
        })?);
        Ok(parts.iter().sum())
    }

    fn denoiser(
        &self,
        what: &str,
        latents: &Tensor,
        timesteps: &[usize],
        conditioning: &Conditioning,
        pass: &Pass,
    ) -> Result<f64> {
        let what = format!("{what}, extended, forward and backward B{}", self.batch);
        self.report.line(&what, 2.0 * FORWARD * self.batch as f64, 3, || {
            differentiate(|| Ok(vec![self.base.unet.forward(latents, timesteps, conditioning, pass)?]))
        })
    }
}

fn optimizer(report: &Report, parameters: &Parameters) -> Result<f64> {
    let group = ParameterGroup { parameters: parameters.clone(), learning_rate: 0.0, weight_decay: 0.0 };
    let mut optimizer = AdamW::new(vec![group], AdamWConfig::default())?;
    let mut gradients = Gradients::new();
    for (name, variable) in parameters.all() {
        gradients.insert(name, variable.as_detached_tensor());
    }
    report.line("AdamW with clipping", 0.0, 5, || optimizer.clip_and_step(gradients.clone(), 1.0, 1.0).map(|_| ()))
}

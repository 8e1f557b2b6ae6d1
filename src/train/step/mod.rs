//! The losses of one training step: the method of the paper, put together.

mod conditions;
mod prepared;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::config::AlignmentLoss;
use super::report::Reading;
use super::{PendingReport, TrainConfig};
use crate::Result;
use crate::autograd::{differentiates, taped_once};
use crate::data::Batch;
use crate::lookahead::dropout::{ReferenceDropout, drop_image_tokens, drop_text};
use crate::lookahead::{Base, FaceEncoder, ImageLoss, PreviewPath, preview};
use crate::models::unet::{Conditioning, KeyValues, Pass};
use crate::nn::Loras;
use crate::ops;
use crate::random::Address;
use crate::schedule::AnnealedTimestepSampler;
pub(super) use conditions::Conditions;
pub use prepared::Prepared;

/// The losses of a training step, as differentiable scalars.
pub struct StepLosses<'a> {
    /// The frozen networks.
    pub base: &'a Base,
    /// The encoder in training.
    pub encoder: &'a FaceEncoder,
    /// The hyperparameters.
    pub config: &'a TrainConfig,
    /// The image losses on the preview, with their weights.
    pub image_losses: &'a [(Box<dyn ImageLoss>, f64)],
    /// Timesteps of the diffusion loss.
    pub diffusion_timesteps: &'a AnnealedTimestepSampler,
    /// Timesteps of the lookahead loss, where it draws its own.
    pub lookahead_timesteps: &'a AnnealedTimestepSampler,
}

impl StepLosses<'_> {
    pub(super) fn address(&self, purpose: &'static str, draw: u64) -> Address {
        Address::new(self.config.seed, purpose).step(draw)
    }

    /// Encodes a batch by the frozen networks. `draw` numbers the batches of the run.
    ///
    /// # Errors
    /// Those of the networks.
    pub fn prepare(&self, batch: &Batch, draw: u64) -> Result<Prepared> {
        let base = self.base;
        let on_device = |pictures: &Tensor| pictures.to_dtype(base.dtype)?.to_device(&base.device);
        let targets = on_device(&batch.pixel_values)?;
        let conditioning_images = on_device(&batch.encoder_pixel_values)?;
        let target_latents = base.latents(&targets, self.address("target posterior", draw))?;
        let conditioning_latents = base.latents(&conditioning_images, self.address("conditioning posterior", draw))?;
        let (size, channels, height, width) = target_latents.dims4()?;
        let (shape, dtype) = ((channels, height, width), ops::wide_dtype(base.dtype));
        let noise = self.address("noise", draw).normal_batch(size, shape, dtype, &base.device)?;
        let crop = &self.config.data;
        let place = |mut conditioning: Conditioning| {
            for ids in &mut conditioning.time_ids {
                (ids[2], ids[3]) = (crop.crops_coords_top_left_h as f64, crop.crops_coords_top_left_w as f64);
            }
            conditioning
        };
        let [text, encoder_text] = base.conditionings([&batch.prompts, &batch.encoder_prompts])?.map(place);
        Ok(Prepared {
            target_latents,
            conditioning_latents,
            noise,
            features: base.image_features(&conditioning_images)?,
            null_features: base.image_encoder.null_features()?.detach(),
            text: drop_text(&text, self.config.dropout.text_drop_chance, self.address("text drop", draw))?,
            encoder_text,
            conditioning_images,
        })
    }

    /// The diffusion loss alone (official code, update A), weighted 1.
    ///
    /// # Errors
    /// Those of the networks.
    pub fn diffusion(&self, prepared: &Prepared, draw: u64, report: &mut PendingReport) -> Result<Tensor> {
        let timesteps = self.draw_timesteps(self.diffusion_timesteps, "timestep", prepared, draw);
        let (_, [noise_prediction]) = self.passes(|| {
            let conditions = self.conditions(prepared, &timesteps, self.address("kv drop", draw), true)?;
            let noise_prediction = self.denoise(prepared, &timesteps, &conditions, Loras::none())?;
            Ok((conditions, [noise_prediction]))
        })?;
        self.diffusion_loss(prepared, &noise_prediction, report)
    }

    /// The lookahead loss alone, on timesteps of its own and without adapter dropout (official code, update B), weighted.
    ///
    /// # Errors
    /// Those of the networks.
    pub fn lookahead(
        &self,
        prepared: &Prepared,
        step: u64,
        draw: u64,
        report: &mut PendingReport,
    ) -> Result<Option<Tensor>> {
        let count = self.config.lookahead.batch_size.min(prepared.text.batch());
        let prepared = prepared.narrow(count)?;
        let timesteps = self.draw_timesteps(self.lookahead_timesteps, "lookahead timestep", &prepared, draw);
        let lora_scale = self.lora_scale(step);
        let (conditions, [ahead]) = self.passes(|| {
            let conditions = self.conditions(&prepared, &timesteps, self.address("lookahead kv drop", draw), false)?;
            let ahead = self.denoise(&prepared, &timesteps, &conditions, self.lcm_loras(lora_scale))?;
            Ok((conditions, [ahead]))
        })?;
        let view = View { prepared: &prepared, timesteps: &timesteps, conditions: &conditions, noise_prediction: None };
        self.lookahead_loss(&view, self.look_ahead(&view, ahead, lora_scale)?, draw, report)
    }

    /// Both losses on the same noised latents with one run of the KV encoder (the paper's text): their weighted sum.
    ///
    /// Where `lookahead` is not set it is the diffusion loss alone.
    ///
    /// # Errors
    /// Those of the networks.
    pub fn joint(
        &self,
        prepared: &Prepared,
        step: u64,
        draw: u64,
        lookahead: bool,
        report: &mut PendingReport,
    ) -> Result<Tensor> {
        let timesteps = self.draw_timesteps(self.diffusion_timesteps, "timestep", prepared, draw);
        let limit = self.config.timesteps.lcm_max_timestep;
        let mut chosen: Vec<usize> = (0..timesteps.len()).filter(|i| lookahead && timesteps[*i] < limit).collect();
        chosen.truncate(self.config.lookahead.batch_size);
        if chosen.is_empty() {
            return self.diffusion(prepared, draw, report);
        }
        let chosen_timesteps: Vec<usize> = chosen.iter().map(|i| timesteps[*i]).collect();
        let (chosen_prepared, lora_scale) = (prepared.select(&chosen)?, self.lora_scale(step));
        let (conditions, [noise_prediction, ahead]) = self.passes(|| {
            let conditions = self.conditions(prepared, &timesteps, self.address("kv drop", draw), true)?;
            let noise_prediction = self.denoise(prepared, &timesteps, &conditions, Loras::none())?;
            let conditions = conditions.select(&chosen)?;
            let loras = self.lcm_loras(lora_scale);
            let ahead = self.denoise(&chosen_prepared, &chosen_timesteps, &conditions, loras)?;
            Ok((conditions, [noise_prediction, ahead]))
        })?;
        let diffusion = self.diffusion_loss(prepared, &noise_prediction, report)?;
        let view = View {
            prepared: &chosen_prepared,
            timesteps: &chosen_timesteps,
            conditions: &conditions,
            noise_prediction: Some(ops::select_samples(&noise_prediction.detach(), &chosen)?),
        };
        match self.lookahead_loss(&view, self.look_ahead(&view, ahead, lora_scale)?, draw, report)? {
            Some(lookahead) => Ok((diffusion + lookahead)?),
            None => Ok(diffusion),
        }
    }

    /// Runs the passes of a step through the U-Net, for the conditions of the last one and the noise predictions: on one
    /// tape, where these are to be differentiated. The gradients of the hundreds of keys and values that go from pass to
    /// pass then never meet candle's graph. The conditions are no part of any graph then.
    fn passes<const N: usize>(
        &self,
        run: impl Fn() -> Result<(Conditions, [Tensor; N])>,
    ) -> Result<(Conditions, [Tensor; N])> {
        // The loss that keeps the path aligned looks at the conditions again.
        let looks_again = self.config.lookahead.alignment.loss != AlignmentLoss::None;
        if looks_again || !differentiates() {
            return run();
        }
        let mut seen = None;
        let predictions = taped_once(|| {
            let (conditions, predictions) = run()?;
            seen = Some(conditions.detached()?);
            Ok(predictions.into())
        })?;
        match (seen, predictions.try_into()) {
            (Some(conditions), Ok(predictions)) => Ok((conditions, predictions)),
            // Not reached: the segment has run, and its predictions are as many as they were.
            _ => run(),
        }
    }

    pub(super) fn draw_timesteps(
        &self,
        sampler: &AnnealedTimestepSampler,
        purpose: &'static str,
        prepared: &Prepared,
        draw: u64,
    ) -> Vec<usize> {
        sampler.sample_batch(self.address(purpose, draw), prepared.text.batch())
    }

    /// Runs both branches of the encoder.
    pub(super) fn conditions(
        &self,
        prepared: &Prepared,
        timesteps: &[usize],
        kv_drop: Address,
        drop_adapter: bool,
    ) -> Result<Conditions> {
        let (base, config) = (self.base, self.config);
        // First what keeps a GPU busy for long: the many small operations behind it are then launched meanwhile.
        let reference = self.reference(prepared, timesteps, kv_drop)?;
        // Dropped as features: the tokens of a picture depend on no other's.
        let features = match drop_adapter {
            true => {
                let chance = config.dropout.adapter_drop_chance;
                let address = Address { purpose: "adapter drop", ..kv_drop };
                drop_image_tokens(&prepared.features, &prepared.null_features, chance, address)?
            }
            false => prepared.features.clone(),
        };
        let tokens = self.encoder.resample(&features)?;
        let image_tokens = self.encoder.image_tokens(&tokens, config.adapter.adapter_attention_scale)?;
        let noised = base.schedule.add_noise(&prepared.target_latents, &prepared.noise, timesteps)?;
        Ok(Conditions { noised, image_tokens, reference, kv_drop })
    }

    /// The keys and values of the conditioning images at these timesteps, where the encoder has a KV branch.
    pub(super) fn reference(
        &self,
        prepared: &Prepared,
        timesteps: &[usize],
        kv_drop: Address,
    ) -> Result<Option<KeyValues>> {
        let (base, config) = (self.base, self.config);
        let Some(kv_encoder) = self.encoder.kv_encoder() else { return Ok(None) };
        let latents = match config.adapter.noisy_encoder_input {
            // The same noise and timestep as the target's (official code).
            true => base.schedule.add_noise(&prepared.conditioning_latents, &prepared.noise, timesteps)?,
            false => prepared.conditioning_latents.clone(),
        };
        let dropout = ReferenceDropout { probability: config.dropout.kv_drop_chance, address: kv_drop };
        let text = &prepared.encoder_text;
        let pass = Pass { recompute: config.recompute, keep_attention: config.keep_attention, ..Pass::default() };
        Ok(Some(kv_encoder.encode_dropping(&base.unet, &latents, timesteps, text, &dropout, &pass)?))
    }

    pub(super) fn pass(&self, conditions: &Conditions, loras: Loras) -> Pass {
        Pass {
            loras,
            reference: conditions.reference.clone(),
            image_tokens: Some(conditions.image_tokens.clone()),
            freeu: None,
            recompute: self.config.recompute,
            keep_attention: self.config.keep_attention,
            ..Pass::default()
        }
    }

    /// The noise prediction under the conditions.
    fn denoise(
        &self,
        prepared: &Prepared,
        timesteps: &[usize],
        conditions: &Conditions,
        loras: Loras,
    ) -> Result<Tensor> {
        let pass = self.pass(conditions, loras);
        self.base.unet.forward(&conditions.noised, timesteps, &prepared.text, &pass)
    }

    /// Equation 2 of a noise prediction.
    fn diffusion_loss(
        &self,
        prepared: &Prepared,
        noise_prediction: &Tensor,
        report: &mut PendingReport,
    ) -> Result<Tensor> {
        let loss = (ops::widen(noise_prediction)? - &prepared.noise)?.sqr()?.mean_all()?;
        report.diffusion = Some(Reading::start(&loss)?);
        Ok(loss)
    }

    /// Scale of the LCM-LoRA in a step's lookahead; `None` where the path does not go through it.
    fn lora_scale(&self, step: u64) -> Option<f64> {
        let config = &self.config.lookahead;
        match config.through {
            PreviewPath::Lcm => Some(config.lora_scale.at(self.config.seed, step)),
            PreviewPath::X0 => None,
        }
    }

    fn lcm_loras(&self, lora_scale: Option<f64>) -> Loras {
        lora_scale.map_or_else(Loras::none, |scale| Loras::one(&self.base.lcm_lora, scale))
    }

    /// Equation 4, and the loss that keeps the path aligned; `None` where nothing is to be trained on.
    fn lookahead_loss(
        &self,
        view: &View<'_>,
        lcm: LcmPass,
        draw: u64,
        report: &mut PendingReport,
    ) -> Result<Option<Tensor>> {
        let (base, config, lora_scale) = (self.base, &self.config.lookahead, lcm.lora_scale);
        report.lora_scale = lora_scale;
        let previews = base.preview_decoder.decode(&lcm.previews)?;
        let factor = lora_scale.filter(|_| config.scale_loss_by_lora_scale).unwrap_or(1.0);
        let mut total: Option<Tensor> = None;
        for (loss, weight) in self.image_losses {
            let value = loss.loss(&previews, &view.prepared.conditioning_images)?;
            report.lookahead.push((loss.name().to_string(), Reading::start(&value.loss)?, value.counted));
            if value.counted > 0 && *weight > 0.0 {
                let weighted = (ops::widen(&value.loss)? * (weight * factor))?;
                total = Some(match total {
                    None => weighted,
                    Some(total) => (total + weighted)?,
                });
            }
        }
        if let Some((name, loss)) = self.alignment(view, &lcm, draw)? {
            report.alignment = Some((name, Reading::start(&loss)?));
            if config.alignment.weight > 0.0 {
                let weighted = (loss * config.alignment.weight)?;
                total = Some(match total {
                    None => weighted,
                    Some(total) => (total + weighted)?,
                });
            }
        }
        Ok(total)
    }

    /// Equation 3, or the same without the LCM-LoRA where it has no scale.
    fn look_ahead(&self, view: &View<'_>, noise_prediction: Tensor, lora_scale: Option<f64>) -> Result<LcmPass> {
        let (schedule, form) = (&self.base.schedule, self.config.lookahead.preview_form);
        let previews = preview(schedule, &view.conditions.noised, &noise_prediction, view.timesteps, form)?;
        Ok(LcmPass { noise_prediction, previews, lora_scale })
    }

    /// The pass for it, and what becomes of it.
    #[cfg(test)]
    pub(super) fn lcm_pass(&self, view: &View<'_>, lora_scale: Option<f64>) -> Result<LcmPass> {
        let prediction = self.denoise(view.prepared, view.timesteps, view.conditions, self.lcm_loras(lora_scale))?;
        self.look_ahead(view, prediction, lora_scale)
    }
}

/// What the lookahead loss looks at.
pub(super) struct View<'a> {
    pub(super) prepared: &'a Prepared,
    pub(super) timesteps: &'a [usize],
    pub(super) conditions: &'a Conditions,
    /// The model's own noise prediction for the same, without gradient, where it is known already.
    pub(super) noise_prediction: Option<Tensor>,
}

/// The pass with the LCM-LoRA, and what became of it.
pub(super) struct LcmPass {
    pub(super) noise_prediction: Tensor,
    /// Clean latents.
    pub(super) previews: Tensor,
    /// None where the LCM-LoRA took no part.
    pub(super) lora_scale: Option<f64>,
}

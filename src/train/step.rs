//! The losses of one training step: the method of the paper, put together.

use candle_core::Tensor;

use super::config::AlignmentLoss;
use super::report::Reading;
use super::{PendingReport, TrainConfig};
use crate::Result;
use crate::autograd::{differentiates, taped_once};
use crate::data::Batch;
use crate::lookahead::dropout::{ReferenceDropout, drop_image_tokens, drop_text};
use crate::lookahead::{Base, FaceEncoder, ImageLoss, PreviewPath, preview};
use crate::models::unet::{Conditioning, ImageTokens, KeyValues, Pass};
use crate::nn::Loras;
use crate::ops;
use crate::random::Address;
use crate::schedule::AnnealedTimestepSampler;

/// A batch after everything that needs no gradient.
pub struct Prepared {
    /// Latents of the targets, `(batch, channels, height, width)`.
    target_latents: Tensor,
    /// Latents of the conditioning images, of the same shape.
    conditioning_latents: Tensor,
    /// Conditioning images, `(batch, 3, height, width)`, which the image losses compare with.
    conditioning_images: Tensor,
    /// The noise both are noised with; f32 beside latents of bf16 or f16.
    pub(super) noise: Tensor,
    features: Tensor,
    pub(super) null_features: Tensor,
    pub(super) text: Conditioning,
    encoder_text: Conditioning,
}

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

/// What the encoder makes of a batch at its timesteps, and the noised targets.
pub(super) struct Conditions {
    pub(super) noised: Tensor,
    pub(super) image_tokens: ImageTokens,
    pub(super) reference: Option<KeyValues>,
    /// Where it was drawn which reference tokens are dropped.
    pub(super) kv_drop: Address,
}

impl Conditions {
    fn select(&self, samples: &[usize]) -> Result<Conditions> {
        self.map(|tensor| ops::select_samples(tensor, samples))
    }

    /// The same, no part of any graph.
    fn detached(&self) -> Result<Conditions> {
        self.map(|tensor| Ok(tensor.detach()))
    }

    fn map(&self, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Conditions> {
        let key_values = |key_values: &KeyValues| key_values.map(|_, tensor| change(tensor));
        Ok(Conditions {
            noised: change(&self.noised)?,
            image_tokens: ImageTokens {
                key_values: key_values(&self.image_tokens.key_values)?,
                scale: self.image_tokens.scale,
            },
            reference: self.reference.as_ref().map(key_values).transpose()?,
            kv_drop: self.kv_drop,
        })
    }
}

impl Prepared {
    fn narrow(&self, count: usize) -> Result<Prepared> {
        self.select(&(0..count).collect::<Vec<_>>())
    }

    fn select(&self, samples: &[usize]) -> Result<Prepared> {
        let text = |conditioning: &Conditioning| -> Result<Conditioning> {
            Ok(Conditioning {
                hidden_states: ops::select_samples(&conditioning.hidden_states, samples)?,
                pooled: ops::select_samples(&conditioning.pooled, samples)?,
                time_ids: samples.iter().map(|i| conditioning.time_ids[*i]).collect(),
            })
        };
        Ok(Prepared {
            target_latents: ops::select_samples(&self.target_latents, samples)?,
            conditioning_latents: ops::select_samples(&self.conditioning_latents, samples)?,
            conditioning_images: ops::select_samples(&self.conditioning_images, samples)?,
            noise: ops::select_samples(&self.noise, samples)?,
            features: ops::select_samples(&self.features, samples)?,
            null_features: self.null_features.clone(),
            text: text(&self.text)?,
            encoder_text: text(&self.encoder_text)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{gradients, tape};
    use crate::lookahead::LossValue;
    use crate::train::alignment::tests::{DRAW, Step};

    /// The mean squared difference.
    struct Distance;

    impl ImageLoss for Distance {
        fn name(&self) -> &str {
            "distance"
        }

        fn loss(&self, previews: &Tensor, conditioning_images: &Tensor) -> Result<LossValue> {
            let counted = previews.dim(0)?;
            let difference = (previews - conditioning_images.to_dtype(previews.dtype())?)?;
            Ok(LossValue { loss: difference.sqr()?.mean_all()?, counted })
        }
    }

    /// Steps that differ in what is dropped, recomputed, and which samples the lookahead loss takes.
    fn steps() -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        for (adapter_drop, limit, recompute) in [(0.0, 1000, false), (0.5, 1000, true), (1.0, 400, true)] {
            let mut step = Step::new(AlignmentLoss::None, 0.5)?;
            step.config.dropout.adapter_drop_chance = adapter_drop;
            step.config.timesteps.lcm_max_timestep = limit;
            step.config.lookahead.batch_size = 2;
            step.config.recompute = recompute;
            steps.push(step);
        }
        Ok(steps)
    }

    #[test]
    fn losses_and_gradients_on_one_tape_equal_those_of_candles_graph() -> Result<()> {
        let image_losses: Vec<(Box<dyn ImageLoss>, f64)> = vec![(Box::new(Distance), 0.7)];
        for step in steps()? {
            let (losses, prepared) = (step.losses(&image_losses), step.prepared()?);
            let total = |joint: bool, report: &mut PendingReport| -> Result<Tensor> {
                if joint {
                    return losses.joint(&prepared, 1, DRAW, true, report);
                }
                let diffusion = losses.diffusion(&prepared, DRAW, report)?;
                let lookahead = losses.lookahead(&prepared, 1, DRAW, report)?;
                Ok(lookahead.map_or(Ok(diffusion.clone()), |lookahead| diffusion + lookahead)?)
            };
            for joint in [true, false] {
                let (mut plain, mut taped) = (PendingReport::default(), PendingReport::default());
                let expected = total(joint, &mut plain)?.backward()?;
                let found = gradients(|| total(joint, &mut taped).map(Some))?;
                let Some(found) = found else { panic!("no gradients") };
                let (plain, taped) = (plain.read()?, taped.read()?);
                assert!(plain.diffusion.is_some() && !plain.lookahead.is_empty());
                assert_eq!((plain.diffusion, plain.lookahead), (taped.diffusion, taped.lookahead));
                for (name, variable) in step.parameters.all() {
                    let Some(expected) = expected.get(&variable) else { panic!("no gradient for {name}") };
                    let Some(found) = found.get(&variable) else { panic!("none for {name} on the tape") };
                    let size = expected.abs()?.max_all()?.to_scalar::<f64>()?;
                    let error = (expected - found)?.abs()?.max_all()?.to_scalar::<f64>()?;
                    assert!(error <= 1e-11 * size, "{name}: {error} of {size}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn all_passes_of_a_step_stay_on_one_tape() -> Result<()> {
        for step in steps()? {
            let (losses, prepared) = (step.losses(&[]), step.prepared()?);
            let chosen = prepared.select(&[1])?;
            let recording = tape::record(&[], |_| {
                let conditions = losses.conditions(&prepared, &[700, 300], losses.address("kv drop", DRAW), true)?;
                let first = losses.denoise(&prepared, &[700, 300], &conditions, Loras::none())?;
                let conditions = conditions.select(&[1])?;
                Ok(vec![first, losses.denoise(&chosen, &[300], &conditions, losses.lcm_loras(Some(0.5)))?])
            });
            assert_eq!(recording?.outputs().len(), 2);
        }
        Ok(())
    }
}

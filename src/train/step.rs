//! The losses of one training step: the method of the paper, put together.

use candle_core::Tensor;

use super::{LossReport, TrainConfig};
use crate::Result;
use crate::data::Batch;
use crate::lookahead::dropout::{ReferenceDropout, drop_image_tokens, drop_text};
use crate::lookahead::{AdapterTokens, Base, FaceEncoder, ImageLoss, PreviewPath, preview};
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
    null_features: Tensor,
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
        let target_latents = base.latents(&batch.pixel_values, self.address("target posterior", draw))?;
        let conditioning_latents =
            base.latents(&batch.encoder_pixel_values, self.address("conditioning posterior", draw))?;
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
        let text = place(base.conditioning(&batch.prompts)?);
        Ok(Prepared {
            target_latents,
            conditioning_latents,
            conditioning_images: batch.encoder_pixel_values.to_dtype(base.dtype)?.to_device(&base.device)?,
            noise,
            features: base.image_features(&batch.encoder_pixel_values)?,
            null_features: base.image_encoder.null_features()?.detach(),
            text: drop_text(&text, self.config.dropout.text_drop_chance, self.address("text drop", draw))?,
            encoder_text: place(base.conditioning(&batch.encoder_prompts)?),
        })
    }

    /// The diffusion loss alone (official code, update A), weighted 1.
    ///
    /// # Errors
    /// Those of the networks.
    pub fn diffusion(&self, prepared: &Prepared, draw: u64, report: &mut LossReport) -> Result<Tensor> {
        let timesteps = self.draw_timesteps(self.diffusion_timesteps, "timestep", prepared, draw);
        let conditions = self.conditions(prepared, &timesteps, self.address("kv drop", draw), true)?;
        Ok(self.diffusion_loss(prepared, &timesteps, &conditions, report)?.0)
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
        report: &mut LossReport,
    ) -> Result<Option<Tensor>> {
        let count = self.config.lookahead.batch_size.min(prepared.text.batch());
        let prepared = prepared.narrow(count)?;
        let timesteps = self.draw_timesteps(self.lookahead_timesteps, "lookahead timestep", &prepared, draw);
        let conditions = self.conditions(&prepared, &timesteps, self.address("lookahead kv drop", draw), false)?;
        let view = View { prepared: &prepared, timesteps: &timesteps, conditions: &conditions, noise_prediction: None };
        self.lookahead_loss(&view, step, draw, report)
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
        report: &mut LossReport,
    ) -> Result<Tensor> {
        let timesteps = self.draw_timesteps(self.diffusion_timesteps, "timestep", prepared, draw);
        let conditions = self.conditions(prepared, &timesteps, self.address("kv drop", draw), true)?;
        let (diffusion, noise_prediction) = self.diffusion_loss(prepared, &timesteps, &conditions, report)?;
        if !lookahead {
            return Ok(diffusion);
        }
        let limit = self.config.timesteps.lcm_max_timestep;
        let chosen: Vec<usize> = (0..timesteps.len()).filter(|i| timesteps[*i] < limit).collect();
        let chosen = &chosen[..chosen.len().min(self.config.lookahead.batch_size)];
        if chosen.is_empty() {
            return Ok(diffusion);
        }
        let chosen_timesteps: Vec<usize> = chosen.iter().map(|i| timesteps[*i]).collect();
        let (prepared, conditions) = (prepared.select(chosen)?, conditions.select(chosen)?);
        let noise_prediction = Some(select(&noise_prediction, chosen)?);
        let view =
            View { prepared: &prepared, timesteps: &chosen_timesteps, conditions: &conditions, noise_prediction };
        match self.lookahead_loss(&view, step, draw, report)? {
            Some(lookahead) => Ok((diffusion + lookahead)?),
            None => Ok(diffusion),
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
        let AdapterTokens { conditional, unconditional } =
            self.encoder.tokens(&prepared.features, &prepared.null_features)?;
        let tokens = match drop_adapter {
            true => {
                let chance = config.dropout.adapter_drop_chance;
                let address = Address { purpose: "adapter drop", ..kv_drop };
                drop_image_tokens(&conditional, &unconditional, chance, address)?
            }
            false => conditional,
        };
        let image_tokens = self.encoder.image_tokens(&tokens, config.adapter.adapter_attention_scale)?;
        let reference = self.reference(prepared, timesteps, kv_drop)?;
        let noised = base.schedule.add_noise(&prepared.target_latents, &prepared.noise, timesteps)?;
        Ok(Conditions { noised, image_tokens, unconditional, reference, kv_drop })
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
        Ok(Some(kv_encoder.encode_dropping(&base.unet, &latents, timesteps, text, &dropout, config.recompute)?))
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

    /// Equation 2, and the noise prediction it judges.
    fn diffusion_loss(
        &self,
        prepared: &Prepared,
        timesteps: &[usize],
        conditions: &Conditions,
        report: &mut LossReport,
    ) -> Result<(Tensor, Tensor)> {
        let pass = self.pass(conditions, Loras::none());
        let noise_prediction = self.base.unet.forward(&conditions.noised, timesteps, &prepared.text, &pass)?;
        let loss = (ops::widen(&noise_prediction)? - &prepared.noise)?.sqr()?.mean_all()?;
        report.diffusion = Some(scalar(&loss)?);
        Ok((loss, noise_prediction.detach()))
    }

    /// Equation 4, and the loss that keeps the path aligned; `None` where nothing is to be trained on.
    fn lookahead_loss(&self, view: &View<'_>, step: u64, draw: u64, report: &mut LossReport) -> Result<Option<Tensor>> {
        let (base, config) = (self.base, &self.config.lookahead);
        let lora_scale = match config.through {
            PreviewPath::Lcm => Some(config.lora_scale.at(self.config.seed, step)),
            PreviewPath::X0 => None,
        };
        report.lora_scale = lora_scale;
        let lcm = self.lcm_pass(view, lora_scale)?;
        let previews = base.preview_decoder.decode(&lcm.previews)?;
        let factor = lora_scale.filter(|_| config.scale_loss_by_lora_scale).unwrap_or(1.0);
        let mut total: Option<Tensor> = None;
        for (loss, weight) in self.image_losses {
            let value = loss.loss(&previews, &view.prepared.conditioning_images)?;
            report.lookahead.push((loss.name().to_string(), scalar(&value.loss)?, value.counted));
            if value.counted > 0 && *weight > 0.0 {
                let weighted = (ops::widen(&value.loss)? * (weight * factor))?;
                total = Some(match total {
                    None => weighted,
                    Some(total) => (total + weighted)?,
                });
            }
        }
        if let Some((name, loss)) = self.alignment(view, &lcm, draw)? {
            report.alignment = Some((name, scalar(&loss)?));
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
    pub(super) fn lcm_pass(&self, view: &View<'_>, lora_scale: Option<f64>) -> Result<LcmPass> {
        let (base, noised, timesteps) = (self.base, &view.conditions.noised, view.timesteps);
        let loras = lora_scale.map_or_else(Loras::none, |scale| Loras::one(&base.lcm_lora, scale));
        let pass = self.pass(view.conditions, loras);
        let noise_prediction = base.unet.forward(noised, timesteps, &view.prepared.text, &pass)?;
        let form = self.config.lookahead.preview_form;
        let previews = preview(&base.schedule, noised, &noise_prediction, timesteps, form)?;
        Ok(LcmPass { noise_prediction, previews, lora_scale })
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
    /// The tokens of no image, `(1, tokens, width)`.
    pub(super) unconditional: Tensor,
    pub(super) reference: Option<KeyValues>,
    /// Where it was drawn which reference tokens are dropped.
    pub(super) kv_drop: Address,
}

impl Conditions {
    fn select(&self, samples: &[usize]) -> Result<Conditions> {
        let key_values = |key_values: &KeyValues| key_values.map(|_, tensor| select(tensor, samples));
        Ok(Conditions {
            noised: select(&self.noised, samples)?,
            image_tokens: ImageTokens {
                key_values: key_values(&self.image_tokens.key_values)?,
                scale: self.image_tokens.scale,
            },
            unconditional: self.unconditional.clone(),
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
                hidden_states: select(&conditioning.hidden_states, samples)?,
                pooled: select(&conditioning.pooled, samples)?,
                time_ids: samples.iter().map(|i| conditioning.time_ids[*i]).collect(),
            })
        };
        Ok(Prepared {
            target_latents: select(&self.target_latents, samples)?,
            conditioning_latents: select(&self.conditioning_latents, samples)?,
            conditioning_images: select(&self.conditioning_images, samples)?,
            noise: select(&self.noise, samples)?,
            features: select(&self.features, samples)?,
            null_features: self.null_features.clone(),
            text: text(&self.text)?,
            encoder_text: text(&self.encoder_text)?,
        })
    }
}

/// The samples of a batch at these places; the tensor itself where they are all of them.
fn select(tensor: &Tensor, samples: &[usize]) -> Result<Tensor> {
    if samples.iter().copied().eq(0..tensor.dim(0)?) {
        return Ok(tensor.clone());
    }
    let samples: Vec<u32> = samples.iter().map(|i| *i as u32).collect();
    let samples = Tensor::new(samples, tensor.device())?;
    Ok(tensor.index_select(&samples, 0)?)
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.detach().to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?)
}

//! The loss that keeps the LCM path aligned with the model (paper, section 4.2), within a training step: which passes
//! teach, and under which conditions.

use candle_core::Tensor;

use super::config::AlignmentLoss;
use super::step::{LcmPass, StepLosses, View};
use crate::lookahead::{consistency_function, consistency_loss, ddim_step, earlier_timesteps, score_distillation};
use crate::models::unet::{KeyValues, Pass};
use crate::nn::Loras;
use crate::{Result, ops};

impl StepLosses<'_> {
    /// The loss chosen in the configuration, before its weight, with its name; `None` where there is none.
    pub(super) fn alignment(
        &self,
        view: &View<'_>,
        lcm: &LcmPass,
        draw: u64,
    ) -> Result<Option<(&'static str, Tensor)>> {
        Ok(match self.config.lookahead.alignment.loss {
            AlignmentLoss::None => None,
            AlignmentLoss::Sds => Some(("sds", self.sds(view, &lcm.previews, draw)?)),
            AlignmentLoss::Consistency => {
                let (here, further) = (self.consistency_at_timesteps(view, lcm)?, self.consistency_further(view)?);
                Some(("consistency", consistency_loss(&here, &further)?))
            }
        })
    }

    /// Score distillation of the previews, at timesteps and with noise of its own.
    fn sds(&self, view: &View<'_>, previews: &Tensor, draw: u64) -> Result<Tensor> {
        let base = self.base;
        let config = &self.config.lookahead.alignment;
        let (size, channels, height, width) = previews.dims4()?;
        let address = self.address("sds noise", draw);
        let noise = address.normal_batch(size, (channels, height, width), ops::wide_dtype(base.dtype), &base.device)?;
        let range = (config.sds_max_timestep.min(base.schedule.timestep_count()) - config.sds_min_timestep) as f64;
        let uniform = |i| self.address("sds timestep", draw).sample(i).uniform();
        let timesteps: Vec<usize> =
            (0..size).map(|i| config.sds_min_timestep + (uniform(i) * range) as usize).collect();
        score_distillation(&base.schedule, previews, &noise, &timesteps, |noised| {
            self.teacher(view, noised, &timesteps, &self.fixed_reference(view, &timesteps)?, None)
        })
    }

    /// The consistency function at the lookahead's timesteps, which is trained.
    fn consistency_at_timesteps(&self, view: &View<'_>, lcm: &LcmPass) -> Result<Tensor> {
        // The model with a part of the LCM-LoRA is no consistency function: only the whole one is held to be one.
        let pass = match lcm.lora_scale == Some(1.0) {
            true => None,
            false => Some(self.pass(view.conditions, Loras::one(&self.base.lcm_lora, 1.0))),
        };
        let latents = &view.conditions.noised;
        let prediction = match pass {
            None => lcm.noise_prediction.clone(),
            Some(pass) => self.base.unet.forward(latents, view.timesteps, &view.prepared.text, &pass)?,
        };
        let (latents, prediction) = (ops::widen(latents)?, ops::widen(&prediction)?);
        consistency_function(&self.base.schedule, &latents, &prediction, view.timesteps)
    }

    /// The consistency function a step of the model further; no gradient.
    fn consistency_further(&self, view: &View<'_>) -> Result<Tensor> {
        let (base, timesteps, conditions) = (self.base, view.timesteps, view.conditions);
        let earlier = earlier_timesteps(timesteps, self.config.lookahead.alignment.consistency_skip);
        let reference = conditions.reference.as_ref().map(detached).transpose()?;
        let noise = self.teacher(view, &conditions.noised, timesteps, &reference, view.noise_prediction.as_ref())?;
        let (latents, noise) = (ops::widen(&conditions.noised)?, ops::widen(&noise)?);
        let stepped = ddim_step(&base.schedule, &latents, &noise, timesteps, &earlier)?;
        let lcm = Loras::one(&base.lcm_lora, 1.0);
        let pass = self.fixed_pass(view, lcm, &self.fixed_reference(view, &earlier)?)?;
        let input = ops::cast(&stepped, base.dtype)?;
        let prediction = base.unet.forward(&input, &earlier, &view.prepared.text, &pass)?.detach();
        consistency_function(&base.schedule, &stepped, &ops::widen(&prediction)?, &earlier)
    }

    /// The noise prediction of the model without the LCM-LoRA, guided where the configuration says so; no gradient.
    /// `conditional`: that under all conditions, where it is known already.
    fn teacher(
        &self,
        view: &View<'_>,
        latents: &Tensor,
        timesteps: &[usize],
        reference: &Option<KeyValues>,
        conditional: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (unet, text) = (&self.base.unet, &view.prepared.text);
        let conditional = match conditional {
            Some(known) => known.clone(),
            None => unet.forward(latents, timesteps, text, &self.fixed_pass(view, Loras::none(), reference)?)?,
        };
        let scale = self.config.lookahead.alignment.guidance_scale;
        if scale == 1.0 {
            return Ok(conditional.detach());
        }
        let tokens = self.encoder.resample(&view.prepared.null_features)?.detach();
        let (_, count, width) = tokens.dims3()?;
        let tokens = tokens.broadcast_as((text.batch(), count, width))?.contiguous()?;
        let image = self.encoder.image_tokens(&tokens, view.conditions.image_tokens.scale)?;
        let pass = Pass { image_tokens: Some(image), ..Pass::default() };
        let unconditional = unet.forward(latents, timesteps, &text.without_text()?, &pass)?.detach();
        let (unconditional, conditional) = (ops::widen(&unconditional)?, ops::widen(&conditional.detach())?);
        Ok((&unconditional + ((conditional - &unconditional)? * scale)?)?)
    }

    /// A pass under the view's conditions that is no part of a graph.
    fn fixed_pass(&self, view: &View<'_>, loras: Loras, reference: &Option<KeyValues>) -> Result<Pass> {
        let mut image_tokens = view.conditions.image_tokens.clone();
        image_tokens.key_values = detached(&image_tokens.key_values)?;
        Ok(Pass { loras, reference: reference.clone(), image_tokens: Some(image_tokens), ..Pass::default() })
    }

    /// The reference's keys and values at other timesteps, with the tokens dropped that the view's lack; no gradient.
    fn fixed_reference(&self, view: &View<'_>, timesteps: &[usize]) -> Result<Option<KeyValues>> {
        let reference = self.reference(view.prepared, timesteps, view.conditions.kv_drop)?;
        reference.as_ref().map(detached).transpose()
    }
}

fn detached(key_values: &KeyValues) -> Result<KeyValues> {
    key_values.map(|_, tensor| Ok(tensor.detach()))
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::lookahead::{FaceEncoder, FaceEncoderConfig, ImageLoss, KvEncoderConfig};
    use crate::mini::{self, MiniConfig};
    use crate::nn::{Parameters, Weights};
    use crate::random::Address;
    use crate::schedule::AnnealedTimestepSampler;
    use crate::train::config::AlignmentConfig;
    use crate::train::{PendingReport, Prepared, TrainConfig};
    use crate::{Base, data};

    pub const DRAW: u64 = 3;

    /// A step of the method in f64 on tiny random networks, without any image loss.
    pub struct Step {
        base: Base,
        encoder: FaceEncoder,
        pub parameters: Parameters,
        pub config: TrainConfig,
        timesteps: AnnealedTimestepSampler,
    }

    impl Step {
        pub fn new(loss: AlignmentLoss, lora_scale: f64) -> Result<Self> {
            let base = mini::tiny_base(1, DType::F64, &Device::Cpu)?;
            let mut config = TrainConfig::mini();
            config.lookahead.alignment = AlignmentConfig { loss, guidance_scale: 2.0, ..AlignmentConfig::default() };
            config.lookahead.lora_scale.full_probability = 0.0;
            config.lookahead.lora_scale.min_scale = lora_scale;
            config.dropout.kv_drop_chance = 0.2;
            let parameters = Parameters::new();
            let weights = Weights::trainable(&parameters, 7, DType::F64, &Device::Cpu);
            let kv_encoder = KvEncoderConfig { encoder_lora_rank: 2, kv_lora_rank: 2, blocks: vec![] };
            let shape = FaceEncoderConfig { resampler: MiniConfig::tiny().resampler, kv_encoder: Some(kv_encoder) };
            let encoder = FaceEncoder::load(&shape, &base.unet, &weights, &weights)?;
            for (i, (_, variable)) in parameters.all().into_iter().enumerate() {
                let noise = Address::new(9, "value").sample(i).normal(variable.shape(), DType::F64, &Device::Cpu)?;
                variable.set(&(variable.as_tensor() + (noise * 0.2)?)?)?;
            }
            let timesteps = AnnealedTimestepSampler::new(0.2, 1000, 1000)?;
            Ok(Step { base, encoder, parameters, config, timesteps })
        }

        pub fn losses<'a>(&'a self, image_losses: &'a [(Box<dyn ImageLoss>, f64)]) -> StepLosses<'a> {
            StepLosses {
                base: &self.base,
                encoder: &self.encoder,
                config: &self.config,
                image_losses,
                diffusion_timesteps: &self.timesteps,
                lookahead_timesteps: &self.timesteps,
            }
        }

        pub fn prepared(&self) -> Result<Prepared> {
            let picture = |purpose| Address::new(4, purpose).uniform_tensor((2, 3, 32, 32), DType::F32, &Device::Cpu);
            let prompts = ["a photo of a face", "an oil painting of a face"].map(String::from).to_vec();
            let batch = data::Batch {
                pixel_values: picture("targets")?,
                encoder_pixel_values: picture("conditions")?,
                encoder_prompts: prompts.clone(),
                prompts,
                identities: ["a", "b"].map(String::from).to_vec(),
            };
            self.losses(&[]).prepare(&batch, DRAW)
        }

        fn lookahead(&self, report: &mut PendingReport) -> Result<Option<Tensor>> {
            self.losses(&[]).lookahead(&self.prepared()?, 1, DRAW, report)
        }
    }

    #[test]
    fn both_update_modes_train_on_the_loss_and_report_it() -> Result<()> {
        for (loss, name) in [(AlignmentLoss::Sds, "sds"), (AlignmentLoss::Consistency, "consistency")] {
            let mut step = Step::new(loss, 0.5)?;
            step.config.lookahead.alignment.weight = 3.0;
            let (mut alternating, mut joint) = (PendingReport::default(), PendingReport::default());
            let Some(total) = step.lookahead(&mut alternating)? else { panic!("nothing to train on") };
            let Some((found, value)) = alternating.read()?.alignment else { panic!("no report") };
            assert_eq!(found, name);
            assert!(value > 1e-6 && (total.to_scalar::<f64>()? - 3.0 * value).abs() < 1e-12 * value, "{value}");
            let gradients = total.backward()?;
            for (name, variable) in step.parameters.all() {
                assert!(gradients.get(&variable).is_some(), "no gradient for {name}");
            }

            let total = step.losses(&[]).joint(&step.prepared()?, 1, DRAW, true, &mut joint)?.to_scalar::<f64>()?;
            let joint = joint.read()?;
            let (Some(diffusion), Some((_, value))) = (joint.diffusion, joint.alignment) else { panic!("no report") };
            assert!((total - diffusion - 3.0 * value).abs() < 1e-12 * total, "{total}");
        }
        Ok(())
    }

    #[test]
    fn with_a_weight_of_zero_it_is_reported_only() -> Result<()> {
        let mut step = Step::new(AlignmentLoss::Sds, 0.5)?;
        step.config.lookahead.alignment.weight = 0.0;
        let mut report = PendingReport::default();
        assert!(step.lookahead(&mut report)?.is_none() && report.alignment.is_some());
        step.config.lookahead.alignment.loss = AlignmentLoss::None;
        let mut report = PendingReport::default();
        assert!(step.lookahead(&mut report)?.is_none() && report.alignment.is_none());
        Ok(())
    }

    /// The gradients of the loss by every parameter, against finite differences of `factor mean((trained - target)^2)`,
    /// where the target stays what it was: neither loss differentiates its target.
    fn check(step: &Step, trained: impl Fn() -> Result<Tensor>, target: &Tensor, factor: f64) -> Result<()> {
        let Some(loss) = step.lookahead(&mut PendingReport::default())? else { panic!("nothing to train on") };
        let distance =
            || -> Result<f64> { Ok(((trained()? - target)?.sqr()?.mean_all()? * factor)?.to_scalar::<f64>()?) };
        let value = loss.to_scalar::<f64>()?;
        assert!((distance()? - value).abs() < 1e-10 * value, "{} and {value}", distance()?);
        let gradients = loss.backward()?;
        let mut seen = 0;
        for (i, (name, variable)) in step.parameters.all().into_iter().enumerate() {
            let Some(gradient) = gradients.get(&variable) else { panic!("no gradient for {name}") };
            let direction =
                Address::new(2, "direction").sample(i).normal(variable.shape(), DType::F64, &Device::Cpu)?;
            let direction = (&direction / direction.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())?;
            let start = variable.as_tensor().detach().copy()?;
            let at = |size: f64| -> Result<f64> {
                variable.set(&(&start + (&direction * size)?)?)?;
                distance()
            };
            let numeric = (at(1e-5)? - at(-1e-5)?) / 2e-5;
            variable.set(&start)?;
            let analytic = (gradient * direction)?.sum_all()?.to_scalar::<f64>()?;
            let error = (analytic - numeric).abs() / numeric.abs().max(1e-4 * value);
            assert!(error < 1e-5, "{name}: {analytic} and {numeric}");
            seen += usize::from(numeric.abs() > 1e-4 * value);
        }
        assert!(seen > 20, "only {seen} gradients are worth a look");
        Ok(())
    }

    /// What the loss sees of a step, as the step itself makes it.
    fn look<T>(step: &Step, see: impl Fn(&StepLosses<'_>, &View<'_>, &LcmPass) -> Result<T>) -> Result<T> {
        let losses = step.losses(&[]);
        let prepared = step.prepared()?;
        let timesteps = losses.draw_timesteps(&step.timesteps, "lookahead timestep", &prepared, DRAW);
        let conditions = losses.conditions(&prepared, &timesteps, losses.address("lookahead kv drop", DRAW), false)?;
        let view = View { prepared: &prepared, timesteps: &timesteps, conditions: &conditions, noise_prediction: None };
        let lcm = losses.lcm_pass(&view, Some(step.config.lookahead.lora_scale.at(step.config.seed, 1)))?;
        see(&losses, &view, &lcm)
    }

    #[test]
    fn score_distillation_trains_the_previews_towards_what_the_model_says_of_them() -> Result<()> {
        let step = Step::new(AlignmentLoss::Sds, 0.5)?;
        // The gradient by the previews alone tells where the target lies.
        let target = look(&step, |losses, view, lcm| {
            let previews = Var::from_tensor(&lcm.previews)?;
            let gradients = losses.sds(view, &previews, DRAW)?.backward()?;
            let Some(gradient) = gradients.get(&previews) else { panic!("no gradient") };
            Ok((previews.as_detached_tensor() - (gradient * previews.elem_count() as f64)?)?)
        })?;
        check(&step, || look(&step, |_, _, lcm| Ok(lcm.previews.clone())), &target, 0.5)
    }

    #[test]
    fn consistency_trains_the_lcm_at_full_scale_towards_a_step_of_the_model_further() -> Result<()> {
        for lora_scale in [0.5, 1.0] {
            let step = Step::new(AlignmentLoss::Consistency, lora_scale)?;
            let target = look(&step, |losses, view, _| losses.consistency_further(view))?;
            assert!(!target.track_op(), "the target is part of a graph");
            check(&step, || look(&step, |losses, view, lcm| losses.consistency_at_timesteps(view, lcm)), &target, 1.0)?;
        }
        Ok(())
    }

    #[test]
    fn joint_updates_take_the_models_prediction_from_the_diffusion_loss() -> Result<()> {
        let mut step = Step::new(AlignmentLoss::Consistency, 1.0)?;
        step.config.dropout.adapter_drop_chance = 0.0;
        step.config.timesteps.lcm_max_timestep = 1000;
        // With the same timesteps and dropped tokens both modes see the same.
        let losses = step.losses(&[]);
        let prepared = step.prepared()?;
        let mut report = PendingReport::default();
        losses.joint(&prepared, 1, DRAW, true, &mut report)?;
        let timesteps = losses.draw_timesteps(&step.timesteps, "timestep", &prepared, DRAW);
        let conditions = losses.conditions(&prepared, &timesteps, losses.address("kv drop", DRAW), false)?;
        let view = View { prepared: &prepared, timesteps: &timesteps, conditions: &conditions, noise_prediction: None };
        let Some((_, expected)) = losses.alignment(&view, &losses.lcm_pass(&view, Some(1.0))?, DRAW)? else {
            panic!("none")
        };
        let (expected, found) = (expected.to_scalar::<f64>()?, report.read()?.alignment.map(|(_, value)| value));
        assert!(found.is_some_and(|found| (found - expected).abs() < 1e-12 * expected), "{found:?} and {expected}");
        Ok(())
    }
}

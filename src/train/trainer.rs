//! The trainer.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use super::config::UpdateMode;
use super::report::{LossReport, PendingReport, Reading, StepReport};
use super::step::{Prepared, StepLosses};
use super::validation::Validation;
use super::{AdamW, AdamWConfig, Checkpoint, Ema, Gradients, MetricsWriter, ParameterGroup, Progress, TrainConfig};
use super::{checkpoint, config};
use crate::autograd::{self, with_large_stack};
use crate::data::FaceDataset;
use crate::formats::EncoderFile;
use crate::lookahead::{Base, FaceEncoder, ImageLoss};
use crate::models::resampler;
use crate::models::unet::Recording;
use crate::nn::{Parameters, Weights};
use crate::ops;
use crate::personalize::{Personalizer, encoder_config};
use crate::schedule::AnnealedTimestepSampler;
use crate::{Error, Result};

/// What training starts from: a pretrained IP-Adapter (paper, section 4.5), or a whole encoder.
#[derive(Clone, Debug)]
pub struct AdapterInit {
    /// The shape of its resampler.
    pub resampler: resampler::Config,
    /// Its tensors, `image_proj.*`, `ip_adapter.*` and, of a whole encoder, `kv_encoder.*`. What is missing starts at
    /// random.
    pub tensors: HashMap<String, Tensor>,
}

/// An encoder in any published form, the authors' released checkpoint among them, to go on from. A KV branch goes along;
/// its ranks must then be those of the configuration ([`KvEncoderConfig`](crate::lookahead::KvEncoderConfig)).
impl From<EncoderFile> for AdapterInit {
    fn from(file: EncoderFile) -> Self {
        AdapterInit { resampler: file.config.resampler, tensors: file.tensors.into_iter().collect() }
    }
}

/// Trains a [`FaceEncoder`] on pairs of pictures: the diffusion loss on the target, and the lookahead loss on the
/// preview of it.
///
/// Owns the frozen base, the encoder's parameters, the data set, the optimizer and the configuration. A step is a pure
/// function of these and its number, so that a resumed run equals one that was not interrupted, bit for bit.
pub struct Trainer {
    base: Base,
    resampler: resampler::Config,
    parameters: Parameters,
    trained: Parameters,
    encoder: FaceEncoder,
    image_losses: Vec<(Box<dyn ImageLoss>, f64)>,
    dataset: FaceDataset,
    config: TrainConfig,
    output: PathBuf,
    optimizer: AdamW,
    ema: Option<Ema>,
    diffusion_timesteps: AnnealedTimestepSampler,
    lookahead_timesteps: AnnealedTimestepSampler,
    step: u64,
}

impl Trainer {
    /// A trainer at step 0, which will write to the folder `output`.
    ///
    /// The identity loss of the base is the image loss, with the weight of the configuration; see
    /// [`Trainer::add_image_loss`] for more.
    ///
    /// # Errors
    /// [`Error::Config`] where a field is out of range or does not fit the base, [`Error::Tensor`] where the adapter's
    /// tensors do not fit.
    pub fn new(
        base: Base,
        adapter: &AdapterInit,
        dataset: FaceDataset,
        config: TrainConfig,
        output: impl AsRef<Path>,
    ) -> Result<Self> {
        config.validate()?;
        check_against_base(&config, &base)?;
        // What is trained is kept in f32 beside a base of bf16 or f16, whose updates would else be lost in rounding.
        let dtype = ops::wide_dtype(base.dtype);
        let parameters = Parameters::new();
        let in_kv = |name: &str| name.starts_with("kv_encoder.");
        if let Some(name) = adapter.tensors.keys().filter(|name| in_kv(name)).min() {
            let asked = Weights::shapes_only();
            FaceEncoder::load(&encoder_config(&adapter.resampler, &config), &base.unet, &asked, &asked)?;
            let asked = asked.shapes();
            let fits = |(name, tensor): (&String, &Tensor)| {
                !in_kv(name) || asked.get(name).is_some_and(|shape| shape == tensor.dims())
            };
            if !adapter.tensors.iter().all(fits) {
                let reason = format!(
                    "the encoder to start from has a KV branch of other ranks or blocks (`{name}` is {:?}); set \
                     kv_branch, encoder_lora_rank, kv_lora_rank and extended_layers to its own",
                    adapter.tensors[name].dims()
                );
                return Err(config_error("adapter", reason));
            }
        }
        for (name, tensor) in &adapter.tensors {
            if FaceEncoder::is_adapter_parameter(name) || in_kv(name) {
                let value = tensor.to_dtype(dtype)?.to_device(&base.device)?;
                parameters.insert(name, candle_core::Var::from_tensor(&value)?);
            }
        }
        let weights = Weights::trainable(&parameters, config.seed, dtype, &base.device);
        let shape = encoder_config(&adapter.resampler, &config);
        let mut encoder = FaceEncoder::load(&shape, &base.unet, &weights, &weights)?;
        let trained = match config.adapter.optimize_adapter {
            true => parameters.clone(),
            false => {
                // The same values, but no part of any graph.
                let frozen = parameters
                    .all()
                    .into_iter()
                    .map(|(name, variable)| Ok((name, variable.as_detached_tensor().to_dtype(base.dtype)?)));
                let frozen = Weights::frozen("the adapter", frozen.collect::<Result<_>>()?);
                encoder = FaceEncoder::load(&shape, &base.unet, &frozen, &weights)?;
                parameters.filter(|name| !FaceEncoder::is_adapter_parameter(name))
            }
        };
        if trained.is_empty() {
            let reason = "nothing would be trained: the adapter is frozen, and there is no KV branch or both its LoRA ranks are 0".into();
            return Err(config_error("adapter.optimize_adapter", reason));
        }
        let optimizer = optimizer(&trained, &config)?;
        let ema = Ema::from_config(&trained, &config.ema)?;
        let image_losses: Vec<(Box<dyn ImageLoss>, f64)> =
            vec![(Box::new(base.identity_loss()), config.lookahead.identity_weight)];
        let total = base.schedule.timestep_count();
        let sampler = |alpha, max| AnnealedTimestepSampler::new(alpha, max, total);
        Ok(Trainer {
            diffusion_timesteps: sampler(config.timesteps.diffusion_annealing, total)?,
            lookahead_timesteps: sampler(config.timesteps.lookahead_annealing, config.timesteps.lcm_max_timestep)?,
            base,
            resampler: adapter.resampler.clone(),
            parameters,
            trained,
            encoder,
            image_losses,
            dataset,
            config,
            output: output.as_ref().to_path_buf(),
            optimizer,
            ema,
            step: 0,
        })
    }

    /// Adds an image loss on the preview (equation 4 takes any distance between images), with a weight.
    pub fn add_image_loss(&mut self, loss: Box<dyn ImageLoss>, weight: f64) {
        self.image_losses.push((loss, weight));
    }

    /// Iterations done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The hyperparameters.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// All parameters of the encoder, by name, frozen ones among them.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Goes on from the latest checkpoint in the output folder; returns false where there is none.
    ///
    /// # Errors
    /// As [`Trainer::resume_from`].
    pub fn resume(&mut self) -> Result<bool> {
        match checkpoint::latest(&self.output)? {
            Some(folder) => self.resume_from(folder).map(|()| true),
            None => Ok(false),
        }
    }

    /// Goes on from a checkpoint folder.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] where the folder holds no whole checkpoint, [`Error::Tensor`] where it belongs
    /// to another configuration, [`Error::Training`] where newer checkpoints of this run would be mixed with the new ones.
    pub fn resume_from(&mut self, folder: impl AsRef<Path>) -> Result<()> {
        let loaded = Checkpoint::load(&folder)?;
        if let Some((newest, path)) = checkpoint::list(&self.output).unwrap_or_default().pop()
            && newest > loaded.step
        {
            let reason = format!(
                "the run already has {} beyond step {}; move it away, or write to another folder",
                path.display(),
                loaded.step
            );
            return Err(Error::Training { step: loaded.step, reason });
        }
        loaded.restore_parameters(&self.parameters)?;
        let source = loaded.folder.display().to_string();
        self.optimizer.load_state(&source, &loaded.optimizer)?;
        if let Some(ema) = &mut self.ema {
            match &loaded.ema {
                Some(state) => ema.load_state(&source, state)?,
                None => ema.restart()?,
            }
        }
        self.step = loaded.step;
        Ok(())
    }

    /// Writes a checkpoint of the present state and returns its folder.
    ///
    /// # Errors
    /// [`Error::Io`] naming what could not be written; earlier checkpoints are then as they were.
    pub fn save_checkpoint(&self) -> Result<PathBuf> {
        let state = Checkpoint::capture(self.step, &self.parameters, &self.optimizer, self.ema.as_ref(), &self.config)?;
        state.save(&self.output, self.config.checkpointing.keep_last)
    }

    /// Does one training iteration.
    ///
    /// # Errors
    /// [`Error::Training`] where a loss or gradient is not finite (the parameters are then as before the update);
    /// [`Error::Dataset`] where no picture can be read; those of the networks.
    pub fn train_step(&mut self) -> Result<StepReport> {
        with_large_stack(|| self.train_step_here())
    }

    fn train_step_here(&mut self) -> Result<StepReport> {
        let step = self.step;
        let schedule = &self.config.optimizer;
        let lr_factor = schedule.lr_scheduler.factor(step, schedule.lr_warmup_steps, self.config.max_train_steps);
        let every = self.config.lookahead.every_k_steps;
        let lookahead = every > 0 && step.is_multiple_of(every);
        let batches = self.prepare(step)?;
        let mut report = LossReport::default();
        let mut gradient_norms = Vec::new();
        match self.config.update_mode {
            UpdateMode::Joint => {
                let gradients = self.accumulate(&batches, &mut report, |losses, prepared, draw, part| {
                    losses.joint(prepared, step, draw, lookahead, part).map(Some)
                })?;
                gradient_norms.extend(self.update(gradients, lr_factor)?);
            }
            // The second update sees the parameters as the first one left them (official code).
            UpdateMode::Alternating => {
                let gradients = self.accumulate(&batches, &mut report, |losses, prepared, draw, part| {
                    losses.diffusion(prepared, draw, part).map(Some)
                })?;
                gradient_norms.extend(self.update(gradients, lr_factor)?);
                if lookahead {
                    let gradients = self.accumulate(&batches, &mut report, |losses, prepared, draw, part| {
                        losses.lookahead(prepared, step, draw, part)
                    })?;
                    gradient_norms.extend(self.update(gradients, lr_factor)?);
                }
            }
        }
        if let Some(ema) = &mut self.ema {
            ema.update()?;
        }
        self.step += 1;
        Ok(StepReport { step, losses: report, gradient_norms, lr_factor })
    }

    /// The losses that the iteration `step` would see with the present parameters; nothing is updated. The same step
    /// gives the same pictures, timesteps and noise, so values before and after training can be compared.
    ///
    /// # Errors
    /// As [`Trainer::train_step`].
    pub fn evaluate(&self, step: u64) -> Result<LossReport> {
        with_large_stack(|| {
            let batches = self.prepare(step)?;
            let mut report = LossReport::default();
            for (draw, prepared) in &batches {
                let mut part = PendingReport::default();
                self.losses().joint(prepared, step, *draw, true, &mut part)?;
                report.add(part.read()?, batches.len() as u64);
            }
            Ok(report)
        })
    }

    /// The batches of a step, one for each part of the gradient accumulation, with their numbers in the run.
    fn prepare(&self, step: u64) -> Result<Vec<(u64, Prepared)>> {
        let (seed, size) = (self.config.seed, self.config.train_batch_size);
        let accumulation = self.config.gradient_accumulation_steps as u64;
        (step * accumulation..(step + 1) * accumulation)
            .map(|draw| {
                let batch = self.dataset.batch(seed, draw, 0, 1, size, &Device::Cpu)?;
                Ok((draw, self.losses().prepare(&batch, draw)?))
            })
            .collect()
    }

    /// The mean gradient of a loss over the batches of a step; empty where the loss counted nothing.
    fn accumulate(
        &self,
        batches: &[(u64, Prepared)],
        report: &mut LossReport,
        loss: impl Fn(&StepLosses<'_>, &Prepared, u64, &mut PendingReport) -> Result<Option<Tensor>>,
    ) -> Result<Gradients> {
        let mut gradients = Gradients::new();
        for (draw, prepared) in batches {
            let (mut part, mut total) = (PendingReport::default(), None);
            let store = autograd::gradients(|| {
                let loss = loss(&self.losses(), prepared, *draw, &mut part)?;
                total = loss.as_ref().map(Reading::start).transpose()?;
                Ok(loss)
            })?;
            // Asked for behind the backward pass, which is then on its way.
            let value = total.map_or(Ok(0.0), |total| total.wait())?;
            if !value.is_finite() {
                return Err(Error::Training { step: self.step, reason: format!("the loss is {value}") });
            }
            if let Some(store) = store {
                gradients.accumulate(Gradients::extract(&store, &self.trained))?;
            }
            report.add(part.read()?, batches.len() as u64);
        }
        if batches.len() > 1 {
            gradients.scale(1.0 / batches.len() as f64)?;
        }
        Ok(gradients)
    }

    /// One update of the parameters; returns the norm of the gradient before clipping. Without gradients, no update.
    fn update(&mut self, gradients: Gradients, lr_factor: f64) -> Result<Option<f64>> {
        if gradients.is_empty() {
            return Ok(None);
        }
        let norm = self.optimizer.clip_and_step(gradients, lr_factor, self.config.optimizer.max_grad_norm)?;
        if !norm.is_finite() {
            return Err(Error::Training { step: self.step, reason: format!("the norm of the gradient is {norm}") });
        }
        Ok(Some(norm))
    }

    fn losses(&self) -> StepLosses<'_> {
        StepLosses {
            base: &self.base,
            encoder: &self.encoder,
            config: &self.config,
            image_losses: &self.image_losses,
            diffusion_timesteps: &self.diffusion_timesteps,
            lookahead_timesteps: &self.lookahead_timesteps,
        }
    }

    /// A personalizer with the present parameters (their moving average, where there is one): frozen, and sharing
    /// their memory.
    ///
    /// # Errors
    /// Where memory is out.
    pub fn personalizer(&self) -> Result<Personalizer> {
        let mut tensors: HashMap<String, Tensor> =
            self.parameters.all().into_iter().map(|(name, variable)| (name, variable.as_detached_tensor())).collect();
        if let Some(ema) = &self.ema {
            tensors.extend(ema.averages().iter().map(|(name, tensor)| (name.clone(), tensor.clone())));
        }
        Personalizer::from_tensors(self.base.clone(), &self.resampler, &self.config, "the trainer", &tensors)
    }

    /// Trains to the end: `max_train_steps`, with metrics, checkpoints, validation pictures and a progress bar, all in
    /// the output folder.
    ///
    /// # Errors
    /// Those of [`Trainer::train_step`] and of writing. What was written before stays.
    pub fn run(&mut self) -> Result<()> {
        let (total, config) = (self.config.max_train_steps, self.config.clone());
        if config.lookahead.perceptual_weight > 0.0 && self.image_losses.len() == 1 {
            tracing::warn!(
                "lookahead.perceptual_weight is {}, but no perceptual loss was added: training with the identity loss alone",
                config.lookahead.perceptual_weight
            );
        }
        let mut metrics = MetricsWriter::open(&self.output, self.step, config.logging.tensorboard)?;
        let progress = Progress::new(self.step, total, 10);
        let validation = Validation::new(&config.validation, &self.dataset, config.seed, self.base.resolution)?;
        while self.step < total {
            let report = self.train_step()?;
            let identity = report.losses.lookahead.first().filter(|(_, _, counted)| *counted > 0);
            progress.update(
                self.step,
                report.losses.diffusion.unwrap_or(f64::NAN),
                identity.map(|(_, value, _)| *value),
            );
            if report.step.is_multiple_of(config.logging.every_n_steps) {
                let values = report.values(&self.optimizer.learning_rates());
                let values: Vec<(&str, f64)> = values.iter().map(|(name, value)| (name.as_str(), *value)).collect();
                metrics.write(report.step, &values)?;
            }
            let due = |every: u64| every > 0 && self.step.is_multiple_of(every);
            if due(config.checkpointing.every_n_steps) || self.step == total {
                self.save_checkpoint()?;
            }
            if due(config.validation.every_n_steps) || (self.step == total && config.validation.every_n_steps > 0) {
                let sheet = validation.sheet(&self.personalizer()?, &config)?;
                let path = self.output.join("validation").join(format!("step-{:06}.png", self.step));
                crate::data::save_png(&sheet, &path)?;
                metrics.image(self.step, "validation", &sheet)?;
                progress.message(&format!("validation pictures: {}", path.display()));
            }
        }
        progress.finish();
        let skipped = self.dataset.report();
        if skipped.missing + skipped.unreadable > 0 {
            progress.message(&format!(
                "{} missing and {} unreadable pictures were skipped",
                skipped.missing, skipped.unreadable
            ));
        }
        Ok(())
    }
}

/// Two groups with a learning rate each: the KV branch's LoRA, and the adapter.
fn optimizer(trained: &Parameters, config: &TrainConfig) -> Result<AdamW> {
    let rates: &config::OptimizerConfig = &config.optimizer;
    let group = |parameters: Parameters, learning_rate| ParameterGroup {
        parameters,
        learning_rate,
        weight_decay: rates.adam_weight_decay,
    };
    let groups = [
        group(trained.filter(|name| !FaceEncoder::is_adapter_parameter(name)), rates.learning_rate),
        group(trained.filter(FaceEncoder::is_adapter_parameter), rates.adapter_lr),
    ];
    let groups = groups.into_iter().filter(|group| !group.parameters.is_empty()).collect();
    AdamW::new(groups, AdamWConfig::from(rates))
}

fn config_error(field: &str, reason: String) -> Error {
    Error::Config { source_name: "training configuration".into(), field: field.into(), reason }
}

fn check_against_base(config: &TrainConfig, base: &Base) -> Result<()> {
    if config.data.resolution != base.resolution {
        let reason = format!("the base works at {} pixels, found {}", base.resolution, config.data.resolution);
        return Err(config_error("data.resolution", reason));
    }
    let names = base.unet.block_names();
    for beginning in &config.adapter.extended_layers {
        let recording = Recording { blocks: vec![beginning.clone()], ..Recording::default() };
        let known = names.iter().any(|name| recording.includes(name));
        if !known {
            let reason = format!("`{beginning}` begins no transformer block's name; they are {names:?}");
            return Err(config_error("adapter.extended_layers", reason));
        }
    }
    Ok(())
}

//! The loop that all stages share: micro-batches on workers, gradients summed, one update, an average of the weights.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use rand::Rng;
use rayon::prelude::*;

use super::files::{load_tensors, save_tensors};
use super::workers::{Workers, share};
use crate::nn::{Parameters, Weights};
use crate::random::Address;
use crate::train::{AdamW, AdamWConfig, Ema, Gradients, ParameterGroup};
use crate::{Error, Result, ops};

const REPORT_EVERY: Duration = Duration::from_secs(10);
const SAVE_EVERY: Duration = Duration::from_secs(90);
/// The name under which a stage's file keeps its count of updates.
pub(super) const STEP: &str = "pretrain.step";

/// What the person who starts a stage decides.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of the stages' files.
    pub out: PathBuf,
    /// When the time budget was started.
    pub start: Instant,
    /// Time budget; training stops and saves when it is used up.
    pub budget: Duration,
    /// Most updates; training ends when they are made.
    pub steps: Option<u64>,
    /// How many threads draw portraits, and, on the CPU, how many workers share a batch.
    pub threads: usize,
    /// Where the networks are trained. A GPU takes a batch as a whole.
    pub device: Device,
    /// What the networks compute in, f32 or bf16. What is trained is f32 either way, and so are losses.
    pub dtype: DType,
    /// Samples per update; each stage has a default.
    pub batch: Option<usize>,
    /// Peak learning rate; each stage has a default.
    pub learning_rate: Option<f64>,
    /// How many portraits there are at most.
    pub pool: usize,
    /// A file of portraits that the stage `draw` wrote.
    pub pool_file: Option<PathBuf>,
    /// The seed of all draws.
    pub seed: u64,
    /// Whether to start again where a file of the stage exists.
    pub fresh: bool,
    /// The part of the learning rate's schedule that this run goes through: 0 to 1 for all of it. A stage that is
    /// trained in several runs splits it.
    pub schedule: (f64, f64),
}

impl Default for Options {
    /// Ten minutes on one core.
    fn default() -> Self {
        Options {
            out: "out/pretrain".into(),
            start: Instant::now(),
            budget: Duration::from_secs(600),
            steps: None,
            threads: 1,
            device: Device::Cpu,
            dtype: DType::F32,
            batch: None,
            learning_rate: None,
            pool: 8000,
            pool_file: None,
            seed: 0,
            fresh: false,
            schedule: (0.0, 1.0),
        }
    }
}

impl Options {
    /// The workers that share a batch.
    ///
    /// # Errors
    /// Those of [`Workers::new`].
    pub(super) fn workers(&self) -> Result<Workers> {
        Workers::new(if self.device.is_cpu() { self.threads } else { 1 })
    }

    /// The stage's batch: the CPU's unless the networks are on a GPU, or the person who starts it says otherwise.
    pub(super) fn batch_or(&self, cpu: usize, gpu: usize) -> usize {
        self.batch.unwrap_or(if self.device.is_cpu() { cpu } else { gpu }).max(1)
    }

    /// Trainable weights in f32, where the networks are.
    pub(super) fn trainable(&self, parameters: &Parameters) -> Weights {
        Weights::trainable(parameters, self.seed, DType::F32, &self.device)
    }

    /// What networks are given, in the dtype they compute in.
    pub(super) fn input(&self, tensor: &Tensor) -> Result<Tensor> {
        ops::cast(tensor, self.dtype)
    }
}

/// What a stage decides.
pub struct Recipe<'a> {
    /// The stage's name, which is that of its file.
    pub stage: &'static str,
    /// What is trained.
    pub parameters: &'a Parameters,
    /// Samples per update.
    pub batch: usize,
    /// Peak learning rate, unless the options say otherwise; it falls to a twentieth of it along half a cosine.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the average of the weights, which is what is saved.
    pub ema_decay: f64,
    /// Parameters that hold the average while training goes on.
    pub mirror: Option<&'a Parameters>,
    /// Tensors saved beside the parameters.
    pub constants: HashMap<String, Tensor>,
}

/// One worker's part of an update.
pub struct MicroBatch {
    /// Which update.
    pub step: u64,
    /// Which samples of it.
    pub samples: Range<usize>,
    /// How much of the training is done, 0 to 1.
    pub progress: f64,
    seed: u64,
    device: Device,
}

impl MicroBatch {
    /// Samples of a step that is not part of the training.
    pub(super) fn of(options: &Options, step: u64, samples: Range<usize>) -> Self {
        MicroBatch { step, samples, progress: 1.0, seed: options.seed, device: options.device.clone() }
    }

    /// How many samples.
    pub fn size(&self) -> usize {
        self.samples.len()
    }

    /// The address of this update's draws for a purpose.
    pub fn address(&self, purpose: &'static str) -> Address {
        Address::new(self.seed, purpose).step(self.step)
    }

    /// One value a sample, from the sample's own address.
    pub fn each<T>(&self, purpose: &'static str, mut draw: impl FnMut(Address) -> T) -> Vec<T> {
        self.samples.clone().map(|sample| draw(self.address(purpose).sample(sample))).collect()
    }

    /// Standard normal noise `(samples, shape..)`, f32: each sample from its own address on the CPU, from the device's
    /// own generator on a GPU, where drawing and copying would take longer than the rest of the update.
    ///
    /// # Errors
    /// [`Error::Candle`] where memory is out.
    pub fn noise(&self, purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
        if !self.device.is_cpu() {
            return Ok(Tensor::randn(0f32, 1f32, [&[self.size()], shape].concat(), &self.device)?);
        }
        let draw = |address: Address| address.normal(shape, DType::F32, &Device::Cpu);
        Ok(Tensor::stack(&self.each(purpose, draw).into_iter().collect::<Result<Vec<_>>>()?, 0)?)
    }
}

/// A micro-batch's loss, and what else is worth a look.
pub struct Losses {
    /// The mean over the samples.
    pub loss: Tensor,
    /// Named numbers for the report. They are read when the update is made, as reading waits for the device.
    pub parts: Vec<(&'static str, Tensor)>,
}

impl From<Tensor> for Losses {
    fn from(loss: Tensor) -> Self {
        Losses { loss, parts: Vec::new() }
    }
}

struct Answer {
    gradients: Vec<(String, Tensor)>,
    weight: f64,
    loss: Tensor,
    parts: Vec<(&'static str, Tensor)>,
}

/// Trains until the budget is used up, and leaves the average of the weights in the parameters and in
/// `<out>/<stage>.safetensors`. Goes on from that file where it exists.
///
/// # Errors
/// Those of `loss`; [`Error::Io`] where a file cannot be written; [`Error::Training`] where losses stay infinite.
pub fn train(
    options: &Options,
    workers: &Workers,
    recipe: &Recipe<'_>,
    loss: impl Fn(&MicroBatch) -> Result<Losses> + Sync,
) -> Result<()> {
    let parameters = recipe.parameters;
    let file = options.out.join(format!("{}.safetensors", recipe.stage));
    let optimizer_file = options.out.join(format!("{}.optimizer.safetensors", recipe.stage));
    let group = ParameterGroup {
        parameters: parameters.clone(),
        learning_rate: options.learning_rate.unwrap_or(recipe.learning_rate),
        weight_decay: recipe.weight_decay,
    };
    let mut optimizer = AdamW::new(vec![group], AdamWConfig { beta2: 0.99, ..AdamWConfig::default() })?;
    let mut first_step = 0;
    if file.exists() && !options.fresh {
        let mut saved = load_tensors(&file)?;
        for (name, variable) in parameters.all() {
            // A file of `init` has no tensors that only the training needs.
            if let Entry::Vacant(vacant) = saved.entry(name) {
                vacant.insert(variable.copy()?.detach());
            }
        }
        parameters.assign(&file.display().to_string(), &saved)?;
        if let Some(step) = saved.get(STEP) {
            first_step = step.to_scalar::<i64>()? as u64;
        }
        if optimizer_file.exists() {
            optimizer.load_state(&optimizer_file.display().to_string(), &load_tensors(&optimizer_file)?)?;
        }
        println!("{}: goes on from step {first_step} of {}", recipe.stage, file.display());
    }
    let mut ema = Ema::new(parameters, recipe.ema_decay, true)?;
    if let Some(mirror) = recipe.mirror {
        ema.apply_to(mirror)?;
    }
    let batch = recipe.batch;
    if !options.device.is_cpu() {
        // What the device draws by itself.
        options.device.set_seed(Address::new(options.seed, recipe.stage).step(first_step).rng().random())?;
    }
    println!(
        "{}: {} parameters, batch {batch}, {} workers, {:.0} s left",
        recipe.stage,
        parameters.element_count(),
        workers.count(),
        options.budget.saturating_sub(options.start.elapsed()).as_secs_f64(),
    );
    let save = |ema: &Ema, optimizer: &AdamW, step: u64| -> Result<()> {
        let mut tensors = ema.averages().clone();
        tensors.extend(recipe.constants.clone());
        tensors.insert(STEP.to_string(), Tensor::new(step as i64, &Device::Cpu)?);
        save_tensors(&file, &tensors)?;
        save_tensors(&optimizer_file, &optimizer.state()?)
    };

    let began = Instant::now();
    let (mut reported, mut saved) = (began, began);
    let (mut step, mut smooth, mut faults) = (first_step, Vec::<(&'static str, f64)>::new(), 0);
    loop {
        let left = options.budget.saturating_sub(options.start.elapsed()).as_secs_f64();
        let spent = began.elapsed().as_secs_f64();
        let mut progress = spent / (spent + left).max(1e-9);
        if let Some(steps) = options.steps {
            progress = progress.max((step - first_step) as f64 / steps.max(1) as f64);
        }
        if progress >= 1.0 {
            break;
        }
        let whole = options.schedule.0 + (options.schedule.1 - options.schedule.0) * progress;
        let answers = workers.run(|worker| {
            let samples = share(batch, worker, workers.count());
            if samples.is_empty() {
                return Ok(None);
            }
            let micro =
                MicroBatch { step, samples, progress: whole, seed: options.seed, device: options.device.clone() };
            let Losses { loss, parts } = loss(&micro)?;
            let weight = micro.size() as f64 / batch as f64;
            let store = (&loss * weight)?.backward()?;
            let gradients = Gradients::extract(&store, parameters);
            let gradients = gradients
                .iter()
                .map(|(name, gradient)| Ok((name.to_string(), gradient.contiguous()?)))
                .collect::<Result<Vec<_>>>()?;
            Ok(Some(Answer { gradients, weight, loss: loss.detach(), parts }))
        })?;
        let answers: Vec<Answer> = answers.into_iter().flatten().collect();
        let warm = ((step - first_step + 1) as f64 / 50.0).min(1.0);
        let factor = 0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * whole).cos());
        let norm = optimizer.clip_and_step(sum(&answers)?, warm * factor, 1.0)?;
        report_numbers(&mut smooth, &answers)?;
        if norm.is_finite() {
            ema.update()?;
            if let Some(mirror) = recipe.mirror {
                ema.apply_to(mirror)?;
            }
            faults = 0;
        } else {
            faults += 1;
            println!("{}: step {step}: gradient norm {norm}, left out", recipe.stage);
            if faults > 20 {
                let reason = "the gradients stay infinite or not a number".to_string();
                return Err(Error::Training { step, reason });
            }
        }
        step += 1;
        if reported.elapsed() > REPORT_EVERY || step == first_step + 1 {
            reported = Instant::now();
            let numbers: Vec<String> = smooth.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
            let rate = (step - first_step) as f64 / began.elapsed().as_secs_f64();
            println!(
                "{}: step {step} ({:.0} %)  {}  norm {norm:.3}  {rate:.2} steps/s, {:.1} samples/s",
                recipe.stage,
                100.0 * progress,
                numbers.join("  "),
                rate * batch as f64,
            );
        }
        if saved.elapsed() > SAVE_EVERY {
            saved = Instant::now();
            save(&ema, &optimizer, step)?;
        }
    }
    save(&ema, &optimizer, step)?;
    ema.apply_to(parameters)?;
    let numbers: Vec<String> = smooth.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
    let seconds = began.elapsed().as_secs_f64();
    let samples = (step - first_step) * batch as u64;
    println!(
        "{}: done after step {step}, {samples} samples in {seconds:.1} s ({:.0} a second)  {}",
        recipe.stage,
        samples as f64 / seconds,
        numbers.join("  ")
    );
    Ok(())
}

/// The gradients of all micro-batches together: parameters in parallel, workers in order.
fn sum(answers: &[Answer]) -> Result<Gradients> {
    let Some(first) = answers.first() else { return Ok(Gradients::new()) };
    let sums: Vec<(&str, Tensor)> = (0..first.gradients.len())
        .into_par_iter()
        .map(|i| {
            let (name, gradient) = &first.gradients[i];
            let mut sum = gradient.clone();
            for answer in &answers[1..] {
                // Every micro-batch runs the same network, so the same parameters have gradients.
                sum = (sum + &answer.gradients[i].1)?;
            }
            Ok((name.as_str(), sum))
        })
        .collect::<Result<_>>()?;
    let mut gradients = Gradients::new();
    sums.into_iter().for_each(|(name, gradient)| gradients.insert(name, gradient));
    Ok(gradients)
}

/// Moves the smoothed numbers of the report towards those of this update.
fn report_numbers(smooth: &mut Vec<(&'static str, f64)>, answers: &[Answer]) -> Result<()> {
    let read = |tensor: &Tensor| -> Result<f64> { Ok(tensor.to_dtype(DType::F64)?.to_scalar::<f64>()?) };
    let mut now = vec![("loss", 0.0)];
    for answer in answers {
        now[0].1 += answer.weight * read(&answer.loss)?;
        for (name, value) in &answer.parts {
            let value = read(value)?;
            match now.iter_mut().find(|(known, _)| known == name) {
                Some((_, sum)) => *sum += answer.weight * value,
                None => now.push((name, answer.weight * value)),
            }
        }
    }
    for (name, value) in now {
        match smooth.iter_mut().find(|(known, _)| *known == name) {
            Some((_, mean)) => *mean += 0.03 * (value - *mean),
            None => smooth.push((name, value)),
        }
    }
    Ok(())
}

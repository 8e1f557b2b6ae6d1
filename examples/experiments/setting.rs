//! What all measurements share.

use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_core::{DType, Device};
use lcm_lookahead::mini::{self, MiniConfig};
use lcm_lookahead::models::mini_identity;
use lcm_lookahead::nn::Weights;
use lcm_lookahead::train::AdapterInit;
use lcm_lookahead::{Base, Guidance};
use serde::{Deserialize, Serialize};

use crate::arguments::Arguments;
use crate::judge::Judge;

/// The frozen networks, the judge, and how much is to be done. Each thread has its own.
pub struct Setting {
    pub base: Base,
    /// The pretrained IP-Adapter.
    pub adapter: AdapterInit,
    pub judge: Judge,
    pub size: Size,
    pub hyperparameters: Hyperparameters,
    /// The folder of everything that is written.
    pub out: PathBuf,
    /// The pictures to train on.
    pub data: PathBuf,
    /// What outcomes must agree in to stand in one table.
    pub fingerprint: String,
    /// First seed of the run, whose pictures are kept.
    pub first_seed: u64,
}

/// What was chosen on the validation people.
#[derive(Clone, Debug)]
pub struct Hyperparameters {
    pub adapter_lr: f64,
    pub learning_rate: f64,
    pub identity_weight: f64,
    pub guidance_scale: f64,
    pub teacher_guidance: f64,
}

impl Hyperparameters {
    pub fn of(arguments: &Arguments) -> Self {
        let (asked, full) = (&arguments.hyperparameters, arguments.full);
        let or = |asked: Option<f64>, quick: f64, published: f64| asked.unwrap_or(if full { published } else { quick });
        Hyperparameters {
            adapter_lr: asked.adapter_lr,
            learning_rate: or(asked.learning_rate, 1e-3, 1e-2),
            identity_weight: or(asked.identity_weight, 0.1, 0.03),
            guidance_scale: asked.guidance_scale,
            teacher_guidance: asked.teacher_guidance,
        }
    }
}

/// How much is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Size {
    /// Iterations of a training run.
    pub steps: u64,
    /// Samples of an iteration.
    pub batch: usize,
    /// People to train on.
    pub training_people: usize,
    /// People of the evaluation.
    pub people: usize,
    /// Whether they are those for choices.
    pub validation: bool,
    /// Denoising steps of a picture of the evaluation.
    pub sampling_steps: usize,
    /// Pictures whose previews are looked at.
    pub samples: usize,
    /// Steps those are denoised in.
    pub preview_steps: usize,
    /// Iterations in which the personal LoRA of that experiment is trained.
    pub lora_steps: u64,
}

impl Size {
    pub fn of(arguments: &Arguments) -> Self {
        let (asked, full) = (&arguments.size, arguments.full);
        let or = |asked: Option<usize>, quick: usize, published: usize| {
            asked.unwrap_or(if full { published } else { quick }).max(1)
        };
        Size {
            steps: asked.steps.unwrap_or(if full { 600 } else { 60 }).max(1),
            batch: or(asked.batch, 4, 16),
            training_people: or(asked.training_people, 64, 2000),
            people: or(asked.people, 6, 40),
            validation: arguments.validation,
            sampling_steps: or(asked.sampling_steps, 12, 20),
            samples: or(asked.samples, 8, 64),
            preview_steps: if full { 50 } else { 20 },
            lora_steps: if full { 300 } else { 40 },
        }
    }
}

impl Setting {
    /// Loads the networks onto a device of this thread's own.
    pub fn load(arguments: &Arguments) -> anyhow::Result<Self> {
        let (device, dtype) = (arguments.compute.open()?, arguments.compute.dtype(DType::F32)?);
        let weights = |dtype: DType, device: &Device| match &arguments.weights {
            Some(path) => Weights::from_safetensors(path, dtype, device),
            None => mini::weights(dtype, device),
        };
        let base = mini::base_from(&weights(dtype, &device)?)?;
        let adapter = AdapterInit {
            resampler: MiniConfig::mini().resampler,
            tensors: match &arguments.weights {
                Some(path) => adapter_of(path)?,
                None => mini::adapter_tensors()?,
            },
        };
        // What judges computes in f32, whatever is judged was made in.
        let exact = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let held_out = held_out_path(arguments)?;
        let network = Weights::from_safetensors(&held_out, exact, &device)?.pp("held_out_identity");
        let network = mini_identity::MiniIdentity::load(&mini_identity::Config::held_out(), &network)
            .with_context(|| "not an identity network as pretrain_mini --stage held-out-identity writes it")?;
        let judge = Judge::load(&weights(exact, &device)?, network)?;
        Ok(Setting {
            base,
            adapter,
            judge,
            size: Size::of(arguments),
            hyperparameters: Hyperparameters::of(arguments),
            out: arguments.out(),
            data: arguments.data().0,
            fingerprint: fingerprint(arguments)?,
            first_seed: arguments.seeds().first().copied().unwrap_or(0),
        })
    }

    /// The guidance of sampling with or without a KV branch.
    pub fn guidance(&self, kv_branch: bool) -> Guidance {
        let scale = self.hyperparameters.guidance_scale;
        match kv_branch {
            // The official weights, 3, 2 and 2, of which the first two make the plain scale where there is no reference.
            true => Guidance::ThreeTerm { no_kv: 0.6 * scale, full: 0.4 * scale, kv: 0.4 * scale },
            false => Guidance::Plain { scale },
        }
    }

    /// How many pictures are drawn at once.
    pub fn chunk(&self) -> usize {
        if self.base.device.is_cpu() { 10 } else { 100 }
    }
}

/// The adapter's tensors of a file of all networks.
fn adapter_of(path: &Path) -> anyhow::Result<std::collections::HashMap<String, candle_core::Tensor>> {
    let file = lcm_lookahead::formats::TensorFile::open(path)?;
    let names: Vec<&str> = file.names().filter_map(|name| name.strip_prefix("adapter.")).collect();
    let tensor = |name: &str| -> anyhow::Result<_> {
        Ok((name.to_string(), file.load(&format!("adapter.{name}"), &Device::Cpu)?.to_dtype(DType::F32)?))
    };
    names.into_iter().map(tensor).collect()
}

/// The file of the identity network that judges.
fn held_out_path(arguments: &Arguments) -> anyhow::Result<PathBuf> {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/held_out_identity.safetensors");
    let path = arguments.held_out.clone().unwrap_or(shipped);
    if path.is_file() {
        return Ok(path);
    }
    anyhow::bail!(
        "{}: no such file. It is the identity network that judges, which no training has seen. The repository has it \
         under assets/ (the published package has no room for it): run this from a clone, or give a copy with \
         --held-out FILE. Or train one, in about 15 minutes: cargo run --release --example pretrain_mini -- --stage \
         held-out-identity --minutes 15, which writes out/pretrain/held_out_identity.safetensors",
        path.display()
    )
}

/// Size, hyperparameters and weights in one line.
pub fn fingerprint(arguments: &Arguments) -> anyhow::Result<String> {
    let checksum = |path: &Path| -> anyhow::Result<String> {
        let bytes = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        Ok(format!("{:08x}", crc32fast::hash(&bytes)))
    };
    let weights = arguments.weights.as_deref().map_or(Ok("of the crate".to_string()), checksum)?;
    let judge = checksum(&held_out_path(arguments)?)?;
    let (size, hyperparameters) = (Size::of(arguments), Hyperparameters::of(arguments));
    Ok(format!("{size:?}, {hyperparameters:?}, weights {weights}, judge {judge}"))
}

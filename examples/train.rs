//! Trains a face encoder with the LCM-Lookahead method.

mod support;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Parser;
use lcm_lookahead::data::{DatasetConfig, FaceDataset, GenerateConfig, Source, generate_dataset};
use lcm_lookahead::train::{Checkpoint, checkpoint};
use lcm_lookahead::{TrainConfig, Trainer};
use support::{Compute, Model};

const DEFAULT_DATA: &str = "out/data";

/// Trains a face encoder with the LCM-Lookahead method.
///
/// The encoder learns from pairs of pictures of the same person: a diffusion loss on one picture, and an identity loss
/// on a one-step preview of it. The base model stays frozen. Checkpoints, metrics and validation pictures go to the
/// output folder; a run that was stopped goes on with --resume, exactly as if it had not been stopped.
///
/// Options come before the configuration file, the file before the preset.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  cargo run --release --example train
  cargo run --release --example train -- --data out/data --steps 300 --out out/train
  cargo run --release --example train -- --data out/data --steps 600 --out out/train --resume")]
struct Arguments {
    /// Folder of the pictures: a folder for each person, or what generate_data writes. Without it a small data set of
    /// procedural portraits is made in out/data, once.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Folder for checkpoints, metrics and validation pictures.
    #[arg(long, value_name = "DIR", default_value = "out/train")]
    out: PathBuf,
    /// The networks to train for.
    #[arg(long, value_enum, default_value = "mini")]
    model: Model,
    #[command(flatten)]
    compute: Compute,
    /// Go on from the latest checkpoint in the output folder; begin where there is none.
    #[arg(long, conflicts_with = "resume_from")]
    resume: bool,
    /// Go on from this checkpoint folder.
    #[arg(long, value_name = "FOLDER")]
    resume_from: Option<PathBuf>,
    /// Begin anew although the output folder holds checkpoints: they are moved to a folder beside it.
    #[arg(long, conflicts_with_all = ["resume", "resume_from"])]
    force: bool,
    /// TOML file of hyperparameters. It need only say what differs from its preset, which it can name itself
    /// (preset = "official").
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Hyperparameters of what the file does not say: the paper's, those of the authors' code, or those for the
    /// miniature [default: mini; when going on, those of the checkpoint]
    #[arg(long, value_parser = TrainConfig::PRESETS)]
    preset: Option<String>,
    /// Length of the whole run in iterations, those before --resume included.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Samples per iteration.
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Seed of every random draw.
    #[arg(long)]
    seed: Option<u64>,
    /// Learning rate of the LoRA layers of the KV encoder.
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// Learning rate of the adapter.
    #[arg(long, value_name = "RATE")]
    adapter_lr: Option<f64>,
    /// Iterations between checkpoints; 0 writes one at the end only.
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// Iterations between validation pictures; 0 makes none.
    #[arg(long, value_name = "N")]
    validate_every: Option<u64>,
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let (base, adapter) = arguments.model.load(&arguments.compute)?;
    let from = match &arguments.resume_from {
        Some(folder) => Some(folder.clone()),
        None => prepare_output(&arguments)?,
    };
    let mut config = configuration(&arguments, from.as_deref())?;
    // A base works at one resolution; presets are written for SDXL's.
    config.data.resolution = base.resolution;

    let dataset = open_dataset(&arguments, &config)?;
    let found = dataset.report();
    println!("Data: {} pictures of {} people", found.images, found.identities);
    if found.single_image_identities > 0 {
        println!("  {} of them have one picture only, which is then paired with itself", found.single_image_identities);
    }
    let total = config.max_train_steps;
    let mut trainer = Trainer::new(base, &adapter, dataset, config, &arguments.out)?;
    if let Some(folder) = &from {
        trainer.resume_from(folder)?;
        println!("Going on from {}", folder.display());
    }
    let first = trainer.step();
    if first >= total {
        println!("The run has its {total} iterations already; give more with --steps to go on.");
    } else {
        println!("Training iterations {first} to {total}, batch {}", trainer.config().train_batch_size);
        let start = Instant::now();
        trainer.run()?;
        let seconds = start.elapsed().as_secs_f64();
        println!("{} iterations in {seconds:.0} s", trainer.step() - first);
    }
    print_results(&arguments.out)
}

/// Makes sure that nothing of an earlier run can be lost, and returns the checkpoint to go on from.
fn prepare_output(arguments: &Arguments) -> anyhow::Result<Option<PathBuf>> {
    let out = &arguments.out;
    let latest = checkpoint::latest(out)?;
    match (&latest, arguments.resume, arguments.force) {
        (None, true, _) => println!("No checkpoint in {} yet: beginning at iteration 0", out.display()),
        (Some(latest), false, false) => bail!(
            "{}: holds {} of an earlier run; go on from it with --resume, begin anew with --force (which keeps the \
             earlier run beside), or choose another folder with --out",
            out.display(),
            latest.file_name().unwrap_or_default().to_string_lossy()
        ),
        (Some(_), false, true) => {
            let aside = set_aside(out)?;
            println!("The earlier run is now in {}", aside.display());
            return Ok(None);
        }
        _ => {}
    }
    Ok(latest)
}

/// Renames a folder to the first free one of `<folder>.1`, `<folder>.2`, ...
fn set_aside(folder: &Path) -> anyhow::Result<PathBuf> {
    let name = |i: u32| PathBuf::from(format!("{}.{i}", folder.display().to_string().trim_end_matches('/')));
    let aside = (1..).map(name).find(|path| !path.exists()).context("no free name beside the output folder")?;
    std::fs::rename(folder, &aside)
        .with_context(|| format!("{}: cannot be moved to {}", folder.display(), aside.display()))?;
    Ok(aside)
}

/// Preset, or the checkpoint's configuration; then the file; then the options.
fn configuration(arguments: &Arguments, from: Option<&Path>) -> anyhow::Result<TrainConfig> {
    let preset = match (&arguments.preset, from) {
        (Some(name), _) => TrainConfig::preset(name),
        (None, Some(folder)) => Some(Checkpoint::load(folder)?.config),
        (None, None) => None,
    };
    let preset = preset.unwrap_or_else(TrainConfig::mini);
    let mut config = match &arguments.config {
        Some(file) => TrainConfig::from_toml_over(file, preset)?,
        None => preset,
    };
    fn set<T>(field: &mut T, value: Option<T>) {
        if let Some(value) = value {
            *field = value;
        }
    }
    set(&mut config.max_train_steps, arguments.steps);
    set(&mut config.seed, arguments.seed);
    set(&mut config.optimizer.learning_rate, arguments.learning_rate);
    set(&mut config.optimizer.adapter_lr, arguments.adapter_lr);
    set(&mut config.checkpointing.every_n_steps, arguments.checkpoint_every);
    set(&mut config.validation.every_n_steps, arguments.validate_every);
    if let Some(batch) = arguments.batch {
        config.train_batch_size = batch;
        config.lookahead.batch_size = config.lookahead.batch_size.min(batch);
    }
    config.validate()?;
    Ok(config)
}

fn open_dataset(arguments: &Arguments, config: &TrainConfig) -> anyhow::Result<FaceDataset> {
    let root = arguments.data.clone().unwrap_or_else(|| DEFAULT_DATA.into());
    if arguments.data.is_none() && !root.join("metadata.json").exists() {
        println!("Drawing a small data set in {}", root.display());
        let small = GenerateConfig { out: root.clone(), identities: 32, ..GenerateConfig::default() };
        generate_dataset(&small, |_, _| {})?;
    }
    // Whoever uses the encoder brings a photograph, so photographs condition it in training too.
    let instance_prompt = config.data.instance_prompt.clone();
    let source = Source { root, vanilla_only_for_encoder: true, instance_prompt, ..Source::default() };
    Ok(FaceDataset::open(&DatasetConfig {
        sources: vec![source],
        resolution: u32::try_from(config.data.resolution)?,
        center_crop: config.data.center_crop,
        ..DatasetConfig::default()
    })?)
}

fn print_results(out: &Path) -> anyhow::Result<()> {
    if let Some(latest) = checkpoint::latest(out)? {
        println!("Checkpoint:          {}", latest.display());
    }
    println!("Metrics:             {}", out.join("metrics.jsonl").display());
    let pictures = out.join("validation");
    if pictures.is_dir() {
        println!("Validation pictures: {}", pictures.display());
    }
    println!("Next: cargo run --release --example personalize -- --checkpoint {}", out.display());
    Ok(())
}

fn main() -> ExitCode {
    support::main(run)
}

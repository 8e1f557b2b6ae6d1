//! The command line.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, ValueEnum};

use crate::plan::{Plan, Row};
use crate::support::Compute;
use crate::{ablation, alignment, annealing, branches, guidance, keeping, updates};

/// Repeats the paper's experiments on the miniature, with the weights that are part of the crate.
///
/// An experiment is a table of rows; each row is measured once for each seed. Every finished measurement is kept as a
/// small file in the output folder, so a run that was stopped goes on where it was, several programs can share the work
/// (--part), and the last call only prints the table. Contact sheets lie beside it.
#[derive(Parser)]
// A program that is started for a part of the work gets the arguments of the whole, and after them its own.
#[command(args_override_self = true)]
#[command(after_help = "\
Examples:
  cargo run --release --example experiments -- --table 2 --quick
  cargo run --release --example experiments -- --figure 2
  cargo run --release --features cuda --example experiments -- --table 2 --full --device cuda --jobs 4")]
pub struct Arguments {
    /// Which experiment, or which ones, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', required_unless_present_any = ["table", "figure"])]
    experiment: Vec<Experiment>,
    /// The experiment that repeats this table of the paper: 2, the ablation.
    #[arg(long, value_parser = ["2"], conflicts_with_all = ["experiment", "figure"])]
    table: Option<String>,
    /// The experiment that repeats this figure of the paper: 2, the alignment of previews; 5, guidance through them.
    #[arg(long, value_parser = ["2", "5"], conflicts_with = "experiment")]
    figure: Option<String>,
    /// A small version, for two CPU cores and a quarter of an hour; the default.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// The published version, for a GPU.
    #[arg(long)]
    pub full: bool,
    #[command(flatten)]
    pub compute: Compute,
    /// Seeds, separated by commas [default: 0, with --full 0,1,2]
    #[arg(long, value_delimiter = ',', value_name = "SEED,..")]
    seeds: Vec<u64>,
    /// Only these rows, by their short names, separated by commas.
    #[arg(long, alias = "rows", value_delimiter = ',', value_name = "ROW,..")]
    only: Vec<String>,
    /// Only every N-th measurement, from the I-th on: for N programs that share the work.
    #[arg(long, value_name = "I/N", default_value = "1/1")]
    pub part: Part,
    /// Programs that share this one's part of the work, side by side: a small model leaves most of a GPU idle.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub jobs: usize,
    /// Only draw the pictures that encoders are trained on.
    #[arg(long)]
    pub prepare: bool,
    /// Measure nothing, print what is there.
    #[arg(long, conflicts_with = "prepare")]
    pub collect: bool,
    /// Measure, print no table.
    #[arg(long, conflicts_with = "collect")]
    pub no_table: bool,
    /// Folder of everything that is written [default: out/experiments/quick or out/experiments/full]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The miniature's weights, as pretrain_mini bundles them [default: those of the crate]
    #[arg(long, value_name = "FILE")]
    pub weights: Option<PathBuf>,
    /// The identity network that judges, as pretrain_mini --stage held-out-identity writes it [default:
    /// assets/held_out_identity.safetensors of the repository]
    #[arg(long, value_name = "FILE")]
    pub held_out: Option<PathBuf>,
    /// Pictures to train on, as generate_data --leave-out-evaluation writes them [default: drawn in the output folder]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Measure on the people for choices (hyperparameters) instead of those for results.
    #[arg(long)]
    pub validation: bool,
    #[command(flatten)]
    pub hyperparameters: HyperparameterArguments,
    #[command(flatten)]
    pub size: SizeArguments,
}

/// What can be chosen on the validation people; the defaults with --full were.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Hyperparameters")]
pub struct HyperparameterArguments {
    /// Learning rate of the adapter.
    #[arg(long, value_name = "RATE", default_value_t = 3e-4)]
    pub adapter_lr: f64,
    /// Learning rate of the KV branch's LoRA [default: 1e-3, with --full 1e-2]
    #[arg(long, value_name = "RATE")]
    pub learning_rate: Option<f64>,
    /// Weight of the identity loss beside the diffusion loss [default: 0.1, with --full 0.03]
    #[arg(long, value_name = "WEIGHT")]
    pub identity_weight: Option<f64>,
    /// Guidance scale of all sampling. With a KV branch it is divided among the three terms as the official one is.
    #[arg(long, value_name = "SCALE", default_value_t = 3.0)]
    pub guidance_scale: f64,
    /// Guidance scale of the model that teaches in score distillation and the consistency loss (1: none).
    #[arg(long, value_name = "SCALE", default_value_t = 3.0)]
    pub teacher_guidance: f64,
}

/// How much is done.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Size")]
pub struct SizeArguments {
    /// Training iterations of a row [default: 60, with --full 600]
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Samples of a training iteration [default: 4, with --full 16]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// People to train on, eight pictures each [default: 64, with --full 2000]
    #[arg(long, value_name = "N")]
    pub training_people: Option<usize>,
    /// People to draw for the evaluation, each in every prompt [default: 6, with --full 40]
    #[arg(long, value_name = "N")]
    pub people: Option<usize>,
    /// Denoising steps of a picture of the evaluation [default: 12, with --full 20]
    #[arg(long, value_name = "N")]
    pub sampling_steps: Option<usize>,
    /// Pictures whose previews are looked at [default: 8, with --full 64]
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Experiment {
    /// How near one-step previews are to the final picture (figure 2).
    Alignment,
    /// What each part of the method gains (table 2).
    Ablation,
    /// What keeps previews near the model's own pictures (section 4.2).
    Keeping,
    /// How strongly timesteps favour noise (section 4.2).
    Annealing,
    /// One update of both losses, or one of each.
    Updates,
    /// What image tokens and reference contribute to the pictures of one encoder.
    Branches,
    /// Guidance through the preview, and through x0 (figure 5).
    Guidance,
}

impl Arguments {
    /// The experiments that are asked for.
    pub fn plans(&self) -> Vec<Plan> {
        let plan = |experiment: &Experiment| match experiment {
            Experiment::Alignment => alignment::PLAN,
            Experiment::Ablation => ablation::PLAN,
            Experiment::Keeping => keeping::PLAN,
            Experiment::Annealing => annealing::PLAN,
            Experiment::Updates => updates::PLAN,
            Experiment::Branches => branches::PLAN,
            Experiment::Guidance => guidance::PLAN,
        };
        match (self.table.as_deref(), self.figure.as_deref()) {
            (Some(_), _) => vec![ablation::PLAN],
            (_, Some("5")) => vec![guidance::PLAN],
            (_, Some(_)) => vec![alignment::PLAN],
            (None, None) => self.experiment.iter().map(plan).collect(),
        }
    }

    /// The rows of experiments that are asked for; those that several experiments have only once.
    pub fn rows(&self, plans: &[Plan]) -> anyhow::Result<Vec<Row>> {
        let mut rows: Vec<Row> = Vec::new();
        for row in plans.iter().flat_map(|plan| plan.rows) {
            if !rows.iter().any(|known| known.name == row.name) {
                rows.push(*row);
            }
        }
        let names = || rows.iter().map(|row| row.name).collect::<Vec<_>>().join(", ");
        if let Some(unknown) = self.only.iter().find(|name| !rows.iter().any(|row| row.name == **name)) {
            anyhow::bail!("--only {unknown}: the rows are {}", names());
        }
        rows.retain(|row| self.only.is_empty() || self.only.iter().any(|name| name == row.name));
        Ok(rows)
    }

    pub fn seeds(&self) -> Vec<u64> {
        match (self.seeds.is_empty(), self.full) {
            (false, _) => self.seeds.clone(),
            (true, true) => vec![0, 1, 2],
            (true, false) => vec![0],
        }
    }

    /// The folder of everything that is written.
    pub fn out(&self) -> PathBuf {
        let default = if self.full { "out/experiments/full" } else { "out/experiments/quick" };
        self.out.clone().unwrap_or_else(|| default.into())
    }

    /// The folder of the pictures to train on, and whether they are the user's.
    pub fn data(&self) -> (PathBuf, bool) {
        match &self.data {
            Some(folder) => (folder.clone(), true),
            None => (self.out().join("data"), false),
        }
    }
}

/// A share of the work.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    index: usize,
    count: usize,
}

impl Part {
    /// The share of one of several programs of this share.
    pub fn share(self, program: usize, programs: usize) -> Self {
        Part { index: self.index + program * self.count, count: self.count * programs }
    }

    /// Those of this many places that belong to the share.
    pub fn of(self, places: Range<usize>) -> impl Iterator<Item = usize> {
        places.skip(self.index).step_by(self.count)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index + 1, self.count)
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((index, count)) if (1..=count).contains(&index) => Ok(Part { index: index - 1, count }),
            _ => Err(format!("`{text}` is not I/N with I from 1 to N")),
        }
    }
}

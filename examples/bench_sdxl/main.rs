//! Measures SDXL at full size, with random weights, on one GPU.

mod attention;
mod compare;
mod frozen;
mod measure;
mod networks;
mod opening;
mod phases;
mod sampling;
mod training;
mod unet;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use frozen::Network;
use lcm_lookahead::cuda;
use measure::Report;
use sampling::References;

#[path = "../support/mod.rs"]
mod support;

/// Measures SDXL at full size, with random weights, on one GPU: attention, U-Net passes, training iterations, sampling.
///
/// Prints one line a measurement: the median time, what share of the measured matrix-product ceiling that is, and the
/// peak of device memory.
#[derive(Parser)]
struct Arguments {
    /// What to measure; all where none is given
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Compare the U-Net with what reference.py wrote to this folder, and measure nothing else
    #[arg(long, value_name = "FOLDER")]
    compare: Option<PathBuf>,
    /// Write networks to this folder (a RAM disk is best), measure how long opening the U-Net takes and drawing with
    /// encoders that are opened on demand, and nothing else
    #[arg(long, value_name = "FOLDER")]
    open: Option<PathBuf>,
    /// Run one pass at this batch size between cudaProfilerStart and -Stop, and nothing else: of the U-Net, or of the
    /// part that is named
    #[arg(long, value_name = "BATCH")]
    profile: Option<usize>,
    /// Batch sizes of the training iterations
    #[arg(long, value_delimiter = ',', default_value = "1,4,8")]
    batch: Vec<usize>,
    /// Keep the outputs of attention in training iterations instead of computing them again
    #[arg(long)]
    keep_attention: bool,
    /// How many steps' references one pass of the KV encoder computes when pictures are drawn
    #[arg(long, value_name = "STEPS", value_delimiter = ',', default_value = "2")]
    reference_steps: Vec<usize>,
    /// How many neighbouring steps of a picture share the reference's keys and values
    #[arg(long, value_name = "STEPS", value_delimiter = ',', default_value = "1")]
    reference_interval: Vec<usize>,
    /// Which GPU
    #[arg(long, default_value_t = 0)]
    gpu: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Attention,
    Unet,
    Training,
    Sampling,
    /// The parts of a training iteration
    Phases,
    /// The networks around the U-Net
    Frozen,
    /// With --profile: the VAE encoder
    Encoder,
    /// With --profile: the preview decoder, forward and backward
    Preview,
    /// With --profile: the identity loss, forward and backward
    Identity,
}

fn main() -> ExitCode {
    support::main(run)
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let device = cuda::open(arguments.gpu)?;
    if let Some(folder) = &arguments.compare {
        return compare::compare(folder, &device);
    }
    let mut report = Report::new(&device)?;
    let references = References { steps: arguments.reference_steps, intervals: arguments.reference_interval };
    if let Some(folder) = &arguments.open {
        opening::measure(&report, folder)?;
        return sampling::measure_lean(&report, folder, &references);
    }
    if let Some(batch) = arguments.profile {
        return Ok(match arguments.parts.first() {
            Some(Part::Encoder) => frozen::profile(&report, Network::Encoder, batch),
            Some(Part::Preview) => frozen::profile(&report, Network::Preview, batch),
            Some(Part::Identity) => frozen::profile(&report, Network::Identity, batch),
            _ => unet::profile(&report, batch),
        }?);
    }
    let wanted = |part| arguments.parts.is_empty() || arguments.parts.contains(&part);
    if wanted(Part::Attention) {
        attention::measure(&mut report)?;
    }
    if wanted(Part::Unet) {
        unet::measure(&mut report)?;
    }
    if wanted(Part::Training) {
        training::measure(&mut report, &arguments.batch, arguments.keep_attention)?;
    }
    if arguments.parts.contains(&Part::Phases) {
        phases::measure(&mut report, &arguments.batch)?;
    }
    if arguments.parts.contains(&Part::Frozen) {
        frozen::measure(&report, &arguments.batch)?;
    }
    if wanted(Part::Sampling) {
        sampling::measure(&report, &references)?;
    }
    Ok(())
}

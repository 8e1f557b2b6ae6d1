//! What the example programs share: how they start and end, and how a model is chosen.
#![allow(dead_code, reason = "not every example chooses a model")]

mod compute;

use std::process::ExitCode;

use anyhow::bail;
use candle_core::DType;
use clap::{Parser, ValueEnum};
pub use compute::Compute;
use lcm_lookahead::Base;
use lcm_lookahead::mini;
use lcm_lookahead::train::AdapterInit;

/// Reads the arguments and runs the program. Warnings go to stderr; an error becomes one sentence there and exit code 1.
pub fn main<A: Parser>(run: impl FnOnce(A) -> anyhow::Result<()>) -> ExitCode {
    let arguments = A::parse();
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", sentence(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes, without those that the text before them says already.
fn sentence(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        said if said.contains(&cause) => text,
        _ => format!("{text}: {cause}"),
    })
}

/// The networks to stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Model {
    /// The miniature that is part of the crate: 128 pixels, procedural portraits
    Mini,
    /// SDXL: not in this release, which lacks the loader for its published files
    Sdxl,
}

impl Model {
    /// The frozen networks, and the pretrained IP-Adapter that belongs to them.
    pub fn load(self, compute: &Compute) -> anyhow::Result<(Base, AdapterInit)> {
        match self {
            Model::Mini => {
                let base = mini::base(compute.dtype(DType::F32)?, &compute.open()?)?;
                let resampler = mini::face_encoder_config().resampler;
                Ok((base, AdapterInit { resampler, tensors: mini::adapter_tensors()? }))
            }
            Model::Sdxl => bail!(
                "--model sdxl: this release has SDXL's networks as code (U-Net, text and image encoders, adapter, tiny \
                 autoencoder) but not yet its large autoencoder, its face networks and the loader for the published \
                 weights, which come in a later release; use --model mini"
            ),
        }
    }
}

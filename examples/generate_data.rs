//! Writes a data set of procedural portraits that `train` can learn from.

mod support;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use lcm_lookahead::data::{GenerateConfig, generate_dataset};
use lcm_lookahead::mini::portrait::HELD_OUT_COMBINATIONS;

/// Writes a data set of procedural portraits: the same people in many styles and scenes.
///
/// Every person gets a folder with photos (vanilla/) and other techniques (stylized/). The prompt of a picture is in
/// its file name, and metadata.json says who is in which picture. Equal arguments write equal files.
#[derive(Parser)]
#[command(after_help = "Example:\n  cargo run --release --example generate_data -- --out out/data --identities 64")]
struct Arguments {
    /// Folder to write to; it is created if needed.
    #[arg(long, default_value = "out/data")]
    out: PathBuf,
    /// How many people to draw.
    #[arg(long, default_value_t = 8)]
    identities: usize,
    /// How many pictures of each: the first half photos, the others stylized.
    #[arg(long, default_value_t = 8)]
    images_per_identity: usize,
    /// Side of the square pictures in pixels (16 to 4096).
    #[arg(long, default_value_t = 128)]
    size: u32,
    /// Seed; data sets of different seeds show different people.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Leave out the combinations of style and scene that the example `experiments` draws.
    #[arg(long)]
    leave_out_evaluation: bool,
    /// Write even if the folder holds something else already.
    #[arg(long)]
    force: bool,
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let config = GenerateConfig {
        out: arguments.out,
        identities: arguments.identities,
        images_per_identity: arguments.images_per_identity,
        size: arguments.size,
        seed: arguments.seed,
        leave_out: if arguments.leave_out_evaluation { HELD_OUT_COMBINATIONS.to_vec() } else { Vec::new() },
        force: arguments.force,
    };
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} pictures, {eta} left")
            .unwrap_or(ProgressStyle::default_bar()),
    );
    let summary = generate_dataset(&config, |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let summary = summary?;
    let out = config.out.display();
    println!("Wrote {} pictures of {} people to {out}", summary.images, summary.identities);
    println!("Next: cargo run --release --example train -- --data {out}");
    Ok(())
}

fn main() -> ExitCode {
    support::main(run)
}

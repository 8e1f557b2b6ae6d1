//! Trains the miniature's networks from nothing, stage by stage.

mod support;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use clap::{Parser, ValueEnum};
use lcm_lookahead::Result;
use lcm_lookahead::autograd::with_large_stack;
use lcm_lookahead::mini::pretrain::{self, Options};
use support::Compute;

#[derive(Clone, Copy, ValueEnum)]
enum Stage {
    /// Draws portraits into the file of --pool-file, for the other stages.
    Draw,
    /// Random weights for every stage without a file.
    Init,
    Autoencoder,
    /// The autoencoder's decoder, further, with latents as they are. Needs the autoencoder; optional.
    Decoder,
    Clip,
    Identity,
    /// An identity network that is not part of the miniature, for evaluation.
    HeldOutIdentity,
    FaceLocator,
    /// Needs autoencoder and clip.
    Denoiser,
    /// Needs the denoiser.
    Lcm,
    /// Needs the denoiser.
    Adapter,
    /// One file of all stages, bundle/mini.safetensors, and one of the network that is no part of it.
    Bundle,
}

/// Trains the miniature's networks from nothing but procedural portraits.
///
/// Each stage saves <stage>.safetensors in the folder regularly and at its end, and goes on from it when started again.
#[derive(Parser)]
#[command(after_help = "Example:\n  cargo run --release --example pretrain_mini -- --stage autoencoder --minutes 10")]
struct Arguments {
    /// What to train.
    #[arg(long)]
    stage: Stage,
    /// Time budget of the stage, from the start of the program, in minutes.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// The same in seconds.
    #[arg(long, conflicts_with = "minutes")]
    seconds: Option<f64>,
    /// Stop after so many updates even if time is left.
    #[arg(long)]
    steps: Option<u64>,
    #[command(flatten)]
    compute: Compute,
    /// Worker threads; all cores unless given. On a GPU they draw portraits only.
    #[arg(long)]
    threads: Option<usize>,
    /// Folder of the stages' files.
    #[arg(long, default_value = "out/pretrain")]
    out: PathBuf,
    /// Samples per update; each stage has a default.
    #[arg(long)]
    batch: Option<usize>,
    /// Peak learning rate; each stage has a default.
    #[arg(long)]
    lr: Option<f64>,
    /// Portraits to draw, or to take of a file of them, at most.
    #[arg(long, default_value_t = 8000)]
    pool: usize,
    /// A file of drawn portraits, which --stage draw makes.
    #[arg(long)]
    pool_file: Option<PathBuf>,
    /// Seed of all draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Start again even if the stage has a file.
    #[arg(long)]
    fresh: bool,
    /// Where in the learning rate's schedule this run begins, 0 to 1: for a stage trained in several runs.
    #[arg(long, default_value_t = 0.0)]
    from: f64,
    /// Where in the learning rate's schedule this run ends, 0 to 1.
    #[arg(long, default_value_t = 1.0)]
    to: f64,
}

fn run(arguments: Arguments, device: Device, dtype: DType) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, |count| count.get());
    let options = Options {
        out: arguments.out,
        start: Instant::now(),
        budget: Duration::from_secs_f64(arguments.seconds.unwrap_or(60.0 * arguments.minutes).max(0.0)),
        steps: arguments.steps,
        threads: arguments.threads.unwrap_or(cores),
        device,
        dtype,
        batch: arguments.batch,
        learning_rate: arguments.lr,
        pool: arguments.pool.max(8),
        pool_file: arguments.pool_file,
        seed: arguments.seed,
        fresh: arguments.fresh,
        schedule: (arguments.from, arguments.to),
    };
    // What runs outside the workers is spread over as many threads.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build_global();
    match arguments.stage {
        Stage::Draw => {
            let file = options.pool_file.clone().unwrap_or_else(|| options.out.join("pool.safetensors"));
            pretrain::Pool::draw(&options, 0).and_then(|pool| pool.save(&file))
        }
        Stage::Init => pretrain::init(&options.out, options.seed),
        Stage::Autoencoder => pretrain::autoencoder(&options),
        Stage::Decoder => pretrain::decoder(&options),
        Stage::Clip => pretrain::clip(&options),
        Stage::Identity => pretrain::identity(&options),
        Stage::HeldOutIdentity => pretrain::held_out_identity(&options),
        Stage::FaceLocator => pretrain::face_locator(&options),
        Stage::Denoiser => pretrain::denoiser(&options),
        Stage::Lcm => pretrain::lcm(&options),
        Stage::Adapter => pretrain::adapter(&options),
        Stage::Bundle => pretrain::bundle(&options.out, &options.out.join("bundle")),
    }
}

fn main() -> ExitCode {
    // candle splits large elementwise operations over threads of its own, one operation at a time: workers would wait
    // for each other.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    support::main(|arguments: Arguments| {
        let (device, dtype) = (arguments.compute.open()?, arguments.compute.dtype(DType::F32)?);
        Ok(with_large_stack(|| run(arguments, device, dtype))?)
    })
}

//! Lists the published weights that this crate uses, and gets them.

mod support;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use lcm_lookahead::hub::{Hub, REPOSITORIES, repository};

/// Lists the published weights that this crate uses, with sizes and licences; or gets some of them into the cache that
/// Python's huggingface_hub uses too, and prints where they are.
///
/// HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN mean what they mean there.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  cargo run --release --example weights
  cargo run --release --example weights -- latent-consistency/lcm-lora-sdxl
  cargo run --release --example weights -- madebyollin/taesdxl config.json")]
struct Arguments {
    /// Repository to get files of, as owner/name.
    repository: Option<String>,
    /// The files [default: all that the crate uses of this repository]
    files: Vec<String>,
    /// Folder to look into first, with files as <owner>/<name>/<file> or <name>/<file>.
    #[arg(long, value_name = "DIR")]
    weights: Option<PathBuf>,
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Some(id) = &arguments.repository else {
        for repository in REPOSITORIES {
            println!("{} ({}): {}", repository.id, repository.licence, repository.purpose);
            for file in repository.files {
                println!("  {:>9}  {}", size(file.bytes), file.path);
            }
        }
        return Ok(());
    };
    let hub = Hub::from_env()?.with_weights_folder(arguments.weights);
    let mut files = arguments.files;
    if let Some(known) = repository(id).filter(|_| files.is_empty()) {
        println!("{id}: licence {}, {} files", known.licence, known.files.len());
        files.extend(known.files.iter().map(|file| file.path.to_string()));
    }
    anyhow::ensure!(!files.is_empty(), "{id}: not a repository that the crate uses; name the files to get");
    for file in files {
        println!("{}", hub.file(id, &file)?.display());
    }
    Ok(())
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

fn main() -> ExitCode {
    support::main(run)
}

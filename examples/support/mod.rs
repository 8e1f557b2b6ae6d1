//! What the example programs share: how they start and end, and how a model is chosen.
#![allow(dead_code, reason = "not every example chooses a model")]

mod compute;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use candle_core::{DType, Device};
use clap::{Parser, ValueEnum};
pub use compute::Compute;
use lcm_lookahead::Base;
use lcm_lookahead::formats::EncoderFile;
use lcm_lookahead::hub::Hub;
use lcm_lookahead::mini;
use lcm_lookahead::sdxl::{SdxlChoice, SdxlFiles};
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
    /// SDXL from its published files, which are downloaded (11 GB) where they are not on this machine
    Sdxl,
}

/// Which networks, in which type, from which files, and where. Those of the files mean SDXL's.
#[derive(clap::Args, Clone, Debug)]
pub struct ModelArguments {
    /// The networks to stand on.
    #[arg(long, value_enum, default_value = "mini")]
    pub model: Model,
    #[command(flatten)]
    pub compute: Compute,
    /// Folder of weights to look into before the cache and the hub: DIR/<owner>/<name>/<file> or DIR/<name>/<file>.
    #[arg(long, value_name = "DIR", help_heading = SDXL)]
    pub weights: Option<PathBuf>,
    /// A pipeline of one's own, as diffusers saves it: U-Net, scheduler, text encoders and tokenizers.
    #[arg(long, value_name = "DIR", help_heading = SDXL)]
    pub pipeline: Option<PathBuf>,
    /// A fine-tuned U-Net alone: folder with config.json and weights, or sdxl-turbo, which is downloaded (5 GB) where it
    /// is not on this machine.
    #[arg(long, value_name = "DIR|sdxl-turbo", help_heading = SDXL)]
    pub unet: Option<PathBuf>,
    /// Identity network: IR-SE50 (.pth), InsightFace's iresnet (.pth), CurricularFace (.pth), SFace (.onnx); any of them
    /// as safetensors [default: SFace from the hub]
    #[arg(long, value_name = "FILE", help_heading = SDXL)]
    pub identity_network: Option<PathBuf>,
    /// The adapter to start from: IP-Adapter Plus (.bin, .safetensors), a face encoder of this crate, or the checkpoint
    /// that the paper's authors released [default: IP-Adapter Plus Face from the hub]
    #[arg(long, value_name = "FILE", help_heading = SDXL)]
    pub adapter: Option<PathBuf>,
    /// Height and width of the pictures [default: those the U-Net was made for, 1024]
    #[arg(long, value_name = "PIXELS", help_heading = SDXL)]
    pub resolution: Option<usize>,
}

const SDXL: &str = "Files of SDXL";

/// [`Base::sdxl`] or [`Base::sdxl_lean`].
type Assemble = fn(&SdxlFiles, DType, &Device) -> lcm_lookahead::Result<Base>;

impl ModelArguments {
    /// The frozen networks, and the pretrained adapter that belongs to them.
    pub fn load(&self) -> anyhow::Result<(Base, AdapterInit)> {
        self.load_for(Base::sdxl)
    }

    /// The same with encoders that are opened when they are used: for drawing, where memory is short.
    pub fn load_lean(&self) -> anyhow::Result<(Base, AdapterInit)> {
        if self.model != Model::Sdxl {
            bail!("--lean is for --model sdxl");
        }
        self.load_for(Base::sdxl_lean)
    }

    fn load_for(&self, assemble: Assemble) -> anyhow::Result<(Base, AdapterInit)> {
        let device = self.compute.open()?;
        let dtype = self.compute.dtype(if self.model == Model::Sdxl { DType::BF16 } else { DType::F32 })?;
        if self.model == Model::Sdxl {
            return self.load_sdxl(dtype, &device, assemble);
        }
        let given = [
            ("--weights", self.weights.is_some()),
            ("--pipeline", self.pipeline.is_some()),
            ("--unet", self.unet.is_some()),
            ("--identity-network", self.identity_network.is_some()),
            ("--adapter", self.adapter.is_some()),
            ("--resolution", self.resolution.is_some()),
        ];
        if let Some((option, _)) = given.iter().find(|(_, given)| *given) {
            bail!("{option} is for --model sdxl");
        }
        if device.is_cpu() && ![DType::F32, DType::F64].contains(&dtype) {
            bail!("--dtype: the CPU computes in f32 and f64");
        }
        let base = mini::base(dtype, &device)?;
        let resampler = mini::face_encoder_config().resampler;
        Ok((base, AdapterInit { resampler, tensors: mini::adapter_tensors()? }))
    }

    /// A face encoder for this base, in any form. The paper's authors' checkpoint is compared with SDXL's own U-Net, where
    /// that is what it is used with.
    pub fn encoder(&self, path: &Path, base: &Base) -> anyhow::Result<EncoderFile> {
        Ok(match self.model {
            Model::Sdxl => self.files()?.encoder(path, base.unet.config())?,
            Model::Mini => EncoderFile::open(path, base.unet.config(), None)?,
        })
    }

    fn load_sdxl(&self, dtype: DType, device: &Device, assemble: Assemble) -> anyhow::Result<(Base, AdapterInit)> {
        let files = self.files()?;
        let base = assemble(&files, dtype, device)?;
        let adapter = files.adapter(base.unet.config())?;
        Ok((base, adapter))
    }

    fn files(&self) -> anyhow::Result<SdxlFiles> {
        let choice = SdxlChoice {
            pipeline: self.pipeline.clone(),
            unet: self.unet.clone(),
            adapter: self.adapter.clone(),
            identity_network: self.identity_network.clone(),
            resolution: self.resolution,
            ..SdxlChoice::default()
        };
        if let Some(folder) = self.weights.as_ref().filter(|folder| !folder.is_dir()) {
            bail!("--weights {}: no such folder", folder.display());
        }
        let hub = Hub::from_env()?.with_weights_folder(self.weights.clone());
        Ok(SdxlFiles::find(&hub, &choice)?)
    }
}

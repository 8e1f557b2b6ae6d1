//! Turns files of weights from one form into another.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use candle_core::{Device, Tensor};
use clap::{Parser, ValueEnum};
use lcm_lookahead::formats::diffusers::{Folder, unet_config};
use lcm_lookahead::formats::lora::{Layout, LoraFile};
use lcm_lookahead::formats::pytorch::{self, Node};
use lcm_lookahead::formats::{
    Content, EncoderFile, StoredDtype, TensorFile, TensorInfo, ip_adapter, official, write_safetensors,
};
use lcm_lookahead::mini::MiniConfig;
use lcm_lookahead::models::unet;

/// The form to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    /// A face encoder as a folder: ip_adapter.safetensors, and its LoRA sets in peft's layout
    Encoder,
    /// A face encoder's adapter branch in IP-Adapter's layout, .safetensors or .bin
    IpAdapter,
    /// A face encoder as the paper's authors released theirs (.bin; needs --unet and --image-encoder)
    Official,
    /// A LoRA as a folder that peft loads
    Peft,
    /// A LoRA as a file that diffusers loads
    Diffusers,
    /// A LoRA as diffusers wrote it before peft (lora.down, lora.up)
    DiffusersOld,
    /// A LoRA as kohya's scripts write it, blocks named as diffusers names them
    Kohya,
    /// ... blocks named as Stability's code names them
    KohyaStability,
    /// The tensors as they are: .safetensors, or .bin, .pt, .pth
    Tensors,
}

impl Form {
    fn lora(self) -> Option<Layout> {
        Some(match self {
            Form::Peft => Layout::Peft,
            Form::Diffusers => Layout::Diffusers,
            Form::DiffusersOld => Layout::DiffusersOld,
            Form::Kohya => Layout::Kohya,
            Form::KohyaStability => Layout::KohyaStability,
            _ => return None,
        })
    }
}

/// The shape of the U-Net that adapters and LoRA belong to.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shape {
    /// SDXL's
    Sdxl,
    /// The miniature's
    Mini,
}

/// Turns files of weights from one form into another. What the input is, it finds out itself: safetensors (also sharded),
/// PyTorch files, ONNX; LoRA of peft, diffusers and kohya; IP-Adapter Plus; the authors' released checkpoint; checkpoints
/// of the train example.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  convert lora.safetensors out/lora --to peft
  convert ip-adapter-plus-face_sdxl_vit-h.bin out/adapter.safetensors --to ip-adapter
  convert encoder_plus_adapter_ckpt.bin out/encoder --to encoder --unet sdxl/unet
  convert out/train out/official.bin --to official --unet sdxl/unet --image-encoder IP-Adapter/models/image_encoder
  convert model.pth model.safetensors --to tensors")]
struct Arguments {
    /// The file or folder to read.
    input: PathBuf,
    /// The file or folder to write.
    output: PathBuf,
    /// The form to write.
    #[arg(long, value_enum)]
    to: Form,
    /// The base's U-Net, a diffusers folder (or one with `unet/` in it): its shape, and the weights that released
    /// checkpoints are compared with and exports are filled with [default: the shape alone, of --shape].
    #[arg(long, value_name = "FOLDER")]
    unet: Option<PathBuf>,
    /// The shape of the U-Net where none is given.
    #[arg(long, value_enum, default_value = "sdxl")]
    shape: Shape,
    /// Which weights of the U-Net's folder to take, for instance fp16.
    #[arg(long)]
    variant: Option<String>,
    /// The image encoder's folder, for exports in the official layout.
    #[arg(long, value_name = "FOLDER")]
    image_encoder: Option<PathBuf>,
    /// Replace what is there.
    #[arg(long)]
    force: bool,
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { input, output, to, .. } = &arguments;
    if output.exists() && !arguments.force {
        bail!("{}: exists already; --force replaces it", output.display());
    }
    let base = base_folder(&arguments)?;
    let config = match (&base, arguments.shape) {
        (Some(folder), _) => unet_config(&folder.config()?)?,
        (None, Shape::Sdxl) => unet::Config::sdxl(),
        (None, Shape::Mini) => MiniConfig::mini().unet,
    };
    let base = base.map(|folder| folder.tensors()).transpose()?;
    let written = match (to, to.lora()) {
        (_, Some(layout)) => {
            let lora = LoraFile::open(input, &config)?;
            if lora.text_encoder_layers > 0 {
                eprintln!("warning: {} layers for text encoders are left out", lora.text_encoder_layers);
            }
            vec![lora.save(output, layout, &config)?]
        }
        (Form::Tensors, _) => {
            write_tensors(&TensorFile::open(input)?, output)?;
            vec![output.clone()]
        }
        (form, _) => {
            let encoder = read_encoder(input, &config, base.as_ref())?;
            write_encoder(*form, &encoder, output, &config, base.as_ref(), arguments.image_encoder.as_deref())?
        }
    };
    for path in written {
        let file = TensorFile::open(&path)?;
        println!("{}: {} tensors", path.display(), file.len());
    }
    Ok(())
}

fn base_folder(arguments: &Arguments) -> anyhow::Result<Option<Folder>> {
    let Some(path) = &arguments.unet else { return Ok(None) };
    let folder = Folder::open(path, arguments.variant.as_deref())?;
    Ok(Some(if path.join("unet").is_dir() { folder.component("unet")? } else { folder }))
}

fn read_encoder(input: &Path, config: &unet::Config, base: Option<&TensorFile>) -> anyhow::Result<EncoderFile> {
    if input.is_file() {
        let content = Content::of(&TensorFile::open(input)?);
        if !matches!(content, Content::Encoder | Content::Official) {
            bail!("{}: holds no face encoder and no IP-Adapter (it looks like {content:?})", input.display());
        }
        if content == Content::Official && base.is_none() {
            eprintln!("note: base weights in the checkpoint are dropped unseen; --unet compares them with the base");
        }
    }
    Ok(EncoderFile::open(input, config, base)?)
}

fn write_encoder(
    form: Form,
    encoder: &EncoderFile,
    output: &Path,
    config: &unet::Config,
    base: Option<&TensorFile>,
    image_encoder: Option<&Path>,
) -> anyhow::Result<Vec<PathBuf>> {
    match form {
        Form::Encoder => return Ok(encoder.save(output, config)?),
        Form::IpAdapter => {
            if encoder.config.kv_encoder.is_some() {
                eprintln!("note: IP-Adapter's layout has no place for the KV branch, which is left out");
            }
            ip_adapter::write(output, &encoder.tensors)?;
        }
        _ => {
            let base = base.context("--to official needs the base's weights: --unet FOLDER")?;
            let image_encoder = image_encoder.context("--to official needs --image-encoder FOLDER")?;
            let image_encoder = Folder::open(image_encoder, None)?.tensors()?;
            let sources = official::Sources {
                config: &encoder.config,
                tensors: &encoder.tensors,
                unet: config,
                base,
                image_encoder: &image_encoder,
            };
            official::write(output, &sources)?;
        }
    }
    Ok(vec![output.to_path_buf()])
}

/// Writes tensors as they are, one in memory at a time where the output is PyTorch's.
fn write_tensors(file: &TensorFile, output: &Path) -> anyhow::Result<()> {
    if !output.extension().is_some_and(|extension| ["bin", "pt", "pth"].iter().any(|known| extension == *known)) {
        let tensors = file.names().map(|name| Ok((name.to_string(), file.load(name, &Device::Cpu)?)));
        let tensors: BTreeMap<String, Tensor> = tensors.collect::<lcm_lookahead::Result<_>>()?;
        return Ok(write_safetensors(output, &tensors, file.metadata())?);
    }
    let entries = file.infos().map(|(name, info)| {
        // What candle has no type for is loaded as the next larger one.
        let dtype = info.dtype.candle().and_then(StoredDtype::of).unwrap_or(StoredDtype::I64);
        (name.to_string(), Node::Tensor(TensorInfo { shape: info.shape.clone(), dtype }, name.to_string()))
    });
    Ok(pytorch::write(output, &Node::Dict(entries.collect()), |name| file.load(name, &Device::Cpu))?)
}

fn main() -> ExitCode {
    support::main(run)
}

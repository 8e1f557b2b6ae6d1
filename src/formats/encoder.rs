//! The face encoder in every form it is found in, and its own published form: a folder with
//!
//! | file | what | read by |
//! |---|---|---|
//! | `ip_adapter.safetensors` | the adapter branch, in IP-Adapter's layout | diffusers, IP-Adapter |
//! | `kv_encoder/encoder/` | LoRA of the encoding pass, in peft's layout | peft, diffusers |
//! | `kv_encoder/export/` | LoRA of the exported keys and values, in peft's layout | peft, diffusers |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use super::lora::{Layout, LoraFile};
use super::tensor_file::{TensorFile, format_error};
use super::{ip_adapter, official};
use crate::Result;
use crate::lookahead::{FaceEncoder, FaceEncoderConfig, KvEncoderConfig};
use crate::models::unet::{self, UNet};
use crate::nn::{LoraTensors, Weights};

const ADAPTER: &str = "ip_adapter.safetensors";
/// The two LoRA sets, as folders and as beginnings of names.
const SETS: [(&str, &str); 2] =
    [("kv_encoder/encoder", "kv_encoder.encoder."), ("kv_encoder/export", "kv_encoder.export.")];

/// What a file of tensors holds, told by its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A face encoder, or an IP-Adapter, which is one without KV branch.
    Encoder,
    /// The authors' released checkpoint.
    Official,
    /// A LoRA.
    Lora,
    /// Anything else.
    Tensors,
}

impl Content {
    /// What a file holds.
    pub fn of(file: &TensorFile) -> Self {
        let any = |condition: &dyn Fn(&str) -> bool| file.names().any(condition);
        if any(&|name| name.starts_with("encoder_unet.")) {
            Content::Official
        } else if any(&|name| name.starts_with("image_proj.")) {
            Content::Encoder
        } else if any(&|name| name.contains("lora")) {
            Content::Lora
        } else {
            Content::Tensors
        }
    }
}

/// A face encoder, as files have it.
#[derive(Clone, Debug)]
pub struct EncoderFile {
    /// Its shape, read off its tensors.
    pub config: FaceEncoderConfig,
    /// Its tensors, named as [`FaceEncoder`] names them, in the type they are stored in.
    pub tensors: BTreeMap<String, Tensor>,
}

impl EncoderFile {
    /// Reads an encoder for a U-Net of this shape: the published folder, a checkpoint folder or a run's folder of
    /// [`crate::Trainer`] (averaged parameters where there are any), an IP-Adapter, a file with the encoder's own names,
    /// or the authors' released checkpoint (compared with `base` where that is given).
    ///
    /// # Errors
    /// [`crate::Error::Format`] where it is none of these, [`crate::Error::Tensor`] where a tensor is missing, misshapen or one too
    /// many; those of the form's own reader.
    pub fn open(path: impl AsRef<Path>, unet: &unet::Config, base: Option<&TensorFile>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            return Self::open_folder(path, unet);
        }
        let file = TensorFile::open(path)?;
        if Content::of(&file) == Content::Official {
            let official = official::read(path, unet, base)?;
            return Ok(EncoderFile { config: official.config, tensors: official.tensors });
        }
        let tensors = file.names().map(|name| Ok((name.to_string(), file.load(name, &Device::Cpu)?)));
        Self::from_tensors(&file, tensors.collect::<Result<_>>()?, unet)
    }

    fn open_folder(path: &Path, unet: &unet::Config) -> Result<Self> {
        if let Some(file) = parameters_of_a_run(path)? {
            return Self::open(file, unet, None);
        }
        let adapter = path.join(ADAPTER);
        if !adapter.is_file() {
            return Err(format_error(path, format!("neither a checkpoint nor a folder with `{ADAPTER}`")));
        }
        let file = TensorFile::open(&adapter)?;
        let mut tensors = ip_adapter::read(&adapter, unet)?.tensors;
        for (folder, prefix) in SETS {
            if !path.join(folder).is_dir() {
                continue;
            }
            for (layer, LoraTensors { down, up, alpha }) in LoraFile::open(path.join(folder), unet)?.layers {
                // The encoder's own LoRA have a scale of one.
                let scale = alpha / down.dim(0)?.max(1) as f64;
                let up = if scale == 1.0 { up } else { (up * scale)? };
                tensors.insert(format!("{prefix}{layer}.lora_A.weight"), down);
                tensors.insert(format!("{prefix}{layer}.lora_B.weight"), up);
            }
        }
        Self::from_tensors(&file, tensors, unet)
    }

    fn from_tensors(file: &TensorFile, tensors: BTreeMap<String, Tensor>, unet: &unet::Config) -> Result<Self> {
        let resampler = ip_adapter::resampler_config(file, "image_proj.")?;
        let unet = UNet::load(unet, &Weights::shapes_only())?;
        let config = FaceEncoderConfig { resampler, kv_encoder: kv_config(&tensors, &unet) };
        let weights = Weights::shapes_only();
        FaceEncoder::load(&config, &unet, &weights, &weights)?;
        let shapes = weights.shapes();
        for (name, shape) in &shapes {
            match tensors.get(name) {
                Some(tensor) if tensor.dims() == shape => {}
                found => {
                    let found = found.map_or("nothing".to_string(), |tensor| format!("shape {:?}", tensor.dims()));
                    return Err(file.fault(name, format!("shape {shape:?}"), found));
                }
            }
        }
        if let Some(extra) = tensors.keys().find(|name| !shapes.contains_key(*name)) {
            return Err(file.fault(extra, "no tensor of this name in a face encoder", "one"));
        }
        Ok(EncoderFile { config, tensors })
    }

    /// Writes the published folder. An encoder without KV branch becomes a folder with `ip_adapter.safetensors` alone.
    /// Returns the files that hold tensors.
    ///
    /// # Errors
    /// [`crate::Error::Io`] where a file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>, unet: &unet::Config) -> Result<Vec<PathBuf>> {
        let folder = folder.as_ref();
        let mut written = vec![folder.join(ADAPTER)];
        ip_adapter::write(&written[0], &self.tensors)?;
        for (name, prefix) in SETS {
            let set: BTreeMap<String, Tensor> = self
                .tensors
                .iter()
                .filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_string(), tensor.clone())))
                .collect();
            if !set.is_empty() {
                let lora = LoraFile::from_parameters("the face encoder", &set)?;
                written.push(lora.save(folder.join(name), Layout::Peft, unet)?);
            }
        }
        Ok(written)
    }
}

/// The file with the parameters that a run's folder, or one of its checkpoint folders, should be used with.
fn parameters_of_a_run(path: &Path) -> Result<Option<PathBuf>> {
    let checkpoint = match path.join("state.json").is_file() {
        true => Some(path.to_path_buf()),
        false => crate::train::checkpoint::latest(path)?,
    };
    let files = |folder: PathBuf| ["ema.safetensors", "parameters.safetensors"].map(|name| folder.join(name));
    Ok(checkpoint.and_then(|folder| files(folder).into_iter().find(|file| file.is_file())))
}

/// The shape of the KV branch, where there is one.
fn kv_config(tensors: &BTreeMap<String, Tensor>, unet: &UNet) -> Option<KvEncoderConfig> {
    let rank = |prefix: &str| {
        let down = tensors.iter().find(|(name, _)| name.starts_with(prefix) && name.ends_with(".lora_A.weight"));
        down.and_then(|(_, tensor)| tensor.dims().first().copied()).unwrap_or(0)
    };
    let (encoder_lora_rank, kv_lora_rank) = (rank(SETS[0].1), rank(SETS[1].1));
    if encoder_lora_rank + kv_lora_rank == 0 {
        return None;
    }
    let names = unet.block_names();
    let exported: Vec<String> = names
        .iter()
        .filter(|name| tensors.contains_key(&format!("{}{name}.attn1.to_k.lora_A.weight", SETS[1].1)))
        .cloned()
        .collect();
    let blocks = if exported.len() == names.len() || kv_lora_rank == 0 { Vec::new() } else { exported };
    Some(KvEncoderConfig { encoder_lora_rank, kv_lora_rank, blocks })
}

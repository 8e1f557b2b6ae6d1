//! The checkpoint that the authors of the paper released (`encoder_plus_adapter_ckpt.bin`), read and written.
//!
//! It is the state dictionary of their adapter module, flat:
//!
//! | names | what |
//! |---|---|
//! | `encoder_unet.<name>` | SDXL's base weights, unchanged |
//! | `encoder_unet.<block>.attn{1,2}.<projection>.lora_layer.{down,up}.weight` | LoRA of the encoding pass |
//! | `encoder_unet.<block>.extract_kv1.{to_k,to_v}.weight` | copies of `attn1`'s, frozen |
//! | `encoder_unet.<block>.extract_kv1.{to_k,to_v}.lora_layer.{down,up}.weight` | LoRA of the exported keys and values |
//! | `encoder_unet.<block>.extract_kv2.{to_k,to_v}.weight` | IP-Adapter's `to_k_ip` and `to_v_ip` |
//! | `encoder_unet.<block>.extract_kv{1,2}.source_attention_block.*` | `attn1` and `attn2` once more (aliases) |
//! | `image_proj_model.*` | the resampler |
//! | `image_encoder.*` | CLIP ViT-H/14, unchanged |
//!
//! Of its 14 GB, 1.7 GB are new: LoRA, adapter projections and resampler. Only these are kept.

mod layout;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::info::{StoredDtype, TensorInfo};
use super::ip_adapter::{is_pytorch, lookup, resampler_config};
use super::pytorch::{self, Node};
use super::tensor_file::{TensorFile, format_error};
use crate::lookahead::{FaceEncoderConfig, KvEncoderConfig};
use crate::models::unet::{self, UNet};
use crate::nn::Weights;
use crate::{Error, Result};
use layout::{Layout, Origin};

/// The authors' released checkpoint, as far as it is new.
#[derive(Clone, Debug)]
pub struct OfficialFile {
    /// The shape of the encoder.
    pub config: FaceEncoderConfig,
    /// Its tensors, named as [`crate::lookahead::FaceEncoder`] names them.
    pub tensors: BTreeMap<String, Tensor>,
    /// How many base weights were found equal to the base; 0 where none was given.
    pub compared: usize,
}

/// Reads a checkpoint of the official layout, for a U-Net of this shape.
///
/// Where `base` is given, every base weight is compared with it, at the coarser of the two types' precision: a
/// checkpoint that was trained on another base is refused. Without it they are dropped. That `extract_kv1` is a copy of
/// `attn1` is always checked.
///
/// # Errors
/// [`Error::Tensor`] for tensors that are missing, misshapen, one too many, or differ from the base;
/// those of [`TensorFile::open`].
pub fn read(path: impl AsRef<Path>, unet: &unet::Config, base: Option<&TensorFile>) -> Result<OfficialFile> {
    let file = TensorFile::open(path)?;
    let unet = UNet::load(unet, &Weights::shapes_only())?;
    let resampler = resampler_config(&file, "image_proj_model.")?;
    let rank = |ending: &str| {
        let found = file.infos().find(|(name, _)| name.ends_with(ending)).and_then(|(_, info)| info.shape.first());
        found.copied().unwrap_or(0)
    };
    let kv = KvEncoderConfig {
        encoder_lora_rank: rank(".attn1.to_q.lora_layer.down.weight"),
        kv_lora_rank: rank(".extract_kv1.to_k.lora_layer.down.weight"),
        blocks: Vec::new(),
    };
    let config = FaceEncoderConfig { resampler, kv_encoder: Some(kv) };
    let layout = Layout::of(&config, &unet)?;
    layout.check(&file)?;
    let mut compared = 0;
    let mut tensors = BTreeMap::new();
    for (name, place) in layout.tensors() {
        match &place.origin {
            Origin::New(own) => {
                tensors.insert(own.clone(), file.load(name, &Device::Cpu)?);
            }
            Origin::Base(own) => {
                if let Some(base) = base {
                    same(&file, name, base, own)?;
                    compared += 1;
                }
            }
            Origin::CopyOf(own) => same(&file, name, &file, own)?,
            // Aliases share the storage of what they stand for.
            Origin::Alias(_) => {}
        }
    }
    Ok(OfficialFile { config, tensors, compared })
}

/// Whether two tensors are the same, up to the coarser of their types.
fn same(file: &TensorFile, name: &str, other: &TensorFile, other_name: &str) -> Result<()> {
    let (ours, theirs) = (file.load(name, &Device::Cpu)?, other.load(other_name, &Device::Cpu)?);
    let expected = || format!("the weights of `{other_name}` in {}", other.path().display());
    if ours.dims() != theirs.dims() {
        return Err(file.fault(name, expected(), format!("shape {:?}, not {:?}", ours.dims(), theirs.dims())));
    }
    if ours.elem_count() == 0 {
        return Ok(());
    }
    let coarse = [ours.dtype(), theirs.dtype()];
    let coarse = [DType::BF16, DType::F16, DType::F32].into_iter().find(|dtype| coarse.contains(dtype));
    let coarse = coarse.unwrap_or(DType::F32);
    let number = |tensor: Tensor| -> Result<Tensor> { Ok(tensor.to_dtype(coarse)?.to_dtype(DType::F32)?) };
    let (ours, theirs) = (number(ours)?, number(theirs)?);
    let difference = (&ours - &theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
    // Rounding to a coarser type is the same for equal numbers, so equal weights have no difference at all; the room
    // left is for a file that went through f16 on its way to f32.
    let largest = theirs.abs()?.max_all()?.to_scalar::<f32>()?;
    match difference <= largest * 1e-3 {
        true => Ok(()),
        false => Err(file.fault(name, expected(), format!("others: they differ by up to {difference:e}"))),
    }
}

/// What an official checkpoint is put together from.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// The shape of the encoder.
    pub config: &'a FaceEncoderConfig,
    /// The encoder's tensors, named as [`crate::lookahead::FaceEncoder`] names them.
    pub tensors: &'a BTreeMap<String, Tensor>,
    /// The shape of the base U-Net.
    pub unet: &'a unet::Config,
    /// The base U-Net's weights.
    pub base: &'a TensorFile,
    /// The image encoder's weights.
    pub image_encoder: &'a TensorFile,
}

/// Writes a checkpoint in the official layout: every name that a strict loader asks for, base weights and image
/// encoder included, aliases sharing the storage of what they stand for. Memory holds one tensor at a time besides the
/// sources. U-Net and adapter are written in f32 and the image encoder in f16, as released.
///
/// # Errors
/// [`Error::Tensor`] where a source lacks a tensor; [`Error::Io`] where the file cannot be written;
/// [`Error::Config`] for an encoder that the layout cannot express (without KV branch, or of some blocks only).
pub fn write(path: impl AsRef<Path>, sources: &Sources<'_>) -> Result<()> {
    let path = path.as_ref();
    if !is_pytorch(path) {
        return Err(format_error(
            path,
            "the official layout is a PyTorch file: expected a name that ends in .bin or .pt",
        ));
    }
    let config_error = |field: &str, reason: &str| Error::Config {
        source_name: "official layout".into(),
        field: field.into(),
        reason: reason.into(),
    };
    let kv = sources.config.kv_encoder.as_ref();
    let kv = kv.ok_or_else(|| config_error("kv_encoder", "the layout has no form without a KV branch"))?;
    if !kv.blocks.is_empty() {
        return Err(config_error("kv_encoder.blocks", "the layout extends all blocks"));
    }
    let unet = UNet::load(sources.unet, &Weights::shapes_only())?;
    let layout = Layout::of(sources.config, &unet)?;
    let mut entries = Vec::new();
    for (name, place) in layout.tensors() {
        let info = TensorInfo { shape: place.shape.clone(), dtype: StoredDtype::F32 };
        let storage = match &place.origin {
            Origin::Alias(of) => of.clone(),
            _ => name.clone(),
        };
        entries.push((name.clone(), Node::Tensor(info, storage)));
    }
    for (name, info) in sources.image_encoder.infos().filter(|(name, _)| !name.ends_with("position_ids")) {
        let name = format!("image_encoder.{name}");
        entries.push((name.clone(), Node::Tensor(TensorInfo { dtype: StoredDtype::F16, ..info.clone() }, name)));
    }
    pytorch::write(path, &Node::Dict(entries), |storage| {
        if let Some(name) = storage.strip_prefix("image_encoder.") {
            return Ok(sources.image_encoder.load(name, &Device::Cpu)?.to_dtype(DType::F16)?);
        }
        let tensor = match layout.origin(storage) {
            Some(Origin::New(own)) => lookup(sources.tensors, own)?,
            Some(Origin::Base(name)) => sources.base.load(name, &Device::Cpu)?,
            Some(Origin::CopyOf(name)) => {
                let name = name.strip_prefix(layout::ENCODER).unwrap_or(name);
                sources.base.load(name, &Device::Cpu)?
            }
            _ => return Err(format_error(path, format!("`{storage}` has no source"))),
        };
        Ok(tensor.to_dtype(DType::F32)?)
    })
}

//! LoRA files of a U-Net, in the forms in which they are found, and writing them in each.
//!
//! | form | name of a tensor |
//! |---|---|
//! | peft | `base_model.model.<path>.lora_A.weight`; alpha in `adapter_config.json` |
//! | diffusers | `unet.<path>.lora_A.weight`; alpha in the file's notes |
//! | diffusers before peft | `unet.<path>.lora.down.weight`, `unet.<...>.attn1.processor.to_q_lora.down.weight` |
//! | kohya | `lora_unet_<path with underscores>.lora_down.weight`, `.alpha`; blocks named as diffusers names them (LCM-LoRA SDXL) or as Stability's code does (`input_blocks`, `middle_block`, `output_blocks`) |

mod config;
mod keys;
mod paths;
mod save;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::tensor_file::{TensorFile, format_error};
use crate::models::unet;
use crate::nn::{LoraSet, LoraTensors};
use crate::{Error, Result};
use config::Alphas;
use keys::Component;
#[cfg(test)]
use keys::Part;
use paths::Paths;

pub use save::Layout;

/// What a folder's LoRA file is called, by peft and by diffusers.
const IN_FOLDERS: [&str; 4] =
    ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin", "pytorch_lora_weights.bin"];
/// How many names an error shows.
const SHOWN: usize = 5;

/// The LoRA of a U-Net, layer by layer, as its file has it.
#[derive(Clone, Debug)]
pub struct LoraFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// The layers, by the paths that diffusers gives them, with tensors in the shapes that belong to these layers.
    pub layers: BTreeMap<String, LoraTensors>,
    /// How many layers the file has for text encoders; they are not read.
    pub text_encoder_layers: usize,
}

impl LoraFile {
    /// Reads a LoRA file, or a folder that holds one, for a U-Net of this shape.
    ///
    /// # Errors
    /// [`Error::Format`] naming the layers that the U-Net does not have: the LoRA is for another architecture.
    /// [`Error::Tensor`] for a layer of another shape, one half of a layer, or a kind that is not supported (DoRA, LoHa,
    /// LoKr, ...). Those of [`TensorFile::open`].
    pub fn open(path: impl AsRef<Path>, unet: &unet::Config) -> Result<Self> {
        let path = find(path.as_ref())?;
        let file = TensorFile::open(&path)?;
        let shapes = unet::UNet::shapes(unet)?;
        let paths = Paths::of(unet, &shapes);
        let alphas = Alphas::of(&file)?;
        Self::read(&file, &shapes, &paths, &alphas)
    }

    fn read(file: &TensorFile, shapes: &BTreeMap<String, Vec<usize>>, paths: &Paths, alphas: &Alphas) -> Result<Self> {
        let mut halves: BTreeMap<&str, [Option<&str>; 3]> = BTreeMap::new();
        let (mut unknown, mut text_encoders) = (Vec::new(), std::collections::BTreeSet::new());
        for name in file.names() {
            let Some(key) = keys::parse(name) else {
                return Err(file.fault(name, "the name of a LoRA's down, up or alpha", "another name or kind of LoRA"));
            };
            if let Component::TextEncoder = key.component {
                text_encoders.insert(key.module);
                continue;
            }
            let Some(layer) = paths.resolve(&key.module) else {
                unknown.push(key.module);
                continue;
            };
            let place = &mut halves.entry(layer).or_default()[key.part as usize];
            if let Some(other) = place.replace(name) {
                return Err(file.fault(name, "one tensor of each kind for a layer", format!("`{other}` besides")));
            }
        }
        unknown.sort();
        unknown.dedup();
        let path = file.path();
        if !unknown.is_empty() {
            let shown = unknown.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            return Err(format_error(
                path,
                format!(
                    "a LoRA for another architecture: the U-Net has no layer for {} of the file's names ({shown}{})",
                    unknown.len(),
                    if unknown.len() > SHOWN { ", ..." } else { "" }
                ),
            ));
        }
        if halves.is_empty() {
            return Err(format_error(path, "a LoRA without a single layer for the U-Net"));
        }
        let mut layers = BTreeMap::new();
        for (layer, parts) in halves {
            let [down, up, alpha] = parts;
            let half = |name: Option<_>, part: &str| {
                name.ok_or_else(|| file.fault(layer, format!("a tensor `{part}` beside the other half"), "nothing"))
            };
            let (down, up) = (half(down, "down")?, half(up, "up")?);
            let base = &shapes[&format!("{layer}.weight")];
            // Shapes are compared before any number is read.
            let rank = file.info(down).and_then(|info| info.shape.first().copied()).unwrap_or(0);
            let largest = base.iter().product::<usize>().max(1);
            for name in [down, up] {
                let count = file.info(name).and_then(|info| info.elements()).unwrap_or(usize::MAX);
                if rank == 0 || count > largest.saturating_mul(rank) {
                    let found =
                        format!("shape {:?}", file.info(name).map(|info| info.shape.clone()).unwrap_or_default());
                    return Err(file.fault(name, format!("a LoRA of a layer of shape {base:?}"), found));
                }
            }
            let alpha = match alpha {
                Some(name) => scalar(file, name)?,
                None => alphas.alpha(layer, rank),
            };
            let tensors = LoraTensors { down: file.load(down, &Device::Cpu)?, up: file.load(up, &Device::Cpu)?, alpha };
            layers.insert(layer.to_string(), tensors.fit(&path.display().to_string(), layer, base)?);
        }
        Ok(LoraFile { path: path.to_path_buf(), layers, text_encoder_layers: text_encoders.len() })
    }

    /// The LoRA as an argument of a forward pass.
    ///
    /// # Errors
    /// [`Error::Candle`] where memory is out.
    pub fn to_set(&self, dtype: DType, device: &Device) -> Result<LoraSet> {
        LoraSet::from_tensors(&self.layers, dtype, device)
    }

    /// A LoRA from tensors in peft's naming, `<path>.lora_A.weight` and `<path>.lora_B.weight`, with alpha = rank, as
    /// this crate's parameters hold it.
    ///
    /// # Errors
    /// [`Error::Tensor`] where one half is missing.
    pub fn from_parameters(name: &str, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let mut layers = BTreeMap::new();
        for (key, down) in tensors {
            let Some(layer) = key.strip_suffix(".lora_A.weight") else { continue };
            let up = tensors.get(&format!("{layer}.lora_B.weight")).ok_or_else(|| Error::Tensor {
                file: name.to_string(),
                tensor: format!("{layer}.lora_B.weight"),
                expected: "the other half of a LoRA".into(),
                found: "nothing".into(),
            })?;
            let alpha = down.dim(0)? as f64;
            layers.insert(layer.to_string(), LoraTensors { down: down.clone(), up: up.clone(), alpha });
        }
        Ok(LoraFile { path: name.into(), layers, text_encoder_layers: 0 })
    }
}

/// The file itself, or the one that a folder holds.
fn find(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let found = IN_FOLDERS.iter().map(|name| path.join(name)).find(|file| file.is_file());
    found.ok_or_else(|| format_error(path, format!("a folder without a LoRA; looked for {}", IN_FOLDERS.join(", "))))
}

fn scalar(file: &TensorFile, name: &str) -> Result<f64> {
    let shape = file.info(name).map(|info| info.shape.clone()).unwrap_or_default();
    if shape.iter().product::<usize>() != 1 {
        return Err(file.fault(name, "a single number", format!("shape {shape:?}")));
    }
    let value = file.load(name, &Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?[0];
    match value.is_finite() {
        true => Ok(value),
        false => Err(file.fault(name, "a finite number", value.to_string())),
    }
}

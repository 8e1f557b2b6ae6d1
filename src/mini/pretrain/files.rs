//! The files of the stages.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::nn::Weights;
use crate::{Error, Result};

/// Writes tensors to a safetensors file that appears whole or not at all.
pub(super) fn save_tensors(path: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io("create the folder", folder))?;
    }
    let temporary = path.with_extension("partial");
    let tensors: HashMap<String, Tensor> =
        tensors.iter().map(|(name, tensor)| Ok((name.clone(), tensor.contiguous()?))).collect::<Result<_>>()?;
    candle_core::safetensors::save(&tensors, &temporary)?;
    fs::rename(&temporary, path).map_err(Error::io("rename to its final name", &temporary))
}

/// Reads all tensors of a safetensors file.
pub(super) fn load_tensors(path: &Path) -> Result<HashMap<String, Tensor>> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
        .map_err(|error| Error::Format { path: path.into(), reason: format!("not a safetensors file: {error}") })
}

/// The weights of earlier stages, from their files in a folder, frozen.
pub(super) fn load_stages(folder: &Path, stages: &[&str]) -> Result<Weights> {
    let mut tensors = HashMap::new();
    for stage in stages {
        tensors.extend(load_tensors(&folder.join(format!("{stage}.safetensors")))?);
    }
    Ok(Weights::frozen(folder.display().to_string(), tensors))
}

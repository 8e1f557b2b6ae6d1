//! The files of the stages.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::training::Options;
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

/// The weights of earlier stages, from their files in a folder, frozen, in the dtype and at the place of the run.
pub(super) fn load_stages(options: &Options, stages: &[&str]) -> Result<Weights> {
    let mut tensors = HashMap::new();
    for stage in stages {
        for (name, tensor) in load_tensors(&options.out.join(format!("{stage}.safetensors")))? {
            // Single numbers stay exact.
            let single = tensor.elem_count() == 1 || !tensor.dtype().is_float();
            let dtype = if single { tensor.dtype() } else { options.dtype };
            tensors.insert(name, tensor.to_device(&options.device)?.to_dtype(dtype)?);
        }
    }
    Ok(Weights::frozen(options.out.display().to_string(), tensors))
}

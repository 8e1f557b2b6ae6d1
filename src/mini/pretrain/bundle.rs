//! All networks in one file.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::files::{load_tensors, save_tensors};
use crate::Result;
use crate::mini::{MiniConfig, random_weights};
use crate::nn::Weights;

/// Which stage trains which networks.
const STAGES: [(&str, &[&str]); 7] = [
    ("autoencoder", &["autoencoder."]),
    ("clip", &["text_encoder.", "image_encoder."]),
    ("identity", &["identity_network."]),
    ("face_locator", &["face_locator."]),
    ("denoiser", &["unet."]),
    ("lcm", &["lcm_lora."]),
    ("adapter", &["adapter."]),
];

/// Writes random weights for every stage that has no file in the folder.
///
/// # Errors
/// [`crate::Error::Io`] where a file cannot be written.
pub fn init(folder: &Path, seed: u64) -> Result<()> {
    let weights = random_weights(&MiniConfig::mini(), seed, DType::F32, &Device::Cpu)?;
    for (stage, prefixes) in STAGES {
        let file = folder.join(format!("{stage}.safetensors"));
        if !file.exists() {
            save_tensors(&file, &of_networks(&weights, prefixes))?;
        }
    }
    Ok(())
}

/// Gathers the stages' files into one, in f16, and prints how large the networks are.
///
/// # Errors
/// [`crate::Error::Io`] where a stage's file is missing, [`crate::Error::Tensor`] where a tensor is.
pub fn bundle(folder: &Path, file: &Path) -> Result<()> {
    let mut all = HashMap::new();
    for (stage, prefixes) in STAGES {
        all.extend(of_networks(&load_tensors(&folder.join(format!("{stage}.safetensors")))?, prefixes));
    }
    let mut counts = BTreeMap::<&str, usize>::new();
    for (name, tensor) in &all {
        *counts.entry(name.split('.').next().unwrap_or_default()).or_default() += tensor.elem_count();
    }
    let halves: HashMap<String, Tensor> =
        all.iter().map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(DType::F16)?))).collect::<Result<_>>()?;
    save_tensors(file, &halves)?;
    for (network, count) in &counts {
        println!("{network:18} {count:9} parameters");
    }
    let total: usize = counts.values().sum();
    println!("{:18} {total:9} parameters, {:.2} MB in f16: {}", "all", total as f64 * 2e-6, file.display());
    // What was written is what the crate will read.
    MiniConfig::mini().load_base(&Weights::from_safetensors(file, DType::F32, &Device::Cpu)?)?;
    Ok(())
}

fn of_networks(tensors: &HashMap<String, Tensor>, prefixes: &[&str]) -> HashMap<String, Tensor> {
    let belongs = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
    tensors.iter().filter(|(name, _)| belongs(name)).map(|(name, tensor)| (name.clone(), tensor.clone())).collect()
}

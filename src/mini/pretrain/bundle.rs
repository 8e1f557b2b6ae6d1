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

/// Gathers the stages' files into `mini.safetensors` of a folder, in f16, and prints how large the networks are; beside
/// it, where that stage was trained, `held_out_identity.safetensors`, which is no part of the miniature.
///
/// # Errors
/// [`crate::Error::Io`] where a stage's file is missing, [`crate::Error::Tensor`] where a tensor is.
pub fn bundle(folder: &Path, into: &Path) -> Result<()> {
    let stage_file = |stage: &str| folder.join(format!("{stage}.safetensors"));
    let mut all = HashMap::new();
    for (stage, prefixes) in STAGES {
        // The decoder's stage writes the whole autoencoder again.
        let retrained = stage == "autoencoder" && stage_file("decoder").exists();
        let file = stage_file(if retrained { "decoder" } else { stage });
        all.extend(of_networks(&load_tensors(&file)?, prefixes));
    }
    let file = into.join("mini.safetensors");
    write(&all, &file)?;
    let held_out = stage_file("held_out_identity");
    if held_out.exists() {
        // Without the centres of the training's classes.
        let network = of_networks(&load_tensors(&held_out)?, &["held_out_identity."]);
        write(&network, &into.join("held_out_identity.safetensors"))?;
    }
    // What was written is what the crate will read.
    MiniConfig::mini().load_base(&Weights::from_safetensors(&file, DType::F32, &Device::Cpu)?)?;
    Ok(())
}

/// Writes tensors in f16, and prints how many parameters each network has.
fn write(tensors: &HashMap<String, Tensor>, file: &Path) -> Result<()> {
    let mut counts = BTreeMap::<&str, usize>::new();
    for (name, tensor) in tensors {
        *counts.entry(name.split('.').next().unwrap_or_default()).or_default() += tensor.elem_count();
    }
    let half = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.to_dtype(DType::F16)?));
    save_tensors(file, &tensors.iter().map(half).collect::<Result<_>>()?)?;
    for (network, count) in &counts {
        println!("{network:18} {count:9} parameters");
    }
    let total: usize = counts.values().sum();
    println!("{:18} {total:9} parameters, {:.2} MB in f16: {}", "all", total as f64 * 2e-6, file.display());
    Ok(())
}

fn of_networks(tensors: &HashMap<String, Tensor>, prefixes: &[&str]) -> HashMap<String, Tensor> {
    let belongs = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
    tensors.iter().filter(|(name, _)| belongs(name)).map(|(name, tensor)| (name.clone(), tensor.clone())).collect()
}

//! The full-size U-Net against diffusers on the same weights (`reference.py` writes them).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use candle_core::{DType, Device, Tensor};
use lcm_lookahead::models::unet::{Config, Recording};
use lcm_lookahead::nn::Weights;
use lcm_lookahead::{Conditioning, LoraSet, Loras, Pass, UNet, cuda};

/// Rank and scale of the reference's LoRA.
const RANK: usize = 8;
const SCALE: f64 = 0.7;

/// Opens the weights and compares every case in `folder`; fails where ours is further from diffusers than 2e-2.
pub fn compare(folder: &Path, device: &Device) -> anyhow::Result<()> {
    let mut seconds = Vec::new();
    let mut unet = None;
    for _ in 0..3 {
        drop(unet.take());
        let start = Instant::now();
        let weights = Weights::from_safetensors(folder.join("unet.safetensors"), DType::BF16, device)?;
        unet = Some(UNet::load(&Config::sdxl(), &weights)?);
        cuda::synchronize(device)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    println!("opening the U-Net from safetensors: {seconds:.2?} s");
    let unet = unet.context("the U-Net was opened")?;
    let cases = candle_core::safetensors::load(folder.join("cases.safetensors"), device)?;
    let loras = load_lora(folder, device)?;

    let get = |name: &str| cases.get(name).with_context(|| format!("cases.safetensors lacks `{name}`"));
    let conditioning = Conditioning::square(get("text")?.clone(), get("pooled")?.clone(), 1024);
    let timesteps = [801, 41];
    let run = |pass: &Pass| unet.forward(get("latents").map_err(invalid)?, &timesteps, &conditioning, pass);
    let reference =
        unet.record(get("reference_latents")?, &timesteps, &conditioning, &Pass::default(), &Recording::default())?;
    let outputs = [
        ("plain", run(&Pass::default())?),
        ("lora", run(&Pass { loras: Loras::one(&loras, SCALE), ..Pass::default() })?),
        ("extended", run(&Pass { reference: Some(reference), ..Pass::default() })?),
    ];
    for (case, output) in outputs {
        let (exact, rounded) = (get(&format!("{case}_f32"))?, get(&format!("{case}_bf16"))?);
        let (ours, theirs) = (distance(&output, rounded)?, distance(rounded, exact)?);
        println!(
            "{case}: against diffusers in bf16 {ours:.2e}, against f32 {:.2e} (diffusers in bf16: {theirs:.2e})",
            distance(&output, exact)?
        );
        ensure!(ours < 2e-2, "{case}: {ours:.2e} is more than 2e-2 from diffusers");
    }
    Ok(())
}

fn invalid(error: anyhow::Error) -> lcm_lookahead::Error {
    lcm_lookahead::Error::argument("compare", "cases", "all tensors of reference.py", error.to_string())
}

fn load_lora(folder: &Path, device: &Device) -> anyhow::Result<LoraSet> {
    let tensors: HashMap<String, Tensor> = candle_core::safetensors::load(folder.join("lora.safetensors"), device)?;
    let shapes = UNet::shapes(&Config::sdxl())?;
    let layers: BTreeMap<String, Vec<usize>> = tensors
        .keys()
        .filter_map(|name| name.strip_suffix(".lora_A.weight"))
        .filter_map(|path| Some((path.to_string(), shapes.get(&format!("{path}.weight"))?.clone())))
        .collect();
    Ok(LoraSet::load(&layers, RANK, &Weights::frozen("lora.safetensors", tensors))?)
}

/// `||a - b|| / ||b||`.
fn distance(a: &Tensor, b: &Tensor) -> anyhow::Result<f64> {
    let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    let norm = |t: &Tensor| -> anyhow::Result<f64> { Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt()) };
    Ok(norm(&(a - &b)?)? / norm(&b)?)
}

use candle_core::{DType, Device, Tensor};

use super::{AutoencoderKl, Config, Posterior};
use crate::Result;
use crate::autograd::check_gradients;
use crate::formats::diffusers::Folder;
use crate::models::roles::{LatentDecoder, LatentEncoder};
use crate::nn::{Parameters, Weights};
use crate::random::Address;

fn tiny() -> Config {
    Config {
        latent_channels: 2,
        block_out_channels: vec![2, 4],
        layers_per_block: 1,
        norm_num_groups: 2,
        scaling_factor: 0.5,
        shift_factor: 0.1,
        ..Config::sdxl()
    }
}

fn load(dtype: DType) -> Result<(AutoencoderKl, Parameters)> {
    let parameters = Parameters::new();
    let model = AutoencoderKl::load(&tiny(), &Weights::trainable(&parameters, 3, dtype, &Device::Cpu))?;
    Ok((model, parameters))
}

fn random(purpose: &'static str, shape: (usize, usize, usize, usize), dtype: DType) -> Result<Tensor> {
    Address::new(5, purpose).normal(shape, dtype, &Device::Cpu)
}

#[test]
fn sdxls_has_the_tensors_of_the_published_file() -> Result<()> {
    let weights = Weights::shapes_only();
    AutoencoderKl::load(&Config::sdxl(), &weights)?;
    let shapes = weights.shapes();
    assert_eq!(shapes.len(), 248);
    assert_eq!(shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>(), 83_653_863);
    for (name, shape) in [
        ("encoder.conv_in.weight", vec![128, 3, 3, 3]),
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.weight", vec![256, 128, 1, 1]),
        ("encoder.down_blocks.2.downsamplers.0.conv.weight", vec![512, 512, 3, 3]),
        ("encoder.mid_block.attentions.0.to_out.0.weight", vec![512, 512]),
        ("encoder.conv_out.weight", vec![8, 512, 3, 3]),
        ("quant_conv.weight", vec![8, 8, 1, 1]),
        ("post_quant_conv.bias", vec![4]),
        ("decoder.mid_block.attentions.0.group_norm.weight", vec![512]),
        ("decoder.up_blocks.2.resnets.0.norm1.weight", vec![512]),
        ("decoder.up_blocks.3.resnets.2.conv2.weight", vec![128, 128, 3, 3]),
        ("decoder.up_blocks.0.upsamplers.0.conv.bias", vec![512]),
        ("decoder.conv_norm_out.bias", vec![128]),
    ] {
        assert_eq!(shapes.get(name), Some(&shape), "{name}");
    }
    assert!(!shapes.contains_key("decoder.up_blocks.3.upsamplers.0.conv.weight"));
    Ok(())
}

#[test]
fn a_posterior_is_sampled_with_its_own_deviation_and_by_address() -> Result<()> {
    let mean = Tensor::full(3.0, (2, 1, 60, 60), &Device::Cpu)?;
    let posterior = Posterior { logvar: mean.affine(0.0, 0.25f64.ln())?, mean };
    let sample = posterior.sample(Address::new(1, "posterior"))?;
    let average = sample.mean_all()?.to_scalar::<f64>()?;
    let variance = sample.affine(1.0, -average)?.sqr()?.mean_all()?.to_scalar::<f64>()?;
    assert!((average - 3.0).abs() < 0.03 && (variance - 0.25).abs() < 0.02, "{average} {variance}");
    let again = posterior.sample(Address::new(1, "posterior"))?;
    assert_eq!(sample.flatten_all()?.to_vec1::<f64>()?, again.flatten_all()?.to_vec1::<f64>()?);
    // The second of the batch has an address of its own.
    assert_ne!(sample.get(0)?.flatten_all()?.to_vec1::<f64>()?, sample.get(1)?.flatten_all()?.to_vec1::<f64>()?);
    Ok(())
}

#[test]
fn files_with_the_attention_names_of_before_diffusers_0_15_are_read() -> Result<()> {
    let (model, parameters) = load(DType::F64)?;
    let old = |name: String| {
        let names = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];
        names.iter().fold(name, |name, (new, old)| name.replace(&format!(".{new}."), &format!(".{old}.")))
    };
    let tensors = parameters.all().into_iter().map(|(name, tensor)| (old(name), tensor.as_detached_tensor()));
    let tensors: std::collections::HashMap<_, _> = tensors.collect();
    assert!(tensors.contains_key("decoder.mid_block.attentions.0.proj_attn.bias"));
    assert!(!tensors.keys().any(|name| name.contains(".to_")));
    let folder = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(&tensors, folder.path().join("diffusion_pytorch_model.safetensors"))?;
    let asked = Weights::shapes_only();
    AutoencoderKl::load(&tiny(), &asked)?;
    let folder = Folder::open(folder.path(), None)?;
    let same = AutoencoderKl::load(&tiny(), &folder.weights(&asked.shapes(), DType::F64, &Device::Cpu)?)?;
    let images = random("images", (1, 3, 4, 6), DType::F64)?;
    let noise = Address::new(0, "posterior");
    let (ours, theirs) = (model.encode(&images, noise)?, same.encode(&images, noise)?);
    assert_eq!(ours.flatten_all()?.to_vec1::<f64>()?, theirs.flatten_all()?.to_vec1::<f64>()?);
    let (ours, theirs) = (model.decode(&ours)?, same.decode(&theirs)?);
    assert_eq!(ours.flatten_all()?.to_vec1::<f64>()?, theirs.flatten_all()?.to_vec1::<f64>()?);
    Ok(())
}

#[test]
fn scaled_latents_decode_as_they_were_encoded() -> Result<()> {
    let (model, _) = load(DType::F64)?;
    let images = random("images", (1, 3, 4, 6), DType::F64)?;
    let latents = model.encode(&images, Address::new(0, "posterior"))?;
    assert_eq!(latents.dims(), [1, 2, 2, 3]);
    let raw = model.posterior(&images)?.sample(Address::new(0, "posterior"))?;
    let difference = (latents.affine(2.0, 0.1)? - raw)?.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(difference < 1e-12, "{difference}");
    assert_eq!(model.decode(&latents)?.dims(), [1, 3, 4, 6]);
    Ok(())
}

#[test]
fn gradients_reach_images_and_latents_exactly() -> Result<()> {
    let (model, _) = load(DType::F64)?;
    let inputs = [random("images", (1, 3, 4, 2), DType::F64)?, random("latents", (1, 2, 2, 1), DType::F64)?];
    let noise = Address::new(2, "posterior");
    let check = check_gradients(&inputs, |x| Ok(vec![model.encode(&x[0], noise)?, model.decode(&x[1])?]))?;
    assert!(check.worst() < 1e-6 && check.norms.iter().all(|&norm| norm > 1e-3), "{check:?}");
    Ok(())
}

#[test]
fn every_weight_gets_a_gradient() -> Result<()> {
    let (model, parameters) = load(DType::F32)?;
    let images = random("images", (2, 3, 8, 8), DType::F32)?;
    let reconstruction = model.decode(&model.encode(&images, Address::new(2, "posterior"))?)?;
    let gradients = reconstruction.sqr()?.sum_all()?.backward()?;
    for (name, variable) in parameters.all() {
        assert!(gradients.get(&variable).is_some(), "{name}");
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let (model, _) = load(DType::F32)?;
    assert!(model.posterior(&random("x", (1, 3, 5, 4), DType::F32)?).is_err());
    assert!(model.decode(&random("x", (1, 3, 4, 4), DType::F32)?).is_err());
    for config in [
        Config { block_out_channels: vec![], ..tiny() },
        Config { block_out_channels: vec![3], ..tiny() },
        Config { block_out_channels: vec![1 << 40], ..tiny() },
        Config { layers_per_block: 0, ..tiny() },
        Config { scaling_factor: f64::NAN, ..tiny() },
    ] {
        assert!(matches!(config.validate(), Err(crate::Error::Config { .. })), "{config:?}");
    }
    Ok(())
}

//! The networks and the aligned crop against diffusers, transformers and PyTorch (`tests/fixtures/models.py` writes
//! the fixture).

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use lcm_lookahead::face::{CropOptions, Landmarks, aligned_crop_with};
use lcm_lookahead::models::clip_text::{self, ClipText};
use lcm_lookahead::models::clip_vision::{self, ClipVision};
use lcm_lookahead::models::resampler::{self, Resampler};
use lcm_lookahead::models::taesd::{self, Taesd};
use lcm_lookahead::nn::Weights;
use lcm_lookahead::ops::Activation;

/// What we compute in and the largest relative error; the fixture is computed in f64.
const KINDS: [(DType, f64); 2] = [(DType::F64, 1e-10), (DType::F32, 1e-4)];

#[derive(Clone)]
struct Case {
    name: &'static str,
    tensors: HashMap<String, Tensor>,
    dtype: DType,
    limit: f64,
}

impl Case {
    /// The case in every type that is compared.
    fn load(name: &'static str) -> Result<Vec<Self>> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/models.safetensors");
        let all = candle_core::safetensors::load(path, &Device::Cpu)?;
        let of_case = |(key, tensor): (String, Tensor)| Some((key.strip_prefix(name)?.get(1..)?.to_string(), tensor));
        let tensors: HashMap<String, Tensor> = all.into_iter().filter_map(of_case).collect();
        Ok(KINDS.map(|(dtype, limit)| Case { name, tensors: tensors.clone(), dtype, limit }).to_vec())
    }

    fn stored(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).with_context(|| format!("the fixture has no `{}.{name}`", self.name))
    }

    fn get(&self, name: &str) -> Result<Tensor> {
        Ok(self.stored(name)?.to_dtype(self.dtype)?)
    }

    fn weights(&self) -> Result<Weights> {
        let weights = self.tensors.iter().filter_map(|(key, tensor)| Some((key.strip_prefix("weights.")?, tensor)));
        let weights = weights.map(|(key, tensor)| Ok((key.to_string(), tensor.to_dtype(self.dtype)?)));
        Ok(Weights::frozen(self.name, weights.collect::<Result<_>>()?))
    }

    fn assert_close(&self, name: &str, found: &Tensor) -> Result<()> {
        let (expected, found) = (self.stored(name)?.to_dtype(DType::F64)?, found.to_dtype(DType::F64)?);
        ensure!(found.dims() == expected.dims(), "{name}: shape {:?}, expected {:?}", found.dims(), expected.dims());
        let norm = |x: Tensor| -> Result<f64> { Ok(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
        let error = norm((found - &expected)?)? / norm(expected)?;
        println!("{}.{name} ({:?}): relative error {error:.1e}", self.name, self.dtype);
        ensure!(error < self.limit, "{}.{name}: relative error {error:e}", self.name);
        Ok(())
    }
}

#[test]
fn taesd_encodes_and_decodes_as_diffusers_with_its_gradients() -> Result<()> {
    let config = taesd::Config {
        width: 6,
        num_encoder_blocks: vec![1, 2, 1],
        num_decoder_blocks: vec![2, 1, 1],
        ..taesd::Config::taesdxl()
    };
    for case in Case::load("taesd")? {
        let model = Taesd::load(&config, &case.weights()?)?;
        let (images, latents) = (Var::from_tensor(&case.get("images")?)?, Var::from_tensor(&case.get("latents")?)?);
        let (encoded, decoded) = (model.encode(&images)?, model.decode(&latents)?);
        case.assert_close("encoded", &encoded)?;
        case.assert_close("decoded", &decoded)?;
        let gradients = (encoded.sqr()?.sum_all()? + decoded.sqr()?.sum_all()?)?.backward()?;
        case.assert_close("images_gradient", gradients.get(&images).context("no gradient")?)?;
        case.assert_close("latents_gradient", gradients.get(&latents).context("no gradient")?)?;
    }
    Ok(())
}

#[test]
fn clip_embeds_text_as_transformers() -> Result<()> {
    for (name, hidden_act) in [("clip_text.quick_gelu", Activation::QuickGelu), ("clip_text.gelu", Activation::Gelu)] {
        let config = clip_text::Config {
            vocab_size: 20,
            max_position_embeddings: 7,
            hidden_size: 8,
            intermediate_size: 12,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            hidden_act,
            projection_dim: Some(5),
            eos_token_id: 19,
        };
        for case in Case::load(name)? {
            let model = ClipText::load(&config, &case.weights()?)?;
            let embeddings = model.forward(&case.stored("ids")?.to_dtype(DType::U32)?)?;
            case.assert_close("hidden_states", &embeddings.hidden_states)?;
            case.assert_close("pooled", &embeddings.pooled)?;
        }
    }
    Ok(())
}

#[test]
fn clip_embeds_images_as_transformers() -> Result<()> {
    let config = clip_vision::Config {
        image_size: 6,
        patch_size: 2,
        hidden_size: 8,
        intermediate_size: 12,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        hidden_act: Activation::Gelu,
        projection_dim: 5,
    };
    for case in Case::load("clip_vision")? {
        let embeddings = ClipVision::load(&config, &case.weights()?)?.forward(&case.get("images")?)?;
        case.assert_close("hidden_states", &embeddings.hidden_states)?;
        case.assert_close("pooled", &embeddings.pooled)?;
    }
    Ok(())
}

#[test]
fn the_resampler_computes_as_described() -> Result<()> {
    let config = resampler::Config {
        dim: 6,
        depth: 2,
        dim_head: 4,
        heads: 3,
        num_queries: 3,
        embedding_dim: 5,
        output_dim: 7,
        ff_mult: 2,
    };
    for case in Case::load("resampler")? {
        let tokens = Resampler::load(&config, &case.weights()?)?.forward(&case.get("image")?)?;
        case.assert_close("tokens", &tokens)?;
    }
    Ok(())
}

#[test]
fn the_aligned_crop_is_grid_sample_at_the_least_squares_similarity() -> Result<()> {
    for case in Case::load("aligned_crop")? {
        let points = case.stored("landmarks")?.to_vec3::<f64>()?;
        let landmarks: Vec<Landmarks> =
            points.iter().map(|face| std::array::from_fn(|i| [face[i][0], face[i][1]])).collect();
        let options = CropOptions { antialias: false, ..CropOptions::new(14) };
        case.assert_close("crops", &aligned_crop_with(&case.get("images")?, &landmarks, &options)?)?;
    }
    Ok(())
}

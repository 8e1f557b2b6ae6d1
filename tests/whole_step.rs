//! One whole training step against PyTorch: the same tiny U-Net (diffusers), KV-encoder LoRA, exported keys and values,
//! image attention and LCM-LoRA preview give the same losses and the same gradients.
//!
//! The fixture is made by `tests/fixtures/whole_step.py`.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use lcm_lookahead::Result;
use lcm_lookahead::lookahead::{KvEncoder, KvEncoderConfig, PreviewForm, preview};
use lcm_lookahead::models::ip_adapter::IpAdapter;
use lcm_lookahead::models::unet::{Conditioning, Config, ImageTokens, Pass, UNet};
use lcm_lookahead::nn::{LoraSet, Loras, Parameters, Weights};
use lcm_lookahead::schedule::NoiseSchedule;

/// The configuration in the fixture's metadata, written out.
fn config() -> Config {
    Config {
        in_channels: 4,
        out_channels: 4,
        block_out_channels: vec![4, 8, 12],
        layers_per_block: 1,
        transformer_layers_per_block: vec![0, 1, 2],
        attention_heads: vec![1, 2, 4],
        cross_attention_dim: 24,
        norm_num_groups: 2,
        norm_eps: 1e-5,
        addition_time_embed_dim: 8,
        pooled_dim: 16,
    }
}

/// The fixture's tensors, and the type we compute in.
struct Fixture(HashMap<String, Tensor>, DType);

impl Fixture {
    fn open() -> Result<Self> {
        Self::open_as(DType::F64)
    }

    fn open_as(dtype: DType) -> Result<Self> {
        let loaded = candle_core::safetensors::load("tests/fixtures/whole_step.safetensors", &Device::Cpu)?;
        let tensors = loaded.into_iter().map(|(name, tensor)| {
            let tensor = if tensor.dtype().is_float() { tensor.to_dtype(dtype)? } else { tensor };
            Ok((name, tensor))
        });
        Ok(Fixture(tensors.collect::<Result<_>>()?, dtype))
    }

    fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("the fixture lacks {name}"))
    }

    /// The tensors below a prefix, under their names without it.
    fn below(&self, prefix: &str) -> HashMap<String, Tensor> {
        self.0.iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_string(), t.clone()))).collect()
    }

    fn conditioning(&self, text: &str, pooled: &str) -> Result<Conditioning> {
        let ids = self.get("input.time_ids").to_dtype(DType::F64)?.to_vec2::<f64>()?;
        Ok(Conditioning {
            hidden_states: self.get(text).clone(),
            pooled: self.get(pooled).clone(),
            time_ids: ids.iter().map(|row| std::array::from_fn(|i| row[i])).collect(),
        })
    }
}

fn relative_error(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let norm = |t: &Tensor| -> Result<f64> { Ok(t.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    let (found, expected) = (&found.to_dtype(DType::F64)?, &expected.to_dtype(DType::F64)?);
    Ok(norm(&(found - expected)?)? / norm(expected)?.max(1e-12))
}

/// What a step computes, and the variables it is differentiated by under their names in the fixture.
struct Step {
    parameters: Parameters,
    values: BTreeMap<&'static str, Tensor>,
    loss: Tensor,
}

fn step(fixture: &Fixture, recompute: bool) -> Result<Step> {
    let unet = UNet::load(&config(), &Weights::frozen("fixture", fixture.below("unet.")))?;

    let parameters = Parameters::new();
    for (from, to) in [("kv_lora.", "encoder."), ("extract_lora.", "export."), ("ip_adapter.", "ip_adapter.")] {
        for (name, tensor) in fixture.below(from) {
            parameters.insert(format!("{to}{name}"), Var::from_tensor(&tensor)?);
        }
    }
    let tokens = Var::from_tensor(fixture.get("input.image_tokens"))?;
    parameters.insert("image_tokens", tokens.clone());
    let weights = Weights::trainable(&parameters, 0, fixture.1, &Device::Cpu);
    let before = parameters.len();
    let kv_config = KvEncoderConfig { encoder_lora_rank: 2, kv_lora_rank: 2, blocks: vec![] };
    let kv_encoder = KvEncoder::load(&kv_config, &unet, &weights)?;
    let ip_adapter = IpAdapter::load(&unet, &weights.pp("ip_adapter"))?;
    assert_eq!(parameters.len(), before, "every tensor the encoder needs is in the fixture, under its name");

    let lcm_tensors = fixture.below("lcm_lora.");
    let shapes = UNet::shapes(&config())?;
    let lcm_layers = lcm_tensors.keys().filter_map(|name| {
        let path = name.strip_suffix(".lora_A.weight")?;
        Some((path.to_string(), shapes[&format!("{path}.weight")].clone()))
    });
    let lcm_lora = LoraSet::load(&lcm_layers.collect(), 2, &Weights::frozen("fixture", lcm_tensors.clone()))?;
    assert_eq!(lcm_lora.len() * 2, lcm_tensors.len());

    let schedule = NoiseSchedule::sdxl();
    let timesteps: Vec<usize> =
        fixture.get("input.timesteps").to_vec1::<i64>()?.into_iter().map(|t| t as usize).collect();
    let noise = fixture.get("input.noise");
    let noised = Var::from_tensor(&schedule.add_noise(fixture.get("input.latents"), noise, &timesteps)?)?;
    parameters.insert("noised_latents", noised.clone());
    let noised = noised.into_inner();
    let noised_conditioning = schedule.add_noise(fixture.get("input.conditioning_latents"), noise, &timesteps)?;

    let encoder_text = fixture.conditioning("input.encoder_text_embeddings", "input.encoder_pooled")?;
    let reference = kv_encoder.encode(
        &unet,
        &noised_conditioning,
        &timesteps,
        &encoder_text,
        &Pass { recompute, ..Pass::default() },
    )?;
    let image_tokens = ImageTokens { key_values: ip_adapter.project(tokens.as_tensor())?, scale: 1.0 };
    let first = "down_blocks.1.attentions.0.transformer_blocks.0";
    let last = "up_blocks.1.attentions.1.transformer_blocks.0";
    let (first, last) = (reference.get(first).cloned().unwrap(), reference.get(last).cloned().unwrap());

    let text = fixture.conditioning("input.text_embeddings", "input.pooled")?;
    let pass = Pass { reference: Some(reference), image_tokens: Some(image_tokens), recompute, ..Pass::default() };
    let noise_prediction = unet.forward(&noised, &timesteps, &text, &pass)?;
    let loss_a = (&noise_prediction - noise)?.sqr()?.mean_all()?;

    let pass = Pass { loras: Loras::one(&lcm_lora, 0.6), ..pass };
    let lcm_prediction = unet.forward(&noised, &timesteps, &text, &pass)?;
    let x0 = preview(&schedule, &noised, &lcm_prediction, &timesteps, PreviewForm::Equation3)?;
    let loss_b = ((&x0 - fixture.get("input.target"))?.sqr()?.mean_all()? * 0.5)?;

    let loss = (&loss_a + &loss_b)?;
    let values = BTreeMap::from([
        ("output.noised_latents", noised),
        ("output.kv.down_blocks.1.attentions.0.transformer_blocks.0.key", first.0),
        ("output.kv.down_blocks.1.attentions.0.transformer_blocks.0.value", first.1),
        ("output.kv.up_blocks.1.attentions.1.transformer_blocks.0.key", last.0),
        ("output.kv.up_blocks.1.attentions.1.transformer_blocks.0.value", last.1),
        ("output.noise_prediction", noise_prediction),
        ("output.lcm_noise_prediction", lcm_prediction),
        ("output.x0", x0),
        ("output.loss_a", loss_a.reshape(1)?),
        ("output.loss_b", loss_b.reshape(1)?),
    ]);
    Ok(Step { parameters, values, loss })
}

/// What we compute in, and the largest relative error.
const KINDS: [(DType, f64); 2] = [(DType::F64, 1e-6), (DType::F32, 1e-4)];

#[test]
fn every_value_of_the_step_equals_pytorchs() -> Result<()> {
    for (dtype, limit) in KINDS {
        let fixture = Fixture::open_as(dtype)?;
        let mut worst = 0.0f64;
        for (name, value) in step(&fixture, false)?.values {
            let error = relative_error(&value, fixture.get(name))?;
            assert!(error < limit, "{name} ({dtype:?}): relative error {error:.2e}");
            worst = worst.max(error);
        }
        println!("values in {dtype:?}: worst relative error {worst:.2e}");
    }
    Ok(())
}

#[test]
fn every_gradient_of_the_step_equals_pytorchs() -> Result<()> {
    for (dtype, limit) in KINDS {
        let fixture = Fixture::open_as(dtype)?;
        let step = step(&fixture, false)?;
        let gradients = step.loss.backward()?;
        let (mut compared, mut worst) = (0, 0.0f64);
        for (name, expected) in fixture.below("grad.") {
            let ours = name.replacen("kv_lora.", "encoder.", 1).replacen("extract_lora.", "export.", 1);
            let variable = step.parameters.get(&ours).unwrap_or_else(|| panic!("no parameter {ours}"));
            let found = gradients.get(&variable).unwrap_or_else(|| panic!("no gradient for {ours}"));
            let error = relative_error(found, &expected)?;
            assert!(error < limit, "{name} ({dtype:?}): relative error {error:.2e}");
            worst = worst.max(error);
            compared += 1;
        }
        let without = step.parameters.all().iter().filter(|(_, v)| gradients.get(v).is_none()).count();
        assert_eq!(compared + without, step.parameters.len());
        println!(
            "{compared} gradients in {dtype:?}: worst relative error {worst:.2e}; {without} parameters take no part"
        );
    }
    Ok(())
}

#[test]
fn recomputation_changes_no_gradient() -> Result<()> {
    let fixture = Fixture::open()?;
    let (plain, recomputed) = (step(&fixture, false)?, step(&fixture, true)?);
    let (a, b) = (plain.loss.backward()?, recomputed.loss.backward()?);
    for ((name, first), (_, second)) in plain.parameters.all().iter().zip(recomputed.parameters.all()) {
        match (a.get(first), b.get(&second)) {
            (Some(first), Some(second)) => {
                let error = relative_error(second, first)?;
                assert!(error < 1e-12, "{name}: relative error {error:.2e}");
            }
            (None, None) => {}
            (first, second) => panic!("{name}: {} without, {} with", first.is_some(), second.is_some()),
        }
    }
    Ok(())
}

#[test]
fn no_frozen_weight_holds_a_gradient() -> Result<()> {
    let fixture = Fixture::open()?;
    let step = step(&fixture, false)?;
    let gradients = step.loss.backward()?;
    let frozen: Vec<&[usize]> =
        fixture.0.iter().filter(|(n, _)| n.starts_with("unet.")).map(|(_, t)| t.dims()).collect();
    assert!(!frozen.is_empty());
    // The weights the U-Net holds are private copies; a gradient for one would show as a leaf that is no parameter.
    let leaves = step.loss.sorted_nodes().into_iter().filter(|node| node.is_variable()).count();
    let known = step.parameters.all().iter().filter(|(_, variable)| gradients.get(variable).is_some()).count();
    assert_eq!(leaves, known);
    Ok(())
}

use candle_core::{DType, Device, Tensor, Var};

use super::*;
use crate::autograd::recomputations;
use crate::nn::{LoraSet, Loras, Parameters};
use crate::ops::TokenSelection;
use crate::random::Address;

fn tiny() -> Config {
    Config {
        block_out_channels: vec![4, 8],
        layers_per_block: 1,
        transformer_layers_per_block: vec![0, 1],
        attention_heads: vec![1, 2],
        cross_attention_dim: 6,
        norm_num_groups: 2,
        addition_time_embed_dim: 4,
        pooled_dim: 5,
        ..Config::mini()
    }
}

fn normal(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(3, purpose).normal(shape, DType::F64, &Device::Cpu)
}

/// A frozen U-Net with random weights.
fn frozen(config: &Config) -> Result<UNet> {
    let parameters = Parameters::new();
    UNet::load(config, &Weights::trainable(&parameters, 1, DType::F64, &Device::Cpu))?;
    let tensors = parameters.all().into_iter().map(|(name, variable)| (name, variable.as_tensor().detach())).collect();
    UNet::load(config, &Weights::frozen("random", tensors))
}

fn conditioning(config: &Config, batch: usize) -> Result<Conditioning> {
    let text = normal("text", &[batch, 3, config.cross_attention_dim])?;
    Ok(Conditioning::square(text, normal("pooled", &[batch, config.pooled_dim])?, 64))
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f64>()?)
}

#[test]
fn sdxl_has_the_published_number_of_tensors_and_parameters() -> Result<()> {
    let shapes = UNet::shapes(&Config::sdxl())?;
    assert_eq!(shapes.len(), 1680);
    assert_eq!(shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>(), 2_567_463_684);
    assert_eq!(shapes["up_blocks.0.resnets.2.conv_shortcut.weight"], [1280, 1920, 1, 1]);
    assert_eq!(shapes["add_embedding.linear_1.weight"], [1280, 2816]);
    Ok(())
}

#[test]
fn block_names_come_in_the_order_of_execution() -> Result<()> {
    let names = frozen(&tiny())?.block_names();
    assert_eq!(
        names,
        [
            "down_blocks.1.attentions.0.transformer_blocks.0",
            "mid_block.attentions.0.transformer_blocks.0",
            "up_blocks.0.attentions.0.transformer_blocks.0",
            "up_blocks.0.attentions.1.transformer_blocks.0",
        ]
    );
    Ok(())
}

#[test]
fn a_reference_changes_only_the_blocks_it_names() -> Result<()> {
    let unet = frozen(&tiny())?;
    let (latents, text) = (normal("latents", &[1, 4, 4, 4])?, conditioning(unet.config(), 1)?);
    let record = |blocks: Vec<String>| {
        let recording = Recording { blocks, ..Recording::default() };
        unet.record(&latents, &[500], &text, &Pass::default(), &recording)
    };
    let all = record(vec![])?;
    assert_eq!(all.len(), 4);
    let middle = record(vec!["mid_block".into()])?;
    assert_eq!(
        middle.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        ["mid_block.attentions.0.transformer_blocks.0"]
    );
    let run =
        |reference: Option<KeyValues>| unet.forward(&latents, &[20], &text, &Pass { reference, ..Pass::default() });
    let (plain, restricted, extended) = (run(None)?, run(Some(middle))?, run(Some(all))?);
    assert!(distance(&plain, &restricted)? > 1e-6);
    assert!(distance(&restricted, &extended)? > 1e-6);
    assert_eq!(distance(&plain, &run(Some(KeyValues::default()))?)?, 0.0);
    Ok(())
}

#[test]
fn recorded_tokens_are_those_selected_of_all() -> Result<()> {
    let unet = frozen(&tiny())?;
    let (latents, text) = (normal("latents", &[2, 4, 4, 8])?, conditioning(unet.config(), 2)?);
    let record = |kept| {
        let recording = Recording { kept, ..Recording::default() };
        unet.record(&latents, &[500, 20], &text, &Pass::default(), &recording)
    };
    let all = record(BTreeMap::new())?;
    let tokens = unet.block_tokens(4, 8);
    assert_eq!(tokens.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), unet.block_names());
    for (name, tokens) in &tokens {
        assert_eq!(all.get(name).unwrap().0.dim(1)?, *tokens, "{name}");
    }
    let (name, tokens) = &tokens[1];
    let selection = TokenSelection::new(vec![0, 2, 3], *tokens, &Device::Cpu)?;
    let some = record(BTreeMap::from([(name.clone(), selection)]))?;
    let rows = Tensor::new(&[0u32, 2, 3], &Device::Cpu)?;
    for (block, (key, value)) in all.iter() {
        let expected = |all: &Tensor| if block == name { all.index_select(&rows, 1) } else { Ok(all.clone()) };
        let (some_key, some_value) = some.get(block).unwrap();
        assert!(distance(&expected(key)?, some_key)? < 1e-12, "{block}");
        assert!(distance(&expected(value)?, some_value)? < 1e-12, "{block}");
    }
    Ok(())
}

#[test]
fn a_beginning_of_a_name_matches_whole_parts_only() {
    let recording = Recording { blocks: vec!["down_blocks.1".into()], ..Recording::default() };
    assert!(recording.includes("down_blocks.1.attentions.0.transformer_blocks.0"));
    assert!(!recording.includes("down_blocks.10.attentions.0.transformer_blocks.0"));
}

#[test]
fn a_recording_of_no_block_is_an_error_that_lists_the_blocks() -> Result<()> {
    let unet = frozen(&tiny())?;
    let (latents, text) = (normal("latents", &[1, 4, 4, 4])?, conditioning(unet.config(), 1)?);
    let recording = Recording { blocks: vec!["middle".into()], ..Recording::default() };
    let error = unet.record(&latents, &[5], &text, &Pass::default(), &recording).unwrap_err().to_string();
    assert!(error.contains("mid_block.attentions.0") && error.contains("middle"), "{error}");
    Ok(())
}

#[test]
fn a_lora_counts_with_its_scale_on_linear_layers_and_convolutions() -> Result<()> {
    let unet = frozen(&tiny())?;
    let shapes = UNet::shapes(unet.config())?;
    let layers = shapes.iter().filter(|(_, shape)| shape.len() >= 2);
    let layers = layers.map(|(name, shape)| (name.trim_end_matches(".weight").to_string(), shape.clone())).collect();
    let parameters = Parameters::new();
    let weights = Weights::trainable(&parameters, 2, DType::F64, &Device::Cpu);
    let lora = LoraSet::load(&layers, 2, &weights)?;
    let (latents, text) = (normal("latents", &[1, 4, 4, 4])?, conditioning(unet.config(), 1)?);
    let run =
        |scale: f64| unet.forward(&latents, &[20], &text, &Pass { loras: Loras::one(&lora, scale), ..Pass::default() });
    let plain = unet.forward(&latents, &[20], &text, &Pass::default())?;
    assert_eq!(distance(&plain, &run(1.0)?)?, 0.0, "a fresh LoRA changes nothing");
    for (name, variable) in parameters.all() {
        if name.contains("lora_B") {
            variable.set(&(Address::new(8, "up").normal(variable.shape(), DType::F64, &Device::Cpu)? * 0.1)?)?;
        }
    }
    assert_eq!(distance(&plain, &run(0.0)?)?, 0.0);
    assert!(distance(&run(0.5)?, &run(1.0)?)? > 1e-4);
    let gradients = run(1.0)?.sqr()?.mean_all()?.backward()?;
    let missing: Vec<String> =
        parameters.all().into_iter().filter(|(_, v)| gradients.get(v).is_none()).map(|(name, _)| name).collect();
    assert!(missing.is_empty(), "no gradient for {missing:?}");
    Ok(())
}

#[test]
fn samples_of_a_batch_do_not_see_each_other() -> Result<()> {
    let unet = frozen(&tiny())?;
    let (latents, text) = (normal("latents", &[2, 4, 4, 8])?, conditioning(unet.config(), 2)?);
    let both = unet.forward(&latents, &[20, 700], &text, &Pass::default())?;
    for (i, t) in [20, 700].into_iter().enumerate() {
        let alone = unet.forward(&latents.narrow(0, i, 1)?, &[t], &text.narrow(i, 1)?, &Pass::default())?;
        assert!(distance(&both.narrow(0, i, 1)?, &alone)? < 1e-12);
    }
    Ok(())
}

#[test]
fn wrong_sizes_are_named() -> Result<()> {
    let unet = frozen(&tiny())?;
    let text = conditioning(unet.config(), 1)?;
    for (shape, timesteps, expected) in [
        ([1, 4, 5, 4], vec![1], "divisible by 2"),
        ([1, 3, 4, 4], vec![1], "(batch, 4"),
        ([1, 4, 4, 4], vec![], "one a sample"),
    ] {
        let error = unet.forward(&normal("x", &shape)?, &timesteps, &text, &Pass::default()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    Ok(())
}

#[test]
fn all_weights_can_be_trained() -> Result<()> {
    let parameters = Parameters::new();
    let unet = UNet::load(&tiny(), &Weights::trainable(&parameters, 1, DType::F64, &Device::Cpu))?;
    let (latents, text) = (normal("latents", &[1, 4, 4, 4])?, conditioning(unet.config(), 1)?);
    let loss = |unet: &UNet| -> Result<Tensor> {
        Ok(unet.forward(&latents, &[300], &text, &Pass::default())?.sqr()?.mean_all()?)
    };
    let gradients = loss(&unet)?.backward()?;
    let mut checked = 0;
    for (name, variable) in parameters.all() {
        let gradient = gradients.get(&variable).unwrap_or_else(|| panic!("no gradient for {name}"));
        // One random direction in every tensor, against a central difference.
        // Of unit length: the error of the difference grows with the cube of the distance walked.
        let direction = Address::new(4, "direction").normal(variable.shape(), DType::F64, &Device::Cpu)?;
        let length = direction.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt();
        let direction = (direction / length)?;
        let value = variable.as_tensor().detach().copy()?;
        let at = |step: f64, variable: &Var| -> Result<f64> {
            variable.set(&(&value + (&direction * step)?)?)?;
            Ok(loss(&unet)?.to_scalar::<f64>()?)
        };
        let numeric = (at(1e-5, &variable)? - at(-1e-5, &variable)?) / 2e-5;
        variable.set(&value)?;
        let analytic = (gradient * direction)?.sum_all()?.to_scalar::<f64>()?;
        assert!((analytic - numeric).abs() < 1e-6 * numeric.abs().max(1e-3), "{name}: {analytic} and {numeric}");
        checked += 1;
    }
    assert_eq!(checked, UNet::shapes(&tiny())?.len());
    Ok(())
}

#[test]
fn recomputed_segments_run_on_the_tape_alone_and_give_the_same_gradients() -> Result<()> {
    let config = tiny();
    let unet = frozen(&config)?;
    let layers = UNet::shapes(&config)?.into_iter().filter(|(_, shape)| shape.len() >= 2);
    let layers = layers.map(|(name, shape)| (name.trim_end_matches(".weight").to_string(), shape)).collect();
    let parameters = Parameters::new();
    let lora = LoraSet::load(&layers, 2, &Weights::trainable(&parameters, 2, DType::F64, &Device::Cpu))?;
    for (_, variable) in parameters.all() {
        let value = Address::new(8, "lora").normal(variable.shape(), DType::F64, &Device::Cpu)?;
        variable.set(&(value * 0.1)?)?;
    }
    let (latents, text) = (Var::from_tensor(&normal("latents", &[2, 4, 4, 4])?)?, conditioning(&config, 2)?);
    let mut gradients = Vec::new();
    let before = recomputations();
    for (recompute, keep_attention, whole) in [
        (false, false, false),
        (true, false, false),
        (true, true, false),
        (false, false, true),
        (true, false, true),
        (true, true, true),
    ] {
        let pass = Pass { loras: Loras::one(&lora, 0.7), recompute, keep_attention, ..Pass::default() };
        let loss = || {
            let reference = unet.record(&latents, &[500, 20], &text, &pass, &Recording::default())?;
            let pass = Pass { reference: Some(reference), ..pass.clone() };
            Ok(unet.forward(&latents, &[20, 700], &text, &pass)?.sqr()?.mean_all()?)
        };
        // `autograd::gradients` makes one function of each of the two passes.
        gradients.push(match whole {
            true => crate::autograd::gradients(|| loss().map(Some))?.unwrap(),
            false => loss()?.backward()?,
        });
    }
    let after = recomputations();
    // Eight resnets in two parts each and four transformers in three; the recording ends in the last block, before its
    // transformer's end and the last two resnets.
    assert_eq!(after.on_graph, before.on_graph);
    assert_eq!(after.on_tape - before.on_tape, 4 * (28 + 23));
    let mut all = parameters.all();
    all.push(("latents".into(), latents.clone()));
    for (name, variable) in all {
        let of = |i: usize| gradients[i].get(&variable).unwrap_or_else(|| panic!("no gradient for {name}"));
        let size = of(0).abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(size > 0.0, "{name}");
        for i in 1..gradients.len() {
            assert!(distance(of(0), of(i))? < 1e-12 * size.max(1e-3), "{name}, {i}");
        }
        assert_eq!(distance(of(1), of(2))?, 0.0, "{name}");
    }
    let whole = crate::autograd::tape::record(&[latents.as_tensor().clone()], |x| {
        Ok(vec![unet.forward(&x[0], &[20, 700], &text, &Pass { recompute: true, ..Pass::default() })?])
    });
    assert!(whole.is_ok(), "a pass uses an operation of candle's own");
    Ok(())
}

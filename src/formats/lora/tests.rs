//! What follows from names and shapes alone; files that Python wrote are read in `tests/formats.rs`.

use super::*;

/// The layers that the published LCM-LoRA for SDXL adapts: diffusers' training script names them by these endings.
const LCM_TARGETS: [&str; 14] = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
];

fn sdxl() -> Result<(unet::Config, BTreeMap<String, Vec<usize>>)> {
    let config = unet::Config::sdxl();
    let shapes = unet::UNet::shapes(&config)?;
    Ok((config, shapes))
}

#[test]
fn the_788_modules_of_lcm_lora_sdxl_each_find_their_layer() -> Result<()> {
    let (config, shapes) = sdxl()?;
    let paths = Paths::of(&config, &shapes);
    let layers: Vec<&str> = shapes.keys().filter_map(|name| name.strip_suffix(".weight")).collect();
    let targets: Vec<&str> = layers
        .into_iter()
        .filter(|path| LCM_TARGETS.iter().any(|target| path.ends_with(&format!(".{target}"))))
        .collect();
    assert_eq!(targets.len(), 788);
    for path in targets {
        for name in [path.replace('.', "_"), stability_name(&config, path)] {
            for (ending, part) in
                [("lora_down.weight", Part::Down), ("lora_up.weight", Part::Up), ("alpha", Part::Alpha)]
            {
                let key = keys::parse(&format!("lora_unet_{name}.{ending}")).unwrap();
                assert_eq!((key.component, key.part), (Component::UNet, part));
                assert_eq!(paths.resolve(&key.module), Some(path));
            }
        }
    }
    Ok(())
}

fn stability_name(config: &unet::Config, path: &str) -> String {
    paths::stability_path(config, path).replace('.', "_")
}

#[test]
fn no_two_layers_of_sdxl_share_a_name() -> Result<()> {
    let (config, shapes) = sdxl()?;
    let layers: Vec<&str> = shapes
        .iter()
        .filter(|(_, shape)| shape.len() >= 2)
        .filter_map(|(name, _)| name.strip_suffix(".weight"))
        .collect();
    let names: std::collections::BTreeSet<String> =
        layers.iter().flat_map(|path| [path.replace('.', "_"), stability_name(&config, path)]).collect();
    // No layer goes by the same name in both: even conv_in and conv_out differ.
    assert_eq!(names.len(), 2 * layers.len());
    Ok(())
}

#[test]
fn stability_counts_the_blocks_through() {
    let config = unet::Config::sdxl();
    for (path, expected) in [
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2", "input_blocks.8.1.transformer_blocks.9.ff.net.2"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.resnets.2.conv_shortcut", "output_blocks.5.0.skip_connection"),
        ("up_blocks.2.resnets.2.conv2", "output_blocks.8.0.out_layers.3"),
        ("conv_out", "out.2"),
    ] {
        assert_eq!(paths::stability_path(&config, path), expected);
    }
}

#[test]
fn every_form_of_a_name_is_taken_apart() {
    let layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0";
    let attention = layer.strip_suffix(".to_out.0").unwrap();
    for name in [
        format!("base_model.model.{layer}.lora_A.weight"),
        format!("base_model.model.unet.{layer}.lora_A.weight"),
        format!("unet.base_model.model.{layer}.lora_A.weight"),
        format!("unet.{layer}.lora_A.weight"),
        format!("{layer}.lora_A.default.weight"),
        format!("unet.{layer}.lora.down.weight"),
        format!("unet.{attention}.processor.to_out_lora.down.weight"),
        format!("{attention}.processor.to_out_lora.down.weight"),
    ] {
        let key = keys::parse(&name).unwrap();
        assert_eq!((key.component, key.module.as_str(), key.part), (Component::UNet, layer, Part::Down), "{name}");
    }
    for name in ["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "text_encoder_2.a.lora_linear_layer.up.weight"] {
        assert_eq!(keys::parse(name).unwrap().component, Component::TextEncoder);
    }
    for name in ["lora_unet_x.dora_scale", "lora_unet_x.hada_w1_a", "lora_unet_x.lora_mid.weight", "x.weight"] {
        assert_eq!(keys::parse(name), None, "{name}");
    }
}

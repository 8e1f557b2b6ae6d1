//! The names that files give the layers of a U-Net.

use std::collections::{BTreeMap, HashMap};

use crate::models::unet::Config;

/// The layers of a U-Net that can have a LoRA, by every name they go by.
pub(super) struct Paths {
    layers: HashMap<String, String>,
}

impl Paths {
    /// Names for the linear and convolution layers of a U-Net, given its tensors.
    pub fn of(config: &Config, shapes: &BTreeMap<String, Vec<usize>>) -> Self {
        let weights = shapes.iter().filter(|(_, shape)| shape.len() >= 2);
        let paths = weights.filter_map(|(name, _)| name.strip_suffix(".weight"));
        let mut layers = HashMap::new();
        for path in paths {
            let stability = stability_path(config, path);
            for alias in [path.to_string(), path.replace('.', "_"), stability.replace('.', "_"), stability] {
                layers.insert(alias, path.to_string());
            }
        }
        Paths { layers }
    }

    /// The path that diffusers gives a layer.
    pub fn resolve(&self, name: &str) -> Option<&str> {
        self.layers.get(name).map(String::as_str)
    }
}

/// The path of a layer in Stability's own code (`input_blocks.4.1.transformer_blocks.0...`), by which kohya names the
/// layers of SDXL.
pub(super) fn stability_path(config: &Config, path: &str) -> String {
    let layers = config.layers_per_block;
    let levels = config.transformer_layers_per_block.len();
    let parts: Vec<&str> = path.split('.').collect();
    let number = |i: usize| parts.get(i).and_then(|part| part.parse::<usize>().ok()).unwrap_or(0);
    let rest = |from: usize| parts.get(from..).unwrap_or_default().join(".");
    let in_resnet = |from: usize| match rest(from).as_str() {
        "conv1" => "in_layers.2".to_string(),
        "conv2" => "out_layers.3".to_string(),
        "time_emb_proj" => "emb_layers.1".to_string(),
        "conv_shortcut" => "skip_connection".to_string(),
        other => other.to_string(),
    };
    match (parts[0], parts.get(2).copied()) {
        ("down_blocks", Some(kind)) => {
            let first = (layers + 1) * number(1) + 1;
            match kind {
                "resnets" => format!("input_blocks.{}.0.{}", first + number(3), in_resnet(4)),
                "attentions" => format!("input_blocks.{}.1.{}", first + number(3), rest(4)),
                _ => format!("input_blocks.{}.0.op", first + layers),
            }
        }
        ("up_blocks", Some(kind)) => {
            let first = (layers + 1) * number(1);
            let level = (levels - 1).saturating_sub(number(1));
            match kind {
                "resnets" => format!("output_blocks.{}.0.{}", first + number(3), in_resnet(4)),
                "attentions" => format!("output_blocks.{}.1.{}", first + number(3), rest(4)),
                _ => {
                    let behind = if config.transformer_layers_per_block[level] > 0 { 2 } else { 1 };
                    format!("output_blocks.{}.{behind}.{}", first + layers, rest(4))
                }
            }
        }
        ("mid_block", Some(_)) if parts[1] == "resnets" => {
            format!("middle_block.{}.{}", 2 * number(2), in_resnet(3))
        }
        ("mid_block", Some(_)) => format!("middle_block.1.{}", rest(3)),
        _ => match path {
            "conv_in" => "input_blocks.0.0".into(),
            "conv_out" => "out.2".into(),
            "time_embedding.linear_1" => "time_embed.0".into(),
            "time_embedding.linear_2" => "time_embed.2".into(),
            "add_embedding.linear_1" => "label_emb.0.0".into(),
            "add_embedding.linear_2" => "label_emb.0.2".into(),
            other => other.into(),
        },
    }
}

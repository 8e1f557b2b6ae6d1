//! Where peft and diffusers keep alpha: not among the tensors, but beside them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::super::tensor_file::{TensorFile, format_error, read_text};
use crate::Result;

/// peft's `adapter_config.json`, as much of it as says what the tensors mean.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct PeftConfig {
    pub r: usize,
    pub lora_alpha: f64,
    pub rank_pattern: BTreeMap<String, usize>,
    pub alpha_pattern: BTreeMap<String, f64>,
    pub use_rslora: bool,
    pub use_dora: bool,
    pub lora_bias: bool,
    pub fan_in_fan_out: bool,
}

/// The alpha of every layer whose tensors do not say it.
#[derive(Debug, Default)]
pub(super) struct Alphas {
    config: Option<PeftConfig>,
}

impl Alphas {
    /// Reads `adapter_config.json` beside the file, or the notes that diffusers leaves in the file itself.
    pub fn of(file: &TensorFile) -> Result<Self> {
        let beside = file.path().with_file_name("adapter_config.json");
        let is_peft = file.path().file_name().is_some_and(|name| name.to_string_lossy().starts_with("adapter_model."));
        let (source, mut config) = match file.metadata().get("lora_adapter_metadata") {
            Some(text) => (file.path().to_path_buf(), parse(file.path(), text)?),
            None if is_peft && beside.is_file() => {
                let text = read_text(&beside, 1 << 20)?;
                let value = parse(&beside, &text)?;
                (beside, value)
            }
            None => return Ok(Alphas { config: None }),
        };
        // Of a pipeline's notes, those of the U-Net.
        let of_unet: serde_json::Map<String, serde_json::Value> = config
            .iter()
            .filter_map(|(key, value)| Some((key.strip_prefix("unet.")?.to_string(), value.clone())))
            .collect();
        if !of_unet.is_empty() {
            config = of_unet;
        }
        // Patterns that are null or absent are empty.
        config.retain(|_, value| !value.is_null());
        let config: PeftConfig = serde_json::from_value(serde_json::Value::Object(config))
            .map_err(|error| format_error(&source, format!("not the configuration of a LoRA: {error}")))?;
        for (field, set) in
            [("use_dora", config.use_dora), ("lora_bias", config.lora_bias), ("fan_in_fan_out", config.fan_in_fan_out)]
        {
            if set {
                return Err(format_error(&source, format!("`{field}` is set: this kind of LoRA is not supported")));
            }
        }
        Ok(Alphas { config: (config.r > 0).then_some(config) })
    }

    /// The alpha of a layer of this rank. Without notes it is the rank: a scale of one, as diffusers takes it.
    pub fn alpha(&self, path: &str, rank: usize) -> f64 {
        let Some(config) = &self.config else { return rank as f64 };
        // peft lets a pattern be the end of a path, as a regular expression: paths as they are written here match so.
        let matches = |pattern: &str| {
            let pattern = pattern.trim_start_matches('^').trim_end_matches('$').replace("\\.", ".");
            let pattern = pattern.strip_prefix("base_model.model.").unwrap_or(&pattern);
            path == pattern || path.strip_suffix(pattern).is_some_and(|rest| rest.ends_with('.'))
        };
        let special = config.alpha_pattern.iter().find(|(pattern, _)| matches(pattern)).map(|(_, alpha)| *alpha);
        let alpha = special.unwrap_or(config.lora_alpha);
        // rsLoRA divides by the root of the rank instead of the rank.
        if config.use_rslora { alpha * (rank as f64).sqrt() } else { alpha }
    }
}

fn parse(path: &std::path::Path, text: &str) -> Result<serde_json::Map<String, serde_json::Value>> {
    serde_json::from_str(text)
        .map_err(|error| format_error(path, format!("the configuration of a LoRA is no JSON object: {error}")))
}

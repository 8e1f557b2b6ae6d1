//! Writing a LoRA in each form.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::super::safetensors;
use super::LoraFile;
use super::paths::stability_path;
use crate::models::unet;
use crate::nn::LoraTensors;
use crate::{Error, Result};

/// The forms in which a LoRA can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A folder with `adapter_model.safetensors` and `adapter_config.json`, for `peft.PeftModel.from_pretrained`.
    Peft,
    /// One file with peft's names behind `unet.`, and ranks and alphas in its notes, for `load_lora_weights`.
    Diffusers,
    /// `unet.<path>.lora.down.weight`, as diffusers wrote before peft. It has no place for alpha, which is multiplied
    /// into the tensors.
    DiffusersOld,
    /// kohya, blocks named as diffusers names them.
    Kohya,
    /// kohya, blocks named as Stability's code names them.
    KohyaStability,
}

impl LoraFile {
    /// Writes the LoRA; `unet` is the U-Net it belongs to. Returns the file that holds the tensors.
    ///
    /// # Errors
    /// [`Error::Io`] where the file or folder cannot be written.
    pub fn save(&self, path: impl AsRef<Path>, layout: Layout, unet: &unet::Config) -> Result<PathBuf> {
        let path = path.as_ref();
        let (mut tensors, mut metadata) = (BTreeMap::new(), BTreeMap::new());
        for (layer, LoraTensors { down, up, alpha }) in &self.layers {
            let mut put = |name: String, tensor: &Tensor| tensors.insert(name, tensor.clone());
            match layout {
                Layout::Peft | Layout::Diffusers => {
                    let prefix = if layout == Layout::Peft { "base_model.model." } else { "unet." };
                    put(format!("{prefix}{layer}.lora_A.weight"), down);
                    put(format!("{prefix}{layer}.lora_B.weight"), up);
                }
                Layout::DiffusersOld => {
                    let scale = alpha / down.dim(0)?.max(1) as f64;
                    put(format!("unet.{layer}.lora.down.weight"), down);
                    put(format!("unet.{layer}.lora.up.weight"), &(up * scale)?);
                }
                Layout::Kohya | Layout::KohyaStability => {
                    let name = match layout {
                        Layout::Kohya => layer.clone(),
                        _ => stability_path(unet, layer),
                    };
                    let name = format!("lora_unet_{}", name.replace('.', "_"));
                    put(format!("{name}.lora_down.weight"), down);
                    put(format!("{name}.lora_up.weight"), up);
                    put(format!("{name}.alpha"), &Tensor::new(*alpha, &Device::Cpu)?.to_dtype(DType::F32)?);
                }
            }
        }
        let file = match layout {
            Layout::Peft => path.join("adapter_model.safetensors"),
            _ => path.to_path_buf(),
        };
        if layout == Layout::Diffusers {
            let notes = self.config().into_iter().map(|(key, value)| (format!("unet.{key}"), value));
            let notes = serde_json::Value::Object(notes.collect());
            metadata.insert("lora_adapter_metadata".to_string(), notes.to_string());
        }
        safetensors::write(&file, &tensors, &metadata)?;
        if layout == Layout::Peft {
            let config = serde_json::Value::Object(self.config());
            let place = path.join("adapter_config.json");
            std::fs::write(&place, format!("{config:#}\n")).map_err(Error::io("write", &place))?;
        }
        Ok(file)
    }

    /// peft's configuration of this LoRA: the commonest rank and alpha, and the layers that differ.
    fn config(&self) -> serde_json::Map<String, serde_json::Value> {
        let rank = commonest(self.layers.values().map(LoraTensors::rank));
        let alpha = f64::from_bits(commonest(self.layers.values().map(|layer| layer.alpha.to_bits())));
        let whole = |alpha: f64| match alpha.fract() == 0.0 {
            true => serde_json::json!(alpha as i64),
            false => serde_json::json!(alpha),
        };
        let others = |differs: &dyn Fn(&LoraTensors) -> Option<serde_json::Value>| -> serde_json::Value {
            let layers = self.layers.iter().filter_map(|(path, layer)| Some((path.clone(), differs(layer)?)));
            serde_json::Value::Object(layers.collect())
        };
        let ranks = others(&|layer| (layer.rank() != rank).then(|| layer.rank().into()));
        let alphas = others(&|layer| (layer.alpha != alpha).then(|| whole(layer.alpha)));
        let fields = [
            ("peft_type", serde_json::json!("LORA")),
            ("r", rank.into()),
            ("lora_alpha", whole(alpha)),
            ("rank_pattern", ranks),
            ("alpha_pattern", alphas),
            ("target_modules", self.layers.keys().cloned().collect::<Vec<_>>().into()),
            ("bias", serde_json::json!("none")),
            ("lora_dropout", serde_json::json!(0.0)),
            ("init_lora_weights", serde_json::json!(true)),
            ("inference_mode", serde_json::json!(true)),
        ];
        fields.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
    }
}

fn commonest<T: Copy + Ord + Default>(values: impl Iterator<Item = T>) -> T {
    let mut counts = BTreeMap::<T, usize>::new();
    values.for_each(|value| *counts.entry(value).or_default() += 1);
    counts.into_iter().max_by_key(|(_, count)| *count).map(|(value, _)| value).unwrap_or_default()
}

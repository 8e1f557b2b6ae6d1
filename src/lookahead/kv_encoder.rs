//! The KV encoder (paper, section 4.3): a LoRA-tuned pass of the U-Net over the noised conditioning image, whose
//! self-attention keys and values the denoiser attends to.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::models::unet::{Conditioning, KeyValues, Pass, Recording, UNet};
use crate::nn::{LoraSet, Loras, Weights};

/// The shape of a [`KvEncoder`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvEncoderConfig {
    /// Rank of the LoRA on the attention layers of the encoding pass (4 in the paper); 0 leaves them frozen.
    pub encoder_lora_rank: usize,
    /// Rank of the LoRA on the projections that export keys and values (4 in the official recipe); 0 exports what
    /// `attn1` itself uses, as the paper's text has it.
    pub kv_lora_rank: usize,
    /// Names, or beginnings of names, of the transformer blocks that are extended; empty for all.
    pub blocks: Vec<String>,
}

impl Default for KvEncoderConfig {
    fn default() -> Self {
        KvEncoderConfig { encoder_lora_rank: 4, kv_lora_rank: 4, blocks: Vec::new() }
    }
}

/// The LoRA sets that make a KV encoder of a U-Net.
///
/// Tensors, in peft's naming: `encoder.<block>.attn{1,2}.{to_q,to_k,to_v,to_out.0}.lora_{A,B}.weight` for the encoding
/// pass and `export.<block>.attn1.{to_k,to_v}.lora_{A,B}.weight` for the exported keys and values.
#[derive(Clone, Debug)]
pub struct KvEncoder {
    attention: LoraSet,
    recording: Recording,
}

impl KvEncoder {
    /// Loads, or makes as variables, the LoRA sets for a U-Net.
    ///
    /// The last recorded block has no LoRA in its attention: nothing behind its export is used (69 of SDXL's 70 blocks
    /// have one).
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] for missing or misshapen tensors.
    pub fn load(config: &KvEncoderConfig, unet: &UNet, weights: &Weights) -> Result<Self> {
        let recording = Recording { projections: None, blocks: config.blocks.clone() };
        let names = unet.block_names();
        let last = names.iter().rposition(|name| recording.includes(name)).unwrap_or(0);
        let shapes = UNet::shapes(unet.config())?;
        let targets = |blocks: &[String], layers: &[&str]| -> BTreeMap<String, Vec<usize>> {
            let paths = blocks.iter().flat_map(|block| layers.iter().map(move |layer| format!("{block}.{layer}")));
            paths.filter_map(|path| Some((path.clone(), shapes.get(&format!("{path}.weight"))?.clone()))).collect()
        };
        let attention = match config.encoder_lora_rank {
            0 => LoraSet::default(),
            rank => {
                let layers = [
                    "attn1.to_q",
                    "attn1.to_k",
                    "attn1.to_v",
                    "attn1.to_out.0", //
                    "attn2.to_q",
                    "attn2.to_k",
                    "attn2.to_v",
                    "attn2.to_out.0",
                ];
                LoraSet::load(&targets(&names[..last], &layers), rank, &weights.pp("encoder"))?
            }
        };
        let projections = match config.kv_lora_rank {
            0 => None,
            rank => {
                let recorded: Vec<String> = names.iter().filter(|name| recording.includes(name)).cloned().collect();
                let layers = ["attn1.to_k", "attn1.to_v"];
                Some(LoraSet::load(&targets(&recorded, &layers), rank, &weights.pp("export"))?)
            }
        };
        Ok(KvEncoder { attention, recording: Recording { projections, ..recording } })
    }

    /// The keys and values of the conditioning image.
    ///
    /// `noisy_latents`: `(batch, channels, height, width)`, the conditioning image's latents noised to `timesteps`;
    /// `conditioning`: the prompt that describes the conditioning image ("a photo of a face").
    ///
    /// # Errors
    /// Those of [`UNet::record`].
    pub fn encode(
        &self,
        unet: &UNet,
        noisy_latents: &Tensor,
        timesteps: &[usize],
        conditioning: &Conditioning,
        recompute: bool,
    ) -> Result<KeyValues> {
        let pass = Pass { loras: Loras::one(&self.attention, 1.0), recompute, ..Pass::default() };
        unet.record(noisy_latents, timesteps, conditioning, &pass, &self.recording)
    }
}

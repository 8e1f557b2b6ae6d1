//! The KV encoder (paper, section 4.3): a LoRA-tuned pass of the U-Net over the noised conditioning image, whose
//! self-attention keys and values the denoiser attends to.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::dropout::ReferenceDropout;
use crate::Result;
use crate::models::unet::{Conditioning, KeyValues, Pass, Recording, UNet};
use crate::nn::{LoraSet, Loras, Weights};
use crate::ops::TokenSelection;

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
        let recording = Recording { blocks: config.blocks.clone(), ..Recording::default() };
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
    /// `conditioning`: the prompt that describes the conditioning image ("a photo of a face"); `pass`: which activations
    /// are recomputed, and the like; its LoRA sets give way to the encoder's.
    ///
    /// # Errors
    /// Those of [`UNet::record`].
    pub fn encode(
        &self,
        unet: &UNet,
        noisy_latents: &Tensor,
        timesteps: &[usize],
        conditioning: &Conditioning,
        pass: &Pass,
    ) -> Result<KeyValues> {
        unet.record(noisy_latents, timesteps, conditioning, &self.adapted(pass), &self.recording)
    }

    /// The same with tokens dropped, for training. Blocks that lose all of theirs are not among the result, which is empty
    /// where all do.
    ///
    /// # Errors
    /// Those of [`UNet::record`].
    pub fn encode_dropping(
        &self,
        unet: &UNet,
        noisy_latents: &Tensor,
        timesteps: &[usize],
        conditioning: &Conditioning,
        dropout: &ReferenceDropout,
        pass: &Pass,
    ) -> Result<KeyValues> {
        if dropout.probability <= 0.0 {
            return self.encode(unet, noisy_latents, timesteps, conditioning, pass);
        }
        let (_, _, height, width) = noisy_latents.dims4()?;
        let tokens: BTreeMap<String, usize> = unet.block_tokens(height, width).into_iter().collect();
        let recorded = tokens.into_iter().filter(|(name, _)| self.recording.includes(name));
        let mut recording = Recording { blocks: Vec::new(), ..self.recording.clone() };
        for (block, (name, tokens)) in recorded.enumerate() {
            let kept = dropout.kept(block, tokens);
            if kept.is_empty() {
                continue;
            }
            if kept.len() < tokens {
                recording.kept.insert(name.clone(), TokenSelection::new(kept, tokens, noisy_latents.device())?);
            }
            recording.blocks.push(name);
        }
        // No names would stand for all blocks.
        if recording.blocks.is_empty() {
            return Ok(KeyValues::default());
        }
        unet.record(noisy_latents, timesteps, conditioning, &self.adapted(pass), &recording)
    }

    fn adapted(&self, pass: &Pass) -> Pass {
        Pass { loras: Loras::one(&self.attention, 1.0), ..pass.clone() }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::mini;
    use crate::nn::Parameters;
    use crate::random::Address;

    fn encode(probability: f64) -> Result<(KeyValues, KeyValues)> {
        let base = mini::tiny_base(1, DType::F32, &Device::Cpu)?;
        let weights = Weights::trainable(&Parameters::new(), 1, DType::F32, &Device::Cpu);
        let encoder = KvEncoder::load(&KvEncoderConfig::default(), &base.unet, &weights)?;
        let text = base.conditioning(&["a photo of a face".to_string(), String::new()])?;
        let channels = base.unet.config().in_channels;
        let latents = Address::new(1, "latents").normal((2, channels, 8, 8), DType::F32, &Device::Cpu)?;
        let dropout = ReferenceDropout { probability, address: Address::new(1, "kv") };
        let all = encoder.encode(&base.unet, &latents, &[500, 20], &text, &Pass::default())?;
        Ok((all, encoder.encode_dropping(&base.unet, &latents, &[500, 20], &text, &dropout, &Pass::default())?))
    }

    #[test]
    fn dropping_leaves_some_tokens_as_they_are_and_the_same_ones_of_keys_and_values() -> Result<()> {
        let (all, some) = encode(0.4)?;
        let dropout = ReferenceDropout { probability: 0.4, address: Address::new(1, "kv") };
        let mut dropped = 0;
        for (block, (name, (key, value))) in all.iter().enumerate() {
            let kept = dropout.kept(block, key.dim(1)?);
            dropped += key.dim(1)? - kept.len();
            let rows = Tensor::new(kept, &Device::Cpu)?;
            let (some_key, some_value) = some.get(name).unwrap();
            for (all, some) in [(key, some_key), (value, some_value)] {
                let difference = (all.index_select(&rows, 1)? - some)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(difference < 1e-5, "{name}: {difference}");
            }
        }
        assert!(dropped > 0);
        Ok(())
    }

    #[test]
    fn dropping_all_tokens_leaves_no_reference_and_dropping_none_all() -> Result<()> {
        assert!(encode(1.0)?.1.is_empty());
        let (all, none_dropped) = encode(0.0)?;
        assert_eq!(all.len(), none_dropped.len());
        Ok(())
    }
}

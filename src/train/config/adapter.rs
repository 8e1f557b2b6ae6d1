//! What is trained.

use serde::{Deserialize, Serialize};

use super::check::Checker;
use crate::Result;

/// What is trained, and how the conditioning picture reaches the denoiser.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// Whether the encoder has a KV branch (paper section 4.3). Default true; without it the adapter alone is trained, as
    /// in the first rows of the paper's ablation (table 2), and the ranks play no part.
    pub kv_branch: bool,
    /// Rank of the LoRA on the KV encoder's attentions. Default 4 (paper section 4.5); 0 leaves them frozen; at most
    /// 1024.
    pub encoder_lora_rank: usize,
    /// Rank of the LoRA on the projections that make the exported keys and values. Default 0: they are recorded straight
    /// from the self-attention, as the paper's text has it. Official code 4: projections of their own, which start as
    /// copies. At most 1024.
    pub kv_lora_rank: usize,
    /// Whether the resampler and the image key/value projections are trained. Default true (paper section 4.5; official
    /// option `optimize_adapter`).
    pub optimize_adapter: bool,
    /// Weight of the attention to the image tokens. Default 1.0 (official option `adapter_attention_scale`); not negative.
    pub adapter_attention_scale: f64,
    /// Whether the KV encoder sees the conditioning latents noised to the same timestep, with the same noise, as the
    /// target. Default true (paper section 4.3; official recipe).
    pub noisy_encoder_input: bool,
    /// Names of transformer blocks, or beginnings of names (`"up_blocks.0"`), whose self-attention is extended with the
    /// recorded keys and values. Default empty: all of them (paper section 4.3).
    pub extended_layers: Vec<String>,
}

impl AdapterConfig {
    pub(super) fn validate(&self, check: &Checker<'_>) -> Result<()> {
        check.at_most("encoder_lora_rank", self.encoder_lora_rank, 1024)?;
        check.at_most("kv_lora_rank", self.kv_lora_rank, 1024)?;
        check.not_negative("adapter_attention_scale", self.adapter_attention_scale)?;
        let named = self.extended_layers.iter().all(|name| !name.is_empty());
        check.require("extended_layers", named, "names that are not empty", "an empty name")?;
        let trains_kv = self.kv_branch && (self.encoder_lora_rank > 0 || self.kv_lora_rank > 0);
        check.require(
            "optimize_adapter",
            trains_kv || self.optimize_adapter,
            "true where there is no KV branch or both LoRA ranks are 0 (nothing would be trained)",
            "false",
        )
    }
}

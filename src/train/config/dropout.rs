//! Conditions dropped at random.

use serde::{Deserialize, Serialize};

use super::check::Checker;
use crate::Result;

/// Conditions dropped at random, so that guidance has something to compare with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DropoutConfig {
    /// Probability per sample that the image tokens are those of an empty picture, in the diffusion loss only. Default
    /// 0.1 (official recipe); 0 to 1.
    pub adapter_drop_chance: f64,
    /// Probability per token and layer that a recorded key/value is dropped, in both losses. Default 0.05 (official
    /// recipe); 0 to 1, where 1 leaves plain self-attention.
    pub kv_drop_chance: f64,
    /// Probability per sample that the prompt is empty, in the diffusion loss only. Default 0 (official recipe, whose
    /// option does not work); 0 to 1.
    pub text_drop_chance: f64,
}

impl DropoutConfig {
    pub(super) fn validate(&self, check: &Checker<'_>) -> Result<()> {
        check.within_range("adapter_drop_chance", self.adapter_drop_chance, 0.0..=1.0)?;
        check.within_range("kv_drop_chance", self.kv_drop_chance, 0.0..=1.0)?;
        check.within_range("text_drop_chance", self.text_drop_chance, 0.0..=1.0)
    }
}

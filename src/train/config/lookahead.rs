//! The lookahead loss.

use serde::{Deserialize, Serialize};

use super::AlignmentConfig;
use super::check::Checker;
use crate::Result;
use crate::lookahead::{LoraScale, PreviewForm, PreviewPath};

/// The lookahead loss (paper section 4.1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LookaheadConfig {
    /// The loss is computed at every k-th iteration. Default 1 (official recipe: `lcm_every_k_steps`); 0 turns it off.
    pub every_k_steps: u64,
    /// How many samples of the batch it is computed on, over all processes. Default 8, all of them (official recipe:
    /// `lcm_batch_size` 4 of 4 per process); 1 to `train_batch_size`.
    pub batch_size: usize,
    /// Weight of the identity loss. Default 1e-3 (official code; the paper gives none); not negative.
    pub identity_weight: f64,
    /// Weight of a perceptual loss between preview and conditioning picture. Default 0 (the paper's loss is identity
    /// only); official code 1e-3, with DreamSim; not negative.
    pub perceptual_weight: f64,
    /// Whether the loss is multiplied by the current scale of the LCM-LoRA. Default false; official code true.
    pub scale_loss_by_lora_scale: bool,
    /// Through which denoiser the loss looks. Default `"lcm"`: with the LCM-LoRA, the paper's method; `"x0"`: without it,
    /// the approximation that the paper's ablation compares with (table 2). There the scale of the LoRA plays no part.
    pub through: PreviewPath,
    /// How the preview is computed. Default `"eq3"` (paper equation 3); official code `"boundary"`.
    pub preview_form: PreviewForm,
    /// Random scale of the LCM-LoRA.
    pub lora_scale: LoraScale,
    /// A loss that keeps the LCM path aligned with the model (paper section 4.2). Default none.
    pub alignment: AlignmentConfig,
}

impl LookaheadConfig {
    pub(super) fn validate(&self, check: &Checker<'_>, train_batch_size: usize) -> Result<()> {
        let fits = (1..=train_batch_size).contains(&self.batch_size);
        let expected = format!("1 to `train_batch_size` ({train_batch_size})");
        check.require("batch_size", fits, &expected, self.batch_size)?;
        check.not_negative("identity_weight", self.identity_weight)?;
        check.not_negative("perceptual_weight", self.perceptual_weight)?;
        let check = check.within("lookahead.lora_scale.");
        check.within_range("full_probability", self.lora_scale.full_probability, 0.0..=1.0)?;
        check.within_range("min_scale", self.lora_scale.min_scale, 0.0..=1.0)?;
        check.at_least("hold_iterations", self.lora_scale.hold_iterations, 1)?;
        self.alignment.validate(&check.within("lookahead.alignment."))
    }
}

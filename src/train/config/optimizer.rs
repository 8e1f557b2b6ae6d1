//! AdamW, its learning rates, and the moving average of what it updates.

use serde::{Deserialize, Serialize};

use super::check::Checker;
use crate::Result;
use crate::train::LrSchedule;

/// AdamW and its learning rates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Learning rate of the KV encoder's LoRA. Default 5e-6 (paper section 4.5); above 0.
    pub learning_rate: f64,
    /// Learning rate of the adapter (resampler and image key/value projections). Default 1e-5 (paper section 4.5);
    /// above 0.
    pub adapter_lr: f64,
    /// Decay of the first moment. Default 0.9 (official code); `[0, 1)`.
    pub adam_beta1: f64,
    /// Decay of the second moment. Default 0.999 (official code); `[0, 1)`.
    pub adam_beta2: f64,
    /// Added to the root of the second moment. Default 1e-8 (official code); above 0.
    pub adam_epsilon: f64,
    /// Decoupled weight decay, times the learning rate per update. Default 0.01 (official recipe; its option's default
    /// is 1e-4); not negative.
    pub adam_weight_decay: f64,
    /// Largest norm of the gradient over **all** trainable parameters; larger ones are scaled down to it, 0 clips
    /// nothing. Default 1.0 (official code, which however leaves the adapter out in the diffusion update).
    pub max_grad_norm: f64,
    /// Learning-rate schedule over the iterations. Default `"constant"` (official recipe).
    pub lr_scheduler: LrSchedule,
    /// Iterations over which the schedules other than `"constant"` rise from 0. Default 500 (official option).
    pub lr_warmup_steps: u64,
}

impl OptimizerConfig {
    pub(super) fn validate(&self, check: &Checker<'_>) -> Result<()> {
        check.positive("learning_rate", self.learning_rate)?;
        check.positive("adapter_lr", self.adapter_lr)?;
        check.below_one("adam_beta1", self.adam_beta1)?;
        check.below_one("adam_beta2", self.adam_beta2)?;
        check.positive("adam_epsilon", self.adam_epsilon)?;
        check.not_negative("adam_weight_decay", self.adam_weight_decay)?;
        check.not_negative("max_grad_norm", self.max_grad_norm)
    }
}

/// Moving average of the trainable parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmaConfig {
    /// Whether an average is kept; validation and personalisation then use it. Default false (the official code has
    /// none).
    pub enabled: bool,
    /// Weight of the past at each iteration. Default 0.999; `[0, 1)`.
    pub decay: f64,
    /// Whether the decay starts low: `min(decay, (1 + n) / (10 + n))` at the n-th iteration. Default true.
    pub warmup: bool,
}

impl EmaConfig {
    pub(super) fn validate(&self, check: &Checker<'_>) -> Result<()> {
        check.below_one("decay", self.decay)
    }
}

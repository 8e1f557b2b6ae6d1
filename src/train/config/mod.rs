//! The hyperparameters of a training run.
//!
//! Every field says its default (that of the preset [`TrainConfig::paper`]), unit, range and source. "Official code"
//! is the authors' published trainer; where it differs from the paper, [`TrainConfig::official`] has its value.

mod adapter;
mod alignment;
mod check;
mod data;
mod dropout;
mod lookahead;
mod optimizer;
mod output;
mod presets;
#[cfg(test)]
mod tests;
mod timesteps;
mod toml_form;

use serde::{Deserialize, Serialize};

pub use adapter::AdapterConfig;
pub use alignment::{AlignmentConfig, AlignmentLoss};
pub use data::DataConfig;
pub use dropout::DropoutConfig;
pub use lookahead::LookaheadConfig;
pub use optimizer::{EmaConfig, OptimizerConfig};
pub use output::{CheckpointingConfig, LoggingConfig, ValidationConfig};
pub use timesteps::TimestepsConfig;

use crate::Result;
use check::Checker;

/// How the diffusion loss and the lookahead loss become updates of the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateMode {
    /// One update per iteration, of the weighted sum of both losses (what the paper's text implies).
    Joint,
    /// Two updates per iteration with shared moments, first of the diffusion loss, then of the lookahead loss
    /// (official code).
    Alternating,
}

/// Every hyperparameter of a training run.
///
/// Made from a preset ([`paper`](Self::paper), [`official`](Self::official), [`mini`](Self::mini)), or from TOML
/// ([`from_toml`](Self::from_toml)), where whatever a file does not say is taken from its preset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Seed of every random draw of the run. Default 0 (official recipe); `0..=2^63-1`, for TOML has no larger integers.
    pub seed: u64,
    /// Length of the run in iterations. Default 5000 (paper section 4.5); at least 1.
    pub max_train_steps: u64,
    /// Samples of one forward pass, over all processes. Default 8 (paper section 4.5: a total batch of 8 on 2 GPUs; the
    /// official option `train_batch_size` counts those of one process, 4); at least 1.
    pub train_batch_size: usize,
    /// Forward and backward passes whose gradients are averaged before an update. Default 1; at least 1.
    pub gradient_accumulation_steps: usize,
    /// Whether activations are recomputed in the backward pass instead of kept: less memory, more time, the same
    /// gradients. Default true (official recipe: `gradient_checkpointing`).
    pub recompute: bool,
    /// Where activations are recomputed: whether the outputs of self-attention, the dearest to compute, are kept all the same.
    /// Some more memory, some less time, the same gradients. Default false.
    pub keep_attention: bool,
    /// How the two losses become updates. Default `"joint"`; official code `"alternating"`.
    pub update_mode: UpdateMode,
    /// Pictures and prompts.
    pub data: DataConfig,
    /// AdamW and its learning rates.
    pub optimizer: OptimizerConfig,
    /// Moving average of the parameters.
    pub ema: EmaConfig,
    /// What is trained, and how the conditioning picture reaches the denoiser.
    pub adapter: AdapterConfig,
    /// Conditions dropped at random.
    pub dropout: DropoutConfig,
    /// Which timesteps are trained on.
    pub timesteps: TimestepsConfig,
    /// The lookahead loss (paper sections 4.1 and 4.2).
    pub lookahead: LookaheadConfig,
    /// When checkpoints are written and which are kept.
    pub checkpointing: CheckpointingConfig,
    /// Pictures sampled while training goes on.
    pub validation: ValidationConfig,
    /// What is recorded of the run.
    pub logging: LoggingConfig,
}

impl TrainConfig {
    /// Checks that every field is in its range.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming the first field out of range, what it should be and what it is.
    pub fn validate(&self) -> Result<()> {
        self.validate_from("configuration")
    }

    /// [`validate`](Self::validate), with the source that errors name.
    pub(crate) fn validate_from(&self, source_name: &str) -> Result<()> {
        let top = Checker::new(source_name, "");
        top.at_most("seed", self.seed, i64::MAX as u64)?;
        top.at_least("max_train_steps", self.max_train_steps, 1)?;
        top.at_least("train_batch_size", self.train_batch_size, 1)?;
        top.at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)?;
        self.data.validate(&top.within("data."))?;
        self.optimizer.validate(&top.within("optimizer."))?;
        self.ema.validate(&top.within("ema."))?;
        self.adapter.validate(&top.within("adapter."))?;
        self.dropout.validate(&top.within("dropout."))?;
        self.timesteps.validate(&top.within("timesteps."))?;
        self.lookahead.validate(&top.within("lookahead."), self.train_batch_size)?;
        self.checkpointing.validate(&top.within("checkpointing."))?;
        self.validation.validate(&top.within("validation."))?;
        self.logging.validate(&top.within("logging."))
    }
}

//! What a run writes: checkpoints, validation pictures, metrics.

use serde::{Deserialize, Serialize};

use super::check::Checker;
use crate::Result;

/// When checkpoints are written and which are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointingConfig {
    /// Iterations between checkpoints. Default 500 (official option `checkpointing_steps`); 0 writes one at the end only.
    pub every_n_steps: u64,
    /// How many checkpoints are kept, the newest ones. Default 2 (official recipe: `checkpoints_total_limit`); 0 keeps
    /// all.
    pub keep_last: usize,
}

impl CheckpointingConfig {
    pub(super) fn validate(&self, _check: &Checker<'_>) -> Result<()> {
        Ok(())
    }
}

/// Pictures sampled while training goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// Iterations between validations. Default 500 (official option `validation_vis_steps`); 0 never validates.
    pub every_n_steps: u64,
    /// Prompts that pictures are made for. Default: those of the official examples; not empty where validation is on.
    pub prompts: Vec<String>,
    /// Files of the conditioning pictures. Default empty: pictures of the data set.
    pub images: Vec<String>,
    /// How many conditioning pictures are taken where `images` is empty. Default 2 (official option
    /// `num_validation_images`); at least 1.
    pub num_images: usize,
    /// Steps of the sampler. Default 50 (official inference); 1 to 1000.
    pub num_inference_steps: usize,
}

impl ValidationConfig {
    pub(super) fn validate(&self, check: &Checker<'_>) -> Result<()> {
        let has_prompts = self.every_n_steps == 0 || !self.prompts.is_empty();
        check.require("prompts", has_prompts, "at least one prompt where validation is on", "none")?;
        check.at_least("num_images", self.num_images, 1)?;
        check.at_least("num_inference_steps", self.num_inference_steps, 1)?;
        check.at_most("num_inference_steps", self.num_inference_steps, 1000)
    }
}

/// What is recorded of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoggingConfig {
    /// Iterations between lines of the metrics file. Default 1; at least 1.
    pub every_n_steps: u64,
    /// Whether TensorBoard event files are written beside it. Default true.
    pub tensorboard: bool,
}

impl LoggingConfig {
    pub(super) fn validate(&self, check: &Checker<'_>) -> Result<()> {
        check.at_least("every_n_steps", self.every_n_steps, 1)
    }
}

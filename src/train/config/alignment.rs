//! What keeps the preview aligned with the model.

use serde::{Deserialize, Serialize};

use super::check::Checker;
use crate::Result;

/// Which loss keeps the LCM path aligned with the model (paper section 4.2), beside the random scale of the LCM-LoRA,
/// which is a setting of its own ([`LoraScale`](crate::lookahead::LoraScale)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlignmentLoss {
    /// None (the paper's choice, with the random scale).
    None,
    /// Score distillation (Poole et al. 2023, equation 3): the model without the LCM-LoRA, under the same conditions,
    /// finds the preview likely ([`score_distillation`](crate::lookahead::score_distillation)).
    Sds,
    /// The loss of consistency models (Song et al. 2023, equation 7) on the LCM path, at full LoRA scale, along the paths
    /// that the model without the LCM-LoRA takes ([`consistency_loss`](crate::lookahead::consistency_loss)).
    Consistency,
}

/// A loss that keeps the LCM path aligned with the model, computed on the samples of the lookahead loss and added to it.
///
/// The paper names both losses and measures them in its supplementary, which is not published: apart from the losses
/// themselves, the numbers here are those of the works they come from. To see a loss by itself, switch the random scale
/// off (`lora_scale.full_probability = 1`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlignmentConfig {
    /// Which loss: `"none"` (default), `"sds"` or `"consistency"`.
    pub loss: AlignmentLoss,
    /// Its weight. Default 1; not negative. With 0 it is computed and reported, but not trained on.
    pub weight: f64,
    /// Guidance scale of the model that teaches: `u + scale (c - u)`, where u has neither text nor picture. Default 1, no
    /// guidance and one pass less; at least 1. An LCM-LoRA previews the guided model that it was distilled from; but the
    /// model that teaches has the encoder that is being trained, whose effect guidance magnifies, so that the loss feeds
    /// on itself: with 3 pictures became saturated (`docs/experiments.md`).
    pub guidance_scale: f64,
    /// Score distillation draws its timesteps from this one on. Default 20 (Poole et al. 2023: t from 0.02 to 0.98).
    pub sds_min_timestep: usize,
    /// Score distillation draws its timesteps below this one. Default 980; at most 1000.
    pub sds_max_timestep: usize,
    /// Timesteps between the two points of a path that the consistency loss compares. Default 20 (Luo et al. 2023,
    /// section 4.3); 1 to 999.
    pub consistency_skip: usize,
}

impl Default for AlignmentConfig {
    /// No loss, and the other fields as their documentation says.
    fn default() -> Self {
        AlignmentConfig {
            loss: AlignmentLoss::None,
            weight: 1.0,
            guidance_scale: 1.0,
            sds_min_timestep: 20,
            sds_max_timestep: 980,
            consistency_skip: 20,
        }
    }
}

impl AlignmentConfig {
    pub(super) fn validate(&self, check: &Checker<'_>) -> Result<()> {
        check.not_negative("weight", self.weight)?;
        let guides = self.guidance_scale.is_finite() && self.guidance_scale >= 1.0;
        check.require("guidance_scale", guides, "a finite number, at least 1", self.guidance_scale)?;
        check.at_most("sds_max_timestep", self.sds_max_timestep, 1000)?;
        let below = self.sds_min_timestep < self.sds_max_timestep;
        let expected = format!("less than `sds_max_timestep` ({})", self.sds_max_timestep);
        check.require("sds_min_timestep", below, &expected, self.sds_min_timestep)?;
        check.at_least("consistency_skip", self.consistency_skip, 1)?;
        check.at_most("consistency_skip", self.consistency_skip, 999)
    }
}

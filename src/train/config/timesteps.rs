//! Which timesteps are trained on.

use serde::{Deserialize, Serialize};

use super::check::Checker;
use crate::Result;

/// The alphas of the cosine-annealed timestep distribution `p(t) ~ (1 - alpha cos(pi t / T)) / T` (paper section 4.2),
/// which favours noisy timesteps. Alpha 0 is uniform.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimestepsConfig {
    /// Alpha for the diffusion loss. Default 0.2 (paper section 4.2); official code 0.5; 0 to 1.
    pub diffusion_annealing: f64,
    /// Alpha for the lookahead loss. Default 0.2 (paper section 4.2); 0 to 1.
    pub lookahead_annealing: f64,
    /// The lookahead loss draws timesteps below this one. Default 1000, all of them (official option); 1 to 1000.
    pub lcm_max_timestep: usize,
}

impl TimestepsConfig {
    pub(super) fn validate(&self, check: &Checker<'_>) -> Result<()> {
        check.within_range("diffusion_annealing", self.diffusion_annealing, 0.0..=1.0)?;
        check.within_range("lookahead_annealing", self.lookahead_annealing, 0.0..=1.0)?;
        check.at_least("lcm_max_timestep", self.lcm_max_timestep, 1)?;
        check.at_most("lcm_max_timestep", self.lcm_max_timestep, 1000)
    }
}

//! Random re-scaling of the LCM-LoRA, the paper's own choice (section 4.2).

use serde::{Deserialize, Serialize};

use crate::random::Address;

/// The distribution of the LCM-LoRA's scale alpha_LoRA over a training run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraScale {
    /// Probability that a draw is 1 rather than uniform in `[min_scale, 1]`. 0.5 in the paper ("for half of our training
    /// iterations") and the official recipe; 0 to 1, where 1 never re-scales.
    pub full_probability: f64,
    /// Smallest scale, 0 to 1. 0.1 in the paper.
    pub min_scale: f64,
    /// Iterations for which a draw is kept: 1 in the paper, 5 in the official recipe
    /// (`lcm_sample_scale_every_k_steps`). 0 never draws: always 1.
    pub hold_iterations: u64,
}

impl LoraScale {
    /// The scale at an iteration: a pure function of seed and iteration.
    pub fn at(&self, seed: u64, iteration: u64) -> f64 {
        let Some(draw) = iteration.checked_div(self.hold_iterations) else { return 1.0 };
        let address = Address::new(seed, "lora scale").step(draw);
        match address.uniform() < self.full_probability {
            true => 1.0,
            false => self.min_scale + (1.0 - self.min_scale) * address.sample(1).uniform(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_the_draws_are_full_and_the_others_uniform_above_the_minimum() {
        let scale = LoraScale { full_probability: 0.5, min_scale: 0.1, hold_iterations: 1 };
        let draws: Vec<f64> = (0..4000).map(|i| scale.at(3, i)).collect();
        let partial: Vec<f64> = draws.iter().copied().filter(|s| *s < 1.0).collect();
        let share = partial.len() as f64 / draws.len() as f64;
        let mean = partial.iter().sum::<f64>() / partial.len() as f64;
        assert!((share - 0.5).abs() < 0.03, "{share}");
        assert!((mean - 0.55).abs() < 0.02, "{mean}");
        assert!(partial.iter().all(|s| (0.1..1.0).contains(s)));
    }

    #[test]
    fn a_draw_is_held_for_as_many_iterations_as_asked() {
        let scale = LoraScale { full_probability: 0.0, min_scale: 0.1, hold_iterations: 5 };
        assert!((0..5).all(|i| scale.at(0, i) == scale.at(0, 0)));
        assert_ne!(scale.at(0, 5), scale.at(0, 0));
        assert_eq!(LoraScale { hold_iterations: 0, ..scale }.at(0, 9), 1.0);
    }
}

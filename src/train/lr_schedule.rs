//! Learning-rate schedules.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// The learning rate over a run, as a factor of its base value (those of diffusers' `get_scheduler`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    /// 1 throughout; warm-up steps are ignored.
    Constant,
    /// Rises linearly from 0 over the warm-up, then 1.
    ConstantWithWarmup,
    /// Rises linearly from 0 over the warm-up, then falls linearly to 0 at the end of the run.
    Linear,
    /// Rises linearly from 0 over the warm-up, then falls to 0 along half a cosine.
    Cosine,
}

impl LrSchedule {
    /// The factor in `[0, 1]` at iteration `step` (from 0) of a run of `max_train_steps` iterations.
    ///
    /// With a warm-up, the factor at step 0 is 0, as in diffusers.
    pub fn factor(self, step: u64, warmup_steps: u64, max_train_steps: u64) -> f64 {
        if self == LrSchedule::Constant {
            return 1.0;
        }
        if step < warmup_steps {
            return step as f64 / warmup_steps as f64;
        }
        let decay_steps = max_train_steps.saturating_sub(warmup_steps).max(1);
        let progress = ((step - warmup_steps) as f64 / decay_steps as f64).min(1.0);
        match self {
            LrSchedule::Constant | LrSchedule::ConstantWithWarmup => 1.0,
            LrSchedule::Linear => 1.0 - progress,
            LrSchedule::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(schedule: LrSchedule, steps: [u64; 5]) -> [f64; 5] {
        steps.map(|step| schedule.factor(step, 10, 110))
    }

    #[test]
    fn constant_is_one_from_the_first_step() {
        assert_eq!(factors(LrSchedule::Constant, [0, 5, 10, 60, 1000]), [1.0; 5]);
    }

    #[test]
    fn warm_up_rises_linearly_from_zero() {
        assert_eq!(factors(LrSchedule::ConstantWithWarmup, [0, 5, 9, 10, 1000]), [0.0, 0.5, 0.9, 1.0, 1.0]);
    }

    #[test]
    fn linear_falls_to_zero_at_the_end() {
        assert_eq!(factors(LrSchedule::Linear, [5, 10, 60, 110, 200]), [0.5, 1.0, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn cosine_follows_half_a_cosine() {
        let got = factors(LrSchedule::Cosine, [5, 10, 35, 60, 110]);
        let expected = [0.5, 1.0, 0.5 + 0.5f64.sqrt() / 2.0, 0.5, 0.0];
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-15), "{got:?}");
    }

    #[test]
    fn a_warm_up_longer_than_the_run_is_no_division_by_zero() {
        assert_eq!(LrSchedule::Cosine.factor(0, 0, 0), 1.0);
        assert_eq!(LrSchedule::Linear.factor(20, 20, 10), 1.0);
        assert_eq!(LrSchedule::Linear.factor(21, 20, 10), 0.0);
    }
}

//! The timesteps that training draws.

use std::f64::consts::PI;

use crate::random::Address;
use crate::{Error, Result};

/// Draws training timesteps, favouring early (noisy) ones: `p(t) ~ 1/T (1 - alpha cos(pi t / T))`.
///
/// Section 4.2 of the paper, after Huang et al. 2023. With `alpha = 0` it is uniform; the paper sets 0.2, the official
/// code 0.5 for the diffusion loss and 0.2 for the lookahead loss. Draws invert the cumulative distribution, so one
/// uniform number gives one timestep.
#[derive(Clone, Debug)]
pub struct AnnealedTimestepSampler {
    alpha: f64,
    total: usize,
    /// Cumulative weights, not normalised; `cumulative[t]` is the sum over `0..=t`. Never empty.
    cumulative: Vec<f64>,
}

impl AnnealedTimestepSampler {
    /// The sampler of timesteps `0..max_timestep` out of a schedule of `total` timesteps.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `0 <= alpha < 1` and `1 <= max_timestep <= total`.
    pub fn new(alpha: f64, max_timestep: usize, total: usize) -> Result<Self> {
        const NAME: &str = "AnnealedTimestepSampler::new";
        if !(0.0..1.0).contains(&alpha) {
            return Err(Error::argument(NAME, "alpha", "a number in [0, 1)", alpha.to_string()));
        }
        if !(1..=total).contains(&max_timestep) {
            let expected = format!("1 to {total}, the timesteps of the schedule");
            return Err(Error::argument(NAME, "max_timestep", expected, max_timestep.to_string()));
        }
        let cumulative = (0..max_timestep)
            .scan(0.0, |sum, t| {
                *sum += weight(alpha, t, total);
                Some(*sum)
            })
            .collect();
        Ok(AnnealedTimestepSampler { alpha, total, cumulative })
    }

    /// The annealing strength, in `[0, 1)`.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// Timesteps drawn are below this.
    pub fn max_timestep(&self) -> usize {
        self.cumulative.len()
    }

    /// `T`, the number of timesteps of the schedule.
    pub fn total(&self) -> usize {
        self.total
    }

    fn sum(&self) -> f64 {
        self.cumulative[self.cumulative.len() - 1]
    }

    /// The probability of drawing `t`; 0 for a timestep that is never drawn.
    pub fn probability(&self, t: usize) -> f64 {
        if t < self.max_timestep() { weight(self.alpha, t, self.total) / self.sum() } else { 0.0 }
    }

    /// The timestep of one address, in `0..max_timestep`.
    pub fn sample(&self, address: Address) -> usize {
        let target = address.uniform() * self.sum();
        // Rounding can bring the target up to the whole sum, which lies beyond the last timestep.
        self.cumulative.partition_point(|&sum| sum <= target).min(self.max_timestep() - 1)
    }

    /// One timestep for each of `batch` samples; sample `i` draws at `address.sample(i)`.
    pub fn sample_batch(&self, address: Address, batch: usize) -> Vec<usize> {
        (0..batch).map(|i| self.sample(address.sample(i))).collect()
    }
}

fn weight(alpha: f64, t: usize, total: usize) -> f64 {
    1.0 - alpha * (PI * t as f64 / total as f64).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(alpha: f64) -> Result<(f64, f64, f64)> {
        let sampler = AnnealedTimestepSampler::new(alpha, 1000, 1000)?;
        let ratio = sampler.probability(999) / sampler.probability(0);
        let mean = (0..1000).map(|t| t as f64 * sampler.probability(t)).sum();
        let late = (500..1000).map(|t| sampler.probability(t)).sum();
        Ok((ratio, mean, late))
    }

    #[test]
    fn the_distribution_has_the_published_shape() -> Result<()> {
        for (alpha, ratio, mean, late) in [(0.5, 3.0, 600.9, 0.659), (0.2, 1.5, 540.0, 0.564)] {
            let found = facts(alpha)?;
            assert!((found.0 - ratio).abs() < 1e-4, "ratio {}", found.0);
            assert!((found.1 - mean).abs() < 0.1, "mean {}", found.1);
            assert!((found.2 - late).abs() < 1e-3, "P(t >= 500) {}", found.2);
        }
        Ok(())
    }

    #[test]
    fn draws_follow_the_distribution() -> Result<()> {
        let sampler = AnnealedTimestepSampler::new(0.5, 1000, 1000)?;
        let draws = sampler.sample_batch(Address::new(5, "timestep"), 20_000);
        let mean = draws.iter().sum::<usize>() as f64 / draws.len() as f64;
        let late = draws.iter().filter(|&&t| t >= 500).count() as f64 / draws.len() as f64;
        // Standard errors: 270 / sqrt(20000) = 1.9 and 0.0034.
        assert!((mean - 600.9).abs() < 6.0, "{mean}");
        assert!((late - 0.659).abs() < 0.011, "{late}");
        Ok(())
    }

    #[test]
    fn probabilities_sum_to_one_and_no_draw_reaches_max_timestep() -> Result<()> {
        let sampler = AnnealedTimestepSampler::new(0.2, 7, 1000)?;
        assert!(((0..1000).map(|t| sampler.probability(t)).sum::<f64>() - 1.0).abs() < 1e-12);
        let draws = sampler.sample_batch(Address::new(0, "timestep"), 500);
        assert!((0..7).all(|t| draws.contains(&t)) && draws.iter().all(|&t| t < 7));
        Ok(())
    }

    #[test]
    fn alpha_zero_is_uniform() -> Result<()> {
        let sampler = AnnealedTimestepSampler::new(0.0, 10, 10)?;
        assert!((0..10).all(|t| (sampler.probability(t) - 0.1).abs() < 1e-12));
        Ok(())
    }

    #[test]
    fn a_samples_timestep_does_not_depend_on_the_batch() -> Result<()> {
        let sampler = AnnealedTimestepSampler::new(0.2, 1000, 1000)?;
        let address = Address::new(9, "timestep").step(4);
        assert_eq!(sampler.sample_batch(address, 3), sampler.sample_batch(address, 8)[..3]);
        Ok(())
    }

    #[test]
    fn bad_parameters_are_argument_errors() {
        for (alpha, max_timestep) in [(1.0, 1000), (-0.1, 1000), (f64::NAN, 1000), (0.2, 0), (0.2, 1001)] {
            let result = AnnealedTimestepSampler::new(alpha, max_timestep, 1000);
            assert!(matches!(result, Err(Error::Argument { .. })), "{alpha} {max_timestep}");
        }
    }
}

//! DPM-Solver++(2M) of Lu et al. 2022.

use candle_core::Tensor;

use super::sampler::{check_steps, leading, remove_noise, step_timestep};
use super::{NoiseSchedule, Sampler};
use crate::random::Address;
use crate::{Error, Result};

/// Runs of fewer steps end with a first-order step (`lower_order_final`), which is steadier.
const LOWER_ORDER_FINAL_BELOW: usize = 15;

/// DPM-Solver++(2M), the sampler of the official inference: second order, multistep, midpoint.
///
/// diffusers' `DPMSolverMultistepScheduler` with SDXL's scheduler config as version 0.24 reads it: leading spacing,
/// `steps_offset` 1, `lower_order_final`, and the walk ends at the sigma of timestep 0 (`final_sigmas_type`
/// `"sigma_min"` of later versions), not at 0. 50 steps are t = 951, 932, ..., 20.
#[derive(Clone, Debug)]
pub struct DpmSolverPlusPlus {
    timesteps: Vec<usize>,
    /// `sigma` at each timestep, and at the end of the walk.
    sigmas: Vec<f64>,
    /// The latest step and its clean latents: the second order looks one step back.
    previous: Option<(usize, Tensor)>,
}

/// The variance-preserving coefficients at a sigma.
struct Level {
    /// The signal's coefficient.
    alpha: f64,
    /// The noise's coefficient.
    sigma: f64,
    /// `ln(alpha / sigma)`, half the logarithm of the signal-to-noise ratio: the solver's time.
    lambda: f64,
}

impl Level {
    fn at(sigma: f64) -> Self {
        let alpha = 1.0 / sigma.hypot(1.0);
        Level { alpha, sigma: sigma * alpha, lambda: -sigma.ln() }
    }
}

impl DpmSolverPlusPlus {
    /// The sampler for 1 to 999 steps (one fewer than the schedule has timesteps: the spacing leaves out one interval
    /// at the noisy end).
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of steps.
    pub fn new(schedule: &NoiseSchedule, steps: usize) -> Result<Self> {
        check_steps("DpmSolverPlusPlus::new", steps, schedule.timestep_count() - 1)?;
        let ratio = schedule.timestep_count() / (steps + 1);
        let timesteps = leading(steps, ratio, ratio, schedule.timestep_count());
        let sigmas = timesteps.iter().chain([&0]).map(|&t| schedule.sigma(t)).collect::<Result<Vec<_>>>()?;
        Ok(DpmSolverPlusPlus { timesteps, sigmas, previous: None })
    }

    /// The clean latents of step `i - 1`, where the step from `i` is of second order.
    ///
    /// # Errors
    /// [`Error::Argument`] where steps are not taken in order.
    fn previous_x0(&self, i: usize) -> Result<Option<&Tensor>> {
        let steps = self.timesteps.len();
        if i == 0 {
            return Ok(None);
        }
        match &self.previous {
            Some((step, _)) if step + 1 == i && i + 1 == steps && steps < LOWER_ORDER_FINAL_BELOW => Ok(None),
            Some((step, x0)) if step + 1 == i => Ok(Some(x0)),
            // Without this, a skipped step would be integrated over the wrong interval, silently.
            other => Err(Error::argument(
                "DpmSolverPlusPlus::step",
                "i",
                other.as_ref().map_or("step 0 first".to_string(), |(step, _)| format!("step {} or 0", step + 1)),
                i.to_string(),
            )),
        }
    }
}

impl Sampler for DpmSolverPlusPlus {
    fn timesteps(&self) -> &[usize] {
        &self.timesteps
    }

    fn predict_x0(&self, noise_prediction: &Tensor, i: usize, latents: &Tensor) -> Result<Tensor> {
        step_timestep("DpmSolverPlusPlus::step", &self.timesteps, i)?;
        let Level { alpha, sigma, .. } = Level::at(self.sigmas[i]);
        remove_noise("DpmSolverPlusPlus::step", noise_prediction, latents, sigma, 1.0 / alpha)
    }

    fn step(&mut self, noise_prediction: &Tensor, i: usize, latents: &Tensor, _noise: Address) -> Result<Tensor> {
        let x0 = self.predict_x0(noise_prediction, i, latents)?;
        let (now, next) = (Level::at(self.sigmas[i]), Level::at(self.sigmas[i + 1]));
        let interval = next.lambda - now.lambda;
        // The exponential integrator's weight of the clean latents, alpha_next (1 - e^-h).
        let weight = -next.alpha * (-interval).exp_m1();
        let direction = match self.previous_x0(i)? {
            None => x0.clone(),
            Some(previous) => {
                // The clean latents are extrapolated linearly in lambda to the middle of the interval.
                let previous_interval = now.lambda - Level::at(self.sigmas[i - 1]).lambda;
                let slope = 0.5 * interval / previous_interval;
                (&x0 + ((&x0 - previous)? * slope)?)?
            }
        };
        let latents = ((latents * (next.sigma / now.sigma))? + (direction * weight)?)?;
        self.previous = Some((i, x0));
        Ok(latents)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn fifty_steps_are_those_of_the_official_inference() -> Result<()> {
        let sampler = DpmSolverPlusPlus::new(&NoiseSchedule::sdxl(), 50)?;
        assert_eq!(sampler.timesteps()[..3], [951, 932, 913]);
        assert_eq!(sampler.timesteps()[49], 20);
        assert_eq!(sampler.sigmas[50], NoiseSchedule::sdxl().sigma(0)?);
        Ok(())
    }

    #[test]
    fn a_skipped_step_is_refused_and_step_zero_starts_afresh() -> Result<()> {
        let mut sampler = DpmSolverPlusPlus::new(&NoiseSchedule::sdxl(), 5)?;
        let latents = Tensor::ones((1, 4, 2, 2), DType::F64, &Device::Cpu)?;
        let noise = Address::new(0, "step");
        assert!(sampler.step(&latents, 1, &latents, noise).is_err());
        let first = sampler.step(&latents, 0, &latents, noise)?;
        assert!(sampler.step(&latents, 2, &latents, noise).is_err());
        sampler.step(&latents, 1, &first, noise)?;
        let again = sampler.step(&latents, 0, &latents, noise)?;
        assert_eq!(first.flatten_all()?.to_vec1::<f64>()?, again.flatten_all()?.to_vec1::<f64>()?);
        Ok(())
    }
}

//! Euler's method on the probability-flow ODE of Karras et al. 2022.

use candle_core::Tensor;

use super::noise_schedule::same_shape;
use super::sampler::{check_steps, leading, remove_noise, step_timestep};
use super::{NoiseSchedule, Sampler};
use crate::Result;
use crate::random::Address;

/// Euler's method; diffusers' `EulerDiscreteScheduler` with SDXL's scheduler config (leading spacing, `steps_offset`
/// 1, last sigma 0, no churn).
///
/// Its latents are variance exploding, `clean + sigma noise`.
#[derive(Clone, Debug)]
pub struct Euler {
    timesteps: Vec<usize>,
    /// `sigma` at each timestep, and 0 at the end of the walk.
    sigmas: Vec<f64>,
}

impl Euler {
    /// The sampler for 1 to 1000 steps (as many as the schedule has timesteps).
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for another number of steps.
    pub fn new(schedule: &NoiseSchedule, steps: usize) -> Result<Self> {
        check_steps("Euler::new", steps, schedule.timestep_count())?;
        let ratio = schedule.timestep_count() / steps;
        let timesteps = leading(steps, ratio, 0, schedule.timestep_count());
        let mut sigmas = timesteps.iter().map(|&t| schedule.sigma(t)).collect::<Result<Vec<_>>>()?;
        sigmas.push(0.0);
        Ok(Euler { timesteps, sigmas })
    }
}

impl Sampler for Euler {
    fn timesteps(&self) -> &[usize] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.sigmas[0].hypot(1.0)
    }

    fn scale_model_input(&self, latents: &Tensor, i: usize) -> Result<Tensor> {
        step_timestep("Euler::scale_model_input", &self.timesteps, i)?;
        Ok((latents / self.sigmas[i].hypot(1.0))?)
    }

    fn predict_x0(&self, noise_prediction: &Tensor, i: usize, latents: &Tensor) -> Result<Tensor> {
        step_timestep("Euler::step", &self.timesteps, i)?;
        remove_noise("Euler::step", noise_prediction, latents, self.sigmas[i], 1.0)
    }

    fn step(&mut self, noise_prediction: &Tensor, i: usize, latents: &Tensor, _noise: Address) -> Result<Tensor> {
        step_timestep("Euler::step", &self.timesteps, i)?;
        same_shape("Euler::step", "noise_prediction", latents, noise_prediction)?;
        // The slope (latents - x0) / sigma is the noise prediction itself.
        Ok((latents + (noise_prediction * (self.sigmas[i + 1] - self.sigmas[i]))?)?)
    }
}

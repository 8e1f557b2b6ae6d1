//! DDIM, the deterministic sampler of Song et al. 2020.

use candle_core::Tensor;

use super::sampler::{check_steps, leading, remove_noise, step_timestep};
use super::{NoiseSchedule, Sampler};
use crate::Result;
use crate::random::Address;

/// DDIM without added noise (eta 0); diffusers' `DDIMScheduler` with SDXL's scheduler config (leading spacing,
/// `steps_offset` 1, `set_alpha_to_one` false: the walk ends at the noise level of timestep 0).
#[derive(Clone, Debug)]
pub struct Ddim {
    timesteps: Vec<usize>,
    /// `abar` at each timestep, and at the end of the walk.
    alphas_cumprod: Vec<f64>,
}

impl Ddim {
    /// The sampler for 1 to 1000 steps (as many as the schedule has timesteps).
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for another number of steps.
    pub fn new(schedule: &NoiseSchedule, steps: usize) -> Result<Self> {
        check_steps("Ddim::new", steps, schedule.timestep_count())?;
        let ratio = schedule.timestep_count() / steps;
        let timesteps = leading(steps, ratio, 0, schedule.timestep_count());
        // The step after `t` is `t - ratio`, or the end of the walk at 0: the same as the next timestep of the list.
        let alphas_cumprod =
            timesteps.iter().chain([&0]).map(|&t| schedule.alpha_cumprod(t)).collect::<Result<Vec<_>>>()?;
        Ok(Ddim { timesteps, alphas_cumprod })
    }
}

impl Sampler for Ddim {
    fn timesteps(&self) -> &[usize] {
        &self.timesteps
    }

    fn predict_x0(&self, noise_prediction: &Tensor, i: usize, latents: &Tensor) -> Result<Tensor> {
        step_timestep("Ddim::step", &self.timesteps, i)?;
        let alpha_cumprod = self.alphas_cumprod[i];
        let (noise_scale, signal_scale) = ((1.0 - alpha_cumprod).sqrt(), 1.0 / alpha_cumprod.sqrt());
        remove_noise("Ddim::step", noise_prediction, latents, noise_scale, signal_scale)
    }

    fn step(&mut self, noise_prediction: &Tensor, i: usize, latents: &Tensor, _noise: Address) -> Result<Tensor> {
        let x0 = self.predict_x0(noise_prediction, i, latents)?;
        let next = self.alphas_cumprod[i + 1];
        Ok(((x0 * next.sqrt())? + (noise_prediction * (1.0 - next).sqrt())?)?)
    }
}

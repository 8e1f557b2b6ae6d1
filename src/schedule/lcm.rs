//! Latent consistency sampling, and the boundary condition of consistency models.

use candle_core::Tensor;

use super::noise_schedule::{per_sample, same_shape};
use super::sampler::{check_steps, remove_noise, step_timestep};
use super::{NoiseSchedule, Sampler};
use crate::random::Address;
use crate::{Error, Result};

/// The boundary condition of a consistency model (Song et al. 2023): its output is
/// `c_out(t) x0 + c_skip(t) z_t`, which is `z_t` itself at `t = 0`.
///
/// With `s = timestep_scaling * t`: `c_skip = sigma_data^2 / (s^2 + sigma_data^2)` and
/// `c_out = s / sqrt(s^2 + sigma_data^2)`. The paper's equation 3 leaves it out; it matters for t = 0 and 1 only.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LcmBoundary {
    /// How fast the boundary condition fades with the timestep.
    pub timestep_scaling: f64,
    /// The standard deviation of the data the condition assumes.
    pub sigma_data: f64,
}

impl Default for LcmBoundary {
    /// 10 and 0.5, as diffusers' `LCMScheduler` and the official code have them.
    fn default() -> Self {
        LcmBoundary { timestep_scaling: 10.0, sigma_data: 0.5 }
    }
}

impl LcmBoundary {
    /// `c_skip(t)`, the weight of the noised latents.
    pub fn c_skip(&self, t: usize) -> f64 {
        let (scaled, data) = (self.timestep_scaling * t as f64, self.sigma_data);
        data * data / (scaled * scaled + data * data)
    }

    /// `c_out(t)`, the weight of the predicted clean latents.
    pub fn c_out(&self, t: usize) -> f64 {
        let scaled = self.timestep_scaling * t as f64;
        scaled / scaled.hypot(self.sigma_data)
    }

    /// `c_out(t) x0 + c_skip(t) latents` with one timestep a sample: a single LCM step from noised `latents`
    /// `(batch, ..)` whose noise prediction implies `x0` ([`NoiseSchedule::predict_x0`]). Differentiable in both.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shapes differ or `timesteps` has not one entry a sample.
    pub fn apply(&self, x0: &Tensor, latents: &Tensor, timesteps: &[usize]) -> Result<Tensor> {
        const NAME: &str = "LcmBoundary::apply";
        same_shape(NAME, "x0", latents, x0)?;
        let out = per_sample(NAME, latents, timesteps, |t| Ok(self.c_out(t)))?;
        let skip = per_sample(NAME, latents, timesteps, |t| Ok(self.c_skip(t)))?;
        Ok((x0.broadcast_mul(&out)? + latents.broadcast_mul(&skip)?)?)
    }
}

/// The steps LCM was distilled on: every 20th timestep of 1000.
const ORIGINAL_INFERENCE_STEPS: usize = 50;

/// Multistep latent consistency sampling (Luo et al. 2023): predict the clean latents, noise them to the next
/// timestep, repeat.
///
/// diffusers' `LCMScheduler` with its `original_inference_steps` of 50. Four steps are t = 999, 759, 499, 259.
#[derive(Clone, Debug)]
pub struct Lcm {
    schedule: NoiseSchedule,
    boundary: LcmBoundary,
    timesteps: Vec<usize>,
}

impl Lcm {
    /// The sampler for 1 to 50 steps.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of steps, or for a schedule of fewer than 50 timesteps.
    pub fn new(schedule: &NoiseSchedule, steps: usize) -> Result<Self> {
        check_steps("Lcm::new", steps, ORIGINAL_INFERENCE_STEPS)?;
        let ratio = schedule.timestep_count() / ORIGINAL_INFERENCE_STEPS;
        if ratio == 0 {
            return Err(Error::argument(
                "Lcm::new",
                "schedule",
                format!("at least {ORIGINAL_INFERENCE_STEPS} timesteps"),
                schedule.timestep_count().to_string(),
            ));
        }
        // Evenly spaced among the distilled timesteps, from the noisiest on.
        let timesteps =
            (0..steps).map(|i| (ORIGINAL_INFERENCE_STEPS - i * ORIGINAL_INFERENCE_STEPS / steps) * ratio - 1).collect();
        Ok(Lcm { schedule: schedule.clone(), boundary: LcmBoundary::default(), timesteps })
    }

    /// [`step`](Sampler::step) with the noise given instead of drawn: standard normal, of the latents' shape. The last
    /// step adds none.
    ///
    /// # Errors
    /// As [`step`](Sampler::step).
    pub fn step_with_noise(
        &self,
        noise_prediction: &Tensor,
        i: usize,
        latents: &Tensor,
        noise: &Tensor,
    ) -> Result<Tensor> {
        same_shape("Lcm::step", "noise", latents, noise)?;
        let denoised = self.denoise(noise_prediction, i, latents)?;
        self.renoise(denoised, i, |_| Ok(noise.clone()))
    }

    /// The model's output with its boundary condition.
    fn denoise(&self, noise_prediction: &Tensor, i: usize, latents: &Tensor) -> Result<Tensor> {
        let x0 = self.predict_x0(noise_prediction, i, latents)?;
        let t = self.timesteps[i];
        Ok(((x0 * self.boundary.c_out(t))? + (latents * self.boundary.c_skip(t))?)?)
    }

    /// Brings clean latents to the timestep after step `i`; after the last step they stay clean.
    fn renoise(&self, denoised: Tensor, i: usize, noise: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let Some(&next) = self.timesteps.get(i + 1) else {
            return Ok(denoised);
        };
        let noise = noise(&denoised)?;
        let signal = (denoised * self.schedule.sqrt_alpha_cumprod(next)?)?;
        Ok((signal + (noise * self.schedule.sqrt_one_minus_alpha_cumprod(next)?)?)?)
    }
}

impl Sampler for Lcm {
    fn timesteps(&self) -> &[usize] {
        &self.timesteps
    }

    fn predict_x0(&self, noise_prediction: &Tensor, i: usize, latents: &Tensor) -> Result<Tensor> {
        let t = step_timestep("Lcm::step", &self.timesteps, i)?;
        let noise_scale = self.schedule.sqrt_one_minus_alpha_cumprod(t)?;
        remove_noise("Lcm::step", noise_prediction, latents, noise_scale, 1.0 / self.schedule.sqrt_alpha_cumprod(t)?)
    }

    fn step(&mut self, noise_prediction: &Tensor, i: usize, latents: &Tensor, noise: Address) -> Result<Tensor> {
        let denoised = self.denoise(noise_prediction, i, latents)?;
        // A purpose of its own and a step for every picture and step: no draw meets another, the initial noise included.
        let step = noise.step.wrapping_mul(ORIGINAL_INFERENCE_STEPS as u64).wrapping_add(i as u64);
        let address = Address { purpose: "lcm step noise", step, ..noise };
        self.renoise(denoised, i, |like| {
            address.normal_batch(like.dim(0)?, &like.dims()[1..], like.dtype(), like.device())
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn four_steps_are_spread_over_the_distilled_timesteps() -> Result<()> {
        let schedule = NoiseSchedule::sdxl();
        assert_eq!(Lcm::new(&schedule, 4)?.timesteps(), [999, 759, 499, 259]);
        assert_eq!(Lcm::new(&schedule, 1)?.timesteps(), [999]);
        assert_eq!(Lcm::new(&schedule, 50)?.timesteps()[49], 19);
        Ok(())
    }

    #[test]
    fn the_boundary_fades_as_in_the_official_code() {
        let boundary = LcmBoundary::default();
        for (t, skip, out) in [(0, 1.0, 0.0), (1, 0.00249, 0.99875), (2, 0.00062, 0.99969), (10, 2.5e-5, 0.99999)] {
            assert!((boundary.c_skip(t) - skip).abs() < 6e-6, "c_skip({t}) = {}", boundary.c_skip(t));
            assert!((boundary.c_out(t) - out).abs() < 6e-6, "c_out({t}) = {}", boundary.c_out(t));
        }
    }

    #[test]
    fn a_single_step_returns_the_latents_at_timestep_0_and_x0_later() -> Result<()> {
        let x0 = Tensor::full(2.0, (2, 4, 3, 3), &Device::Cpu)?;
        let latents = Tensor::full(5.0, (2, 4, 3, 3), &Device::Cpu)?;
        let output = LcmBoundary::default().apply(&x0, &latents, &[0, 900])?;
        assert_eq!(output.get(0)?.flatten_all()?.get(0)?.to_scalar::<f64>()?, 5.0);
        assert!((output.get(1)?.flatten_all()?.get(0)?.to_scalar::<f64>()? - 2.0).abs() < 1e-7);
        Ok(())
    }

    #[test]
    fn fresh_noise_is_that_of_the_address_differs_by_step_and_is_not_added_last() -> Result<()> {
        let mut sampler = Lcm::new(&NoiseSchedule::sdxl(), 4)?;
        let zeros = Tensor::zeros((2, 4, 2, 2), DType::F32, &Device::Cpu)?;
        let address = Address::new(1, "sampler noise");
        let step = |sampler: &mut Lcm, i: usize, address| -> Result<Vec<f32>> {
            Ok(sampler.step(&zeros, i, &zeros, address)?.flatten_all()?.to_vec1::<f32>()?)
        };
        let first = step(&mut sampler, 0, address)?;
        assert_eq!(first, step(&mut sampler, 0, address)?);
        assert_ne!(first, step(&mut sampler, 0, Address { seed: 2, ..address })?);
        let scale = |t| NoiseSchedule::sdxl().sqrt_one_minus_alpha_cumprod(t);
        let ratio = first[0] / step(&mut sampler, 1, address)?[0];
        assert!((f64::from(ratio) - scale(759)? / scale(499)?).abs() > 1e-3);
        assert!(step(&mut sampler, 3, address)?.iter().all(|&value| value == 0.0));
        Ok(())
    }
}

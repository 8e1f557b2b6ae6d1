//! The forward diffusion process: how much signal and how much noise a latent holds at each timestep.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::{Error, Result, ops};

/// The variance-preserving noise schedule `z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps`.
///
/// The coefficients are computed and kept in f64. A clone shares them.
#[derive(Clone, Debug)]
pub struct NoiseSchedule {
    alphas_cumprod: Arc<[f64]>,
}

impl NoiseSchedule {
    /// SDXL's schedule, which LCM-LoRA shares: [scaled linear](Self::scaled_linear) from 0.00085 to 0.012 over 1000
    /// timesteps (the published `scheduler_config.json`).
    pub fn sdxl() -> Self {
        Self::from_sqrt_betas(0.00085f64.sqrt(), 0.012f64.sqrt(), 1000)
    }

    /// Betas whose square roots are evenly spaced (`scaled_linear` of diffusers), over `timesteps` timesteps.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `0 < beta_start <= beta_end < 1` and `timesteps >= 2`.
    pub fn scaled_linear(beta_start: f64, beta_end: f64, timesteps: usize) -> Result<Self> {
        if !(0.0 < beta_start && beta_start <= beta_end && beta_end < 1.0) {
            return Err(Error::argument(
                "NoiseSchedule::scaled_linear",
                "beta_start, beta_end",
                "0 < beta_start <= beta_end < 1",
                format!("{beta_start}, {beta_end}"),
            ));
        }
        if timesteps < 2 {
            return Err(Error::argument(
                "NoiseSchedule::scaled_linear",
                "timesteps",
                "at least 2",
                timesteps.to_string(),
            ));
        }
        Ok(Self::from_sqrt_betas(beta_start.sqrt(), beta_end.sqrt(), timesteps))
    }

    fn from_sqrt_betas(start: f64, end: f64, timesteps: usize) -> Self {
        let alphas_cumprod = (0..timesteps)
            .scan(1.0, |product, t| {
                let sqrt_beta = start + (end - start) * t as f64 / (timesteps - 1) as f64;
                *product *= 1.0 - sqrt_beta * sqrt_beta;
                Some(*product)
            })
            .collect();
        NoiseSchedule { alphas_cumprod }
    }

    /// How many timesteps there are (1000 for SDXL); a timestep is in `0..timestep_count()`.
    pub fn timestep_count(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// `abar_t`, the signal's share of the variance, in `(0, 1)`, falling with `t`.
    ///
    /// # Errors
    /// [`Error::Argument`] where `t` is not a timestep; so for every accessor of the schedule.
    pub fn alpha_cumprod(&self, t: usize) -> Result<f64> {
        self.alphas_cumprod.get(t).copied().ok_or_else(|| {
            Error::argument(
                "NoiseSchedule",
                "timestep",
                format!("a timestep in 0..{}", self.timestep_count()),
                t.to_string(),
            )
        })
    }

    /// `sqrt(abar_t)`, the coefficient of the clean latents.
    ///
    /// # Errors
    /// As [`alpha_cumprod`](Self::alpha_cumprod).
    pub fn sqrt_alpha_cumprod(&self, t: usize) -> Result<f64> {
        Ok(self.alpha_cumprod(t)?.sqrt())
    }

    /// `sqrt(1 - abar_t)`, the coefficient of the noise.
    ///
    /// # Errors
    /// As [`alpha_cumprod`](Self::alpha_cumprod).
    pub fn sqrt_one_minus_alpha_cumprod(&self, t: usize) -> Result<f64> {
        Ok((1.0 - self.alpha_cumprod(t)?).sqrt())
    }

    /// `sigma_t = sqrt((1 - abar_t) / abar_t)`, the ratio of noise to signal (the sigma of Karras et al. 2022 and of
    /// diffusers' Euler and DPM-Solver schedulers).
    ///
    /// # Errors
    /// As [`alpha_cumprod`](Self::alpha_cumprod).
    pub fn sigma(&self, t: usize) -> Result<f64> {
        let alpha_cumprod = self.alpha_cumprod(t)?;
        Ok(((1.0 - alpha_cumprod) / alpha_cumprod).sqrt())
    }

    /// Clean latents `(batch, ..)` brought to one timestep a sample:
    /// `sqrt(abar_t) latents + sqrt(1 - abar_t) noise`, in the latents' dtype (computed in f32 for bf16
    /// and f16). Differentiable in both tensors.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shapes differ, where `timesteps` has not one entry a sample, or where one is out
    /// of range.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timesteps: &[usize]) -> Result<Tensor> {
        const NAME: &str = "NoiseSchedule::add_noise";
        same_shape(NAME, "noise", latents, noise)?;
        let (wide, noise) = (ops::widen(latents)?, ops::widen(noise)?);
        let signal = per_sample(NAME, &wide, timesteps, |t| self.sqrt_alpha_cumprod(t))?;
        let spread = per_sample(NAME, &wide, timesteps, |t| self.sqrt_one_minus_alpha_cumprod(t))?;
        ops::cast(&(wide.broadcast_mul(&signal)? + noise.broadcast_mul(&spread)?)?, latents.dtype())
    }

    /// The clean latents that a noise prediction implies, one timestep a sample (equation 3):
    /// `(latents - sqrt(1 - abar_t) noise_prediction) / sqrt(abar_t)`. Differentiable in both tensors.
    ///
    /// # Errors
    /// As [`add_noise`](Self::add_noise).
    pub fn predict_x0(&self, latents: &Tensor, noise_prediction: &Tensor, timesteps: &[usize]) -> Result<Tensor> {
        const NAME: &str = "NoiseSchedule::predict_x0";
        same_shape(NAME, "noise_prediction", latents, noise_prediction)?;
        let (wide, noise) = (ops::widen(latents)?, ops::widen(noise_prediction)?);
        let scale = per_sample(NAME, &wide, timesteps, |t| Ok(1.0 / self.sqrt_alpha_cumprod(t)?))?;
        let sigma = per_sample(NAME, &wide, timesteps, |t| self.sigma(t))?;
        ops::cast(&(wide.broadcast_mul(&scale)? - noise.broadcast_mul(&sigma)?)?, latents.dtype())
    }
}

/// Refuses a tensor whose shape is not that of the latents.
pub(super) fn same_shape(
    function: &'static str,
    argument: &'static str,
    latents: &Tensor,
    other: &Tensor,
) -> Result<()> {
    if latents.dims() != other.dims() {
        return Err(Error::argument(
            function,
            argument,
            format!("the shape of the latents, {:?}", latents.dims()),
            format!("{:?}", other.dims()),
        ));
    }
    Ok(())
}

/// One coefficient a sample as a constant of shape `(batch, 1, ..)` that broadcasts over `latents`.
pub(crate) fn per_sample(
    function: &'static str,
    latents: &Tensor,
    timesteps: &[usize],
    coefficient: impl Fn(usize) -> Result<f64>,
) -> Result<Tensor> {
    let batch = latents.dims().first().copied().unwrap_or(0);
    if batch != timesteps.len() {
        return Err(Error::argument(
            function,
            "timesteps",
            format!("one a sample, for latents of shape {:?}", latents.dims()),
            format!("{} timesteps", timesteps.len()),
        ));
    }
    let values = timesteps.iter().map(|&t| coefficient(t)).collect::<Result<Vec<f64>>>()?;
    let mut shape = vec![1; latents.rank()];
    shape[0] = batch;
    // Converted on the host, since f64 does not exist on every device.
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(latents.dtype())?.to_device(latents.device())?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::*;
    use crate::random::Address;

    fn normal(purpose: &'static str) -> Result<Tensor> {
        Address::new(3, purpose).normal((2, 4, 3, 3), DType::F64, &Device::Cpu)
    }

    #[test]
    fn sdxl_keeps_nearly_all_signal_at_0_and_little_at_999() -> Result<()> {
        let schedule = NoiseSchedule::sdxl();
        assert_eq!(schedule.timestep_count(), 1000);
        assert!((schedule.alpha_cumprod(0)? - 0.99915).abs() < 1e-12);
        // diffusers: EulerDiscreteScheduler.sigmas[0] = 14.6146.
        assert!((schedule.sigma(999)? - 14.6146).abs() < 1e-3);
        Ok(())
    }

    #[test]
    fn predict_x0_undoes_add_noise_for_a_different_timestep_a_sample() -> Result<()> {
        let schedule = NoiseSchedule::sdxl();
        let (latents, noise) = (normal("latents")?, normal("noise")?);
        let noised = schedule.add_noise(&latents, &noise, &[3, 940])?;
        let back = schedule.predict_x0(&noised, &noise, &[3, 940])?;
        let error = (back - latents)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(error < 1e-12, "{error}");
        Ok(())
    }

    #[test]
    fn gradients_reach_latents_and_noise_with_the_coefficients_of_each_sample() -> Result<()> {
        let schedule = NoiseSchedule::sdxl();
        let (latents, noise) = (Var::from_tensor(&normal("latents")?)?, Var::from_tensor(&normal("noise")?)?);
        let gradients = schedule.predict_x0(&latents, &noise, &[10, 700])?.sum_all()?.backward()?;
        for (sample, t) in [(0, 10), (1, 700)] {
            let of = |var: &Var| -> Result<f64> {
                let gradient = gradients.get(var).ok_or_else(|| Error::argument("test", "var", "gradient", "none"))?;
                Ok(gradient.get(sample)?.flatten_all()?.get(0)?.to_scalar()?)
            };
            assert!((of(&latents)? - 1.0 / schedule.sqrt_alpha_cumprod(t)?).abs() < 1e-12);
            assert!((of(&noise)? + schedule.sigma(t)?).abs() < 1e-12);
        }
        Ok(())
    }

    #[test]
    fn f32_latents_stay_f32() -> Result<()> {
        let latents = normal("latents")?.to_dtype(DType::F32)?;
        assert_eq!(NoiseSchedule::sdxl().add_noise(&latents, &latents, &[1, 2])?.dtype(), DType::F32);
        Ok(())
    }

    #[test]
    fn wrong_timesteps_and_shapes_are_argument_errors() -> Result<()> {
        let schedule = NoiseSchedule::sdxl();
        let latents = normal("latents")?;
        let refused = |result: Result<Tensor>| matches!(result, Err(Error::Argument { .. }));
        assert!(refused(schedule.add_noise(&latents, &latents, &[1])));
        assert!(refused(schedule.add_noise(&latents, &latents, &[1, 1000])));
        assert!(refused(schedule.add_noise(&latents, &latents.get(0)?, &[1, 2])));
        assert!(NoiseSchedule::scaled_linear(0.0, 0.1, 10).is_err());
        assert!(NoiseSchedule::scaled_linear(0.1, 0.2, 1).is_err());
        Ok(())
    }
}

//! The loss of consistency models (Song et al. 2023) on the LCM path.

use candle_core::Tensor;

use crate::schedule::{LcmBoundary, NoiseSchedule};
use crate::{Result, ops};

/// The timesteps `skip` before these, at least 0.
pub fn earlier_timesteps(timesteps: &[usize], skip: usize) -> Vec<usize> {
    timesteps.iter().map(|timestep| timestep.saturating_sub(skip)).collect()
}

/// One step of DDIM (Song et al. 2020) along the path of the model's own sampling, from each sample's timestep `from` to
/// its timestep `to`: `sqrt(abar_to) z_0(latents, noise_prediction) + sqrt(1 - abar_to) noise_prediction`.
///
/// `latents` and `noise_prediction`: `(batch, channels, height, width)`. Differentiable in both.
///
/// # Errors
/// [`crate::Error::Argument`] where shapes or timesteps do not fit.
pub fn ddim_step(
    schedule: &NoiseSchedule,
    latents: &Tensor,
    noise_prediction: &Tensor,
    from: &[usize],
    to: &[usize],
) -> Result<Tensor> {
    let clean = schedule.predict_x0(latents, noise_prediction, from)?;
    schedule.add_noise(&clean, noise_prediction, to)
}

/// The consistency function `f(z_t, t) = c_skip(t) z_t + c_out(t) z_0` of a model with the LCM-LoRA (Luo et al. 2023,
/// equation 9), from its noise prediction. `latents` and `noise_prediction`: `(batch, channels, height, width)`.
/// Differentiable in both.
///
/// # Errors
/// [`crate::Error::Argument`] where shapes or timesteps do not fit.
pub fn consistency_function(
    schedule: &NoiseSchedule,
    latents: &Tensor,
    noise_prediction: &Tensor,
    timesteps: &[usize],
) -> Result<Tensor> {
    LcmBoundary::default().apply(&schedule.predict_x0(latents, noise_prediction, timesteps)?, latents, timesteps)
}

/// Consistency distillation (Song et al. 2023, equation 7): the mean squared difference of the consistency function at
/// two neighbouring points of one path of the model, `f(z_t, t)` and `f(z_s, s)` with `s < t`; at least f32.
///
/// `z_s` is [`ddim_step`] of the model without the LCM-LoRA. Both arguments are results of [`consistency_function`],
/// `(batch, channels, height, width)`; the gradient flows to the first alone. (Song et al. take the second from a moving
/// average of the weights. Here the function's own weights are frozen, only its conditions are trained, so it is the
/// function itself.)
///
/// # Errors
/// [`crate::Error::Candle`] where the shapes differ.
pub fn consistency_loss(at_timestep: &Tensor, at_earlier: &Tensor) -> Result<Tensor> {
    Ok((ops::widen(at_timestep)? - ops::widen(&at_earlier.detach())?)?.sqr()?.mean_all()?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::autograd::check_gradients;
    use crate::random::Address;

    fn normal(purpose: &'static str) -> Result<Tensor> {
        Address::new(6, purpose).normal((2, 4, 3, 3), DType::F64, &Device::Cpu)
    }

    #[test]
    fn a_ddim_step_is_that_of_the_sampler() -> Result<()> {
        use crate::schedule::{Ddim, Sampler};
        let schedule = NoiseSchedule::sdxl();
        let mut sampler = Ddim::new(&schedule, 50)?;
        let (latents, noise) = (normal("latents")?, normal("noise")?);
        for i in [0, 6, 48] {
            let (from, to) = (sampler.timesteps()[i], sampler.timesteps()[i + 1]);
            let expected = sampler.step(&noise, i, &latents, Address::new(0, "unused"))?;
            let found = ddim_step(&schedule, &latents, &noise, &[from; 2], &[to; 2])?;
            let error = (found - expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(error < 1e-12, "{from} to {to}: {error}");
        }
        Ok(())
    }

    #[test]
    fn a_function_that_knows_the_clean_latents_has_no_loss_along_the_path() -> Result<()> {
        let schedule = NoiseSchedule::sdxl();
        let (clean, noise) = (normal("clean")?, normal("noise")?);
        let timesteps = [15, 930];
        let ends = earlier_timesteps(&timesteps, 20);
        assert_eq!(ends, [0, 910]);
        let latents = schedule.add_noise(&clean, &noise, &timesteps)?;
        let stepped = ddim_step(&schedule, &latents, &noise, &timesteps, &ends)?;
        let here = consistency_function(&schedule, &latents, &noise, &timesteps)?;
        let there = consistency_function(&schedule, &stepped, &noise, &ends)?;
        // At timestep 0 the function is the latents themselves, with the little noise they then have.
        let sample = |i: usize| consistency_loss(&here.get(i)?, &there.get(i)?)?.to_scalar::<f64>().map_err(Into::into);
        let loss: Result<Vec<f64>> = (0..2).map(sample).collect();
        let loss = loss?;
        assert!(loss[1] < 1e-12 && loss[0] > 1e-5 && loss[0] < 2e-3, "{loss:?}");
        Ok(())
    }

    #[test]
    fn value_and_gradient_are_those_of_the_mean_squared_difference_from_a_fixed_target() -> Result<()> {
        let schedule = NoiseSchedule::sdxl();
        let (latents, target, noise) = (normal("latents")?, normal("target")?, normal("noise")?);
        let check = check_gradients(&[latents.clone(), noise.clone()], |x| {
            let here = consistency_function(&schedule, &x[0], &x[1], &[1, 500])?;
            Ok(vec![consistency_loss(&here, &target)?])
        })?;
        assert!(check.worst() < 1e-6 && check.norms.iter().all(|norm| *norm > 1e-3), "{check:?}");
        let here = consistency_function(&schedule, &latents, &noise, &[1, 500])?;
        let expected = (&here - &target)?.sqr()?.sum_all()?.to_scalar::<f64>()? / 72.0;
        assert!((consistency_loss(&here, &target)?.to_scalar::<f64>()? - expected).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn the_target_gets_no_gradient() -> Result<()> {
        let (here, there) = (Var::from_tensor(&normal("latents")?)?, Var::from_tensor(&normal("target")?)?);
        let gradients = consistency_loss(&here, &there)?.backward()?;
        assert!(gradients.get(&there).is_none() && gradients.get(&here).is_some());
        Ok(())
    }
}

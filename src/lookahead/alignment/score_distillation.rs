//! Score distillation sampling (Poole et al. 2023) of the preview.

use candle_core::Tensor;

use crate::schedule::{NoiseSchedule, per_sample};
use crate::{Result, ops};

/// A scalar whose gradient by the preview is that of score distillation sampling (Poole et al. 2023, equation 3), over
/// the number of elements `n`, as a mean has it: `w(t) (eps_hat(z_t; t) - eps) / n` with `w(t) = 1 - abar_t`.
///
/// `previews`: the clean latents of the LCM path, `(batch, channels, height, width)`; `noise`: of the same shape;
/// `timesteps`: one a sample, drawn anew, not those of the preview. `predict` is the model without the LCM-LoRA: from
/// previews noised to `timesteps`, in the previews' dtype, to its noise prediction. No gradient passes through it (the
/// Jacobian that score distillation leaves out), nor is the noised preview part of a graph.
///
/// The value is `mean(w(t)^2 (eps_hat - eps)^2) / 2`: half the squared length of the step it asks for. It is no potential
/// of that gradient, so it can be watched, but need not fall. At least f32.
///
/// # Errors
/// [`crate::Error::Argument`] where shapes or timesteps do not fit; those of `predict`.
pub fn score_distillation(
    schedule: &NoiseSchedule,
    previews: &Tensor,
    noise: &Tensor,
    timesteps: &[usize],
    predict: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let clean = previews.detach();
    let noised = schedule.add_noise(&clean, noise, timesteps)?;
    let prediction = ops::widen(&predict(&noised)?.detach())?;
    let clean = ops::widen(&clean)?;
    let weights = per_sample("score_distillation", &clean, timesteps, |t| Ok(1.0 - schedule.alpha_cumprod(t)?))?;
    let direction = (prediction - ops::widen(&noise.detach())?)?.broadcast_mul(&weights)?;
    // Half the squared distance from where a step against the direction would end has the direction as its gradient.
    let target = (clean - direction)?;
    Ok(((ops::widen(previews)? - target)?.sqr()?.mean_all()? * 0.5)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::Error;
    use crate::random::Address;

    fn normal(purpose: &'static str) -> Result<Tensor> {
        Address::new(5, purpose).normal((2, 4, 3, 3), DType::F64, &Device::Cpu)
    }

    /// Anything nonlinear will do for a model.
    fn model(noised: &Tensor) -> Result<Tensor> {
        Ok((noised.tanh()? * 0.7)?)
    }

    #[test]
    fn the_gradient_is_the_weighted_difference_of_predicted_and_added_noise() -> Result<()> {
        let (schedule, timesteps) = (NoiseSchedule::sdxl(), [40, 900]);
        let (previews, noise) = (Var::from_tensor(&normal("previews")?)?, normal("noise")?);
        let loss = score_distillation(&schedule, &previews, &noise, &timesteps, model)?;
        let gradients = loss.backward()?;
        let gradient =
            gradients.get(&previews).ok_or_else(|| Error::argument("test", "previews", "gradient", "none"))?;

        let noised = schedule.add_noise(&previews.as_detached_tensor(), &noise, &timesteps)?;
        let difference = (model(&noised)? - &noise)?;
        let mut value = 0.0;
        for (sample, t) in timesteps.into_iter().enumerate() {
            let weight = 1.0 - schedule.alpha_cumprod(t)?;
            let expected = (difference.get(sample)? * weight)?;
            let error = (gradient.get(sample)? - (&expected / 72.0)?)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(error < 1e-15, "{error}");
            value += expected.sqr()?.sum_all()?.to_scalar::<f64>()? / 144.0;
        }
        assert!((loss.to_scalar::<f64>()? - value).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn no_gradient_reaches_the_model() -> Result<()> {
        let (previews, noise) = (Var::from_tensor(&normal("previews")?)?, normal("noise")?);
        let weight = Var::from_tensor(&normal("weight")?)?;
        let predict = |noised: &Tensor| Ok((noised * weight.as_tensor())?);
        let gradients =
            score_distillation(&NoiseSchedule::sdxl(), &previews, &noise, &[10, 500], predict)?.backward()?;
        assert!(gradients.get(&weight).is_none() && gradients.get(&previews).is_some());
        Ok(())
    }

    #[test]
    fn steps_against_the_gradient_lead_to_the_models_distribution() -> Result<()> {
        // The model of data that are all one picture predicts the noise exactly from its distance.
        let schedule = NoiseSchedule::sdxl();
        let (data, mut previews) = (normal("data")?, normal("previews")?);
        let distance = |previews: &Tensor| -> Result<f64> {
            Ok((previews - &data)?.sqr()?.mean_all()?.sqrt()?.to_scalar::<f64>()?)
        };
        let before = distance(&previews)?;
        for step in 0..60 {
            let address = Address::new(8, "noise").step(step);
            let noise = address.normal((2, 4, 3, 3), DType::F64, &Device::Cpu)?;
            let timesteps = [300 + step as usize, 700];
            let variable = Var::from_tensor(&previews)?;
            let perfect = |noised: &Tensor| {
                let (signal, spread) = (schedule.add_noise(&data, &data.zeros_like()?, &timesteps)?, |i: usize| {
                    schedule.sqrt_one_minus_alpha_cumprod(timesteps[i])
                });
                let difference = (noised - signal)?;
                let samples = [(difference.get(0)? / spread(0)?)?, (difference.get(1)? / spread(1)?)?];
                Ok(Tensor::stack(&samples, 0)?)
            };
            let gradients = score_distillation(&schedule, &variable, &noise, &timesteps, perfect)?.backward()?;
            let Some(gradient) = gradients.get(&variable) else { panic!("no gradient") };
            previews = (previews - (gradient * (72.0 * 0.2))?)?;
        }
        assert!(distance(&previews)? < 0.05 * before, "{} of {before}", distance(&previews)?);
        Ok(())
    }

    #[test]
    fn noise_of_another_shape_is_refused() -> Result<()> {
        let previews = normal("previews")?;
        let result = score_distillation(&NoiseSchedule::sdxl(), &previews, &previews.get(0)?, &[1, 2], model);
        assert!(matches!(result, Err(Error::Argument { .. })));
        Ok(())
    }
}

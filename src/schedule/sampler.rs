//! What every sampler offers, and the names they go by.

use std::fmt;
use std::str::FromStr;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::noise_schedule::same_shape;
use super::{Ddim, DpmSolverPlusPlus, Euler, Lcm, NoiseSchedule};
use crate::random::Address;
use crate::{Error, Result};

/// A walk from noise to clean latents, in diffusers' terms.
///
/// Latents have any shape `(batch, ..)` and dtype; all samples of the batch stand at the same timestep. Start from
/// `init_noise_sigma() * noise`, then for each step `i`: evaluate the U-Net on `scale_model_input(latents, i)` at
/// `timesteps()[i]` and hand its (guided) noise prediction to [`step`](Self::step). Everything is differentiable.
pub trait Sampler: Send {
    /// The timestep of every step, falling.
    fn timesteps(&self) -> &[usize];

    /// The standard deviation of the initial latents.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    /// The latents as the U-Net expects them at step `i` (variance preserving).
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no step `i`.
    fn scale_model_input(&self, latents: &Tensor, i: usize) -> Result<Tensor> {
        step_timestep("Sampler::scale_model_input", self.timesteps(), i)?;
        Ok(latents.clone())
    }

    /// The clean latents that a noise prediction implies at step `i`, from the sampler's own latents (before
    /// [`scale_model_input`](Self::scale_model_input)). Image-space guidance looks at these.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no step `i` or the shapes differ.
    fn predict_x0(&self, noise_prediction: &Tensor, i: usize, latents: &Tensor) -> Result<Tensor>;

    /// The latents of step `i + 1`; after the last step, the clean latents.
    ///
    /// Steps are to be taken in order; a sampler that remembers earlier steps starts afresh at step 0. Only a
    /// stochastic sampler looks at `noise`, the address of these pictures: pass the same one at every step, the sampler
    /// draws fresh noise for each step and sample under a purpose of its own.
    ///
    /// # Errors
    /// As [`predict_x0`](Self::predict_x0).
    fn step(&mut self, noise_prediction: &Tensor, i: usize, latents: &Tensor, noise: Address) -> Result<Tensor>;
}

/// A sampler by name: `"ddim"`, `"euler"`, `"dpm++"` or `"lcm"`, on the command line and in configuration files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SamplerKind {
    /// [`Ddim`].
    #[serde(rename = "ddim")]
    Ddim,
    /// [`Euler`].
    #[serde(rename = "euler")]
    Euler,
    /// [`DpmSolverPlusPlus`], the default.
    #[default]
    #[serde(rename = "dpm++")]
    DpmSolverPlusPlus,
    /// [`Lcm`].
    #[serde(rename = "lcm")]
    Lcm,
}

impl SamplerKind {
    /// All samplers.
    pub const ALL: [SamplerKind; 4] =
        [SamplerKind::Ddim, SamplerKind::Euler, SamplerKind::DpmSolverPlusPlus, SamplerKind::Lcm];

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            SamplerKind::Ddim => "ddim",
            SamplerKind::Euler => "euler",
            SamplerKind::DpmSolverPlusPlus => "dpm++",
            SamplerKind::Lcm => "lcm",
        }
    }

    /// The sampler for this many steps.
    ///
    /// # Errors
    /// [`Error::Argument`] for a number of steps that it cannot take.
    pub fn build(self, schedule: &NoiseSchedule, steps: usize) -> Result<Box<dyn Sampler>> {
        Ok(match self {
            SamplerKind::Ddim => Box::new(Ddim::new(schedule, steps)?),
            SamplerKind::Euler => Box::new(Euler::new(schedule, steps)?),
            SamplerKind::DpmSolverPlusPlus => Box::new(DpmSolverPlusPlus::new(schedule, steps)?),
            SamplerKind::Lcm => Box::new(Lcm::new(schedule, steps)?),
        })
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for SamplerKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        SamplerKind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let names = SamplerKind::ALL.map(|kind| format!("`{kind}`")).join(", ");
            Error::argument("SamplerKind::from_str", "name", format!("one of {names}"), format!("`{name}`"))
        })
    }
}

/// The timestep of step `i`, or an error that names `function`.
pub(super) fn step_timestep(function: &'static str, timesteps: &[usize], i: usize) -> Result<usize> {
    timesteps
        .get(i)
        .copied()
        .ok_or_else(|| Error::argument(function, "i", format!("a step in 0..{}", timesteps.len()), i.to_string()))
}

/// Refuses a number of steps outside `1..=most`.
pub(super) fn check_steps(function: &'static str, steps: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&steps) {
        return Ok(());
    }
    Err(Error::argument(function, "steps", format!("1 to {most} steps"), steps.to_string()))
}

/// `steps` falling timesteps, `ratio` apart, the last at `first`: diffusers' "leading" spacing with SDXL's
/// `steps_offset` of 1. Where the offset would lead out of the schedule (as many steps as timesteps) it is left out.
pub(super) fn leading(steps: usize, ratio: usize, first: usize, timestep_count: usize) -> Vec<usize> {
    const STEPS_OFFSET: usize = 1;
    let offset = if first + (steps - 1) * ratio + STEPS_OFFSET < timestep_count { STEPS_OFFSET } else { 0 };
    (0..steps).rev().map(|i| first + i * ratio + offset).collect()
}

/// `(latents - noise_scale noise_prediction) signal_scale`, the clean latents; checks the shapes.
pub(super) fn remove_noise(
    function: &'static str,
    noise_prediction: &Tensor,
    latents: &Tensor,
    noise_scale: f64,
    signal_scale: f64,
) -> Result<Tensor> {
    same_shape(function, "noise_prediction", latents, noise_prediction)?;
    Ok((((latents - (noise_prediction * noise_scale)?)?) * signal_scale)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    #[test]
    fn every_name_is_read_back_and_is_the_name_in_files() -> anyhow::Result<()> {
        for kind in SamplerKind::ALL {
            assert_eq!(kind.to_string().parse::<SamplerKind>()?, kind);
            assert_eq!(serde_json::to_string(&kind)?, format!("\"{kind}\""));
        }
        let message = "heun".parse::<SamplerKind>().map_err(|error| error.to_string());
        assert!(matches!(message, Err(text) if text.contains("`dpm++`") && text.contains("`heun`")));
        Ok(())
    }

    #[test]
    fn impossible_step_counts_are_argument_errors() {
        for kind in SamplerKind::ALL {
            for steps in [0, 1001, usize::MAX] {
                let result = kind.build(&NoiseSchedule::sdxl(), steps);
                assert!(matches!(result, Err(Error::Argument { .. })), "{kind} {steps}");
            }
        }
    }

    #[test]
    fn timesteps_fall_within_the_schedule_for_every_possible_step_count() -> Result<()> {
        for kind in SamplerKind::ALL {
            for steps in 1..=1000 {
                let Ok(sampler) = kind.build(&NoiseSchedule::sdxl(), steps) else {
                    assert!(matches!((kind, steps), (SamplerKind::Lcm, 51..) | (SamplerKind::DpmSolverPlusPlus, 1000)));
                    continue;
                };
                assert_eq!(sampler.timesteps().len(), steps);
                assert!(sampler.timesteps().windows(2).all(|pair| pair[0] > pair[1]), "{kind} {steps}");
                assert!(sampler.timesteps()[0] < 1000, "{kind} {steps}");
            }
        }
        Ok(())
    }

    /// A perfect model leaves a sampler no excuse: it must end exactly at the noise level where its walk ends.
    #[test]
    fn with_the_true_noise_every_sampler_ends_at_the_clean_latents() -> Result<()> {
        let draw = |purpose| Address::new(0, purpose).normal((1, 4, 5, 5), DType::F64, &Device::Cpu);
        let (clean, noise, schedule) = (draw("clean")?, draw("noise")?, NoiseSchedule::sdxl());
        let distance = |a: &Tensor, b: &Tensor| -> Result<f64> { Ok((a - b)?.abs()?.max_all()?.to_scalar()?) };
        for kind in SamplerKind::ALL {
            // DDIM and DPM-Solver stop at timestep 0, whose sigma is 0.029; LCM's c_skip is below 1e-6 here.
            let (end, tolerance) = match kind {
                SamplerKind::Ddim | SamplerKind::DpmSolverPlusPlus => (schedule.add_noise(&clean, &noise, &[0])?, 1e-9),
                SamplerKind::Euler => (clean.clone(), 1e-9),
                SamplerKind::Lcm => (clean.clone(), 1e-5),
            };
            for steps in [1, 2, 4, 20] {
                let mut sampler = kind.build(&schedule, steps)?;
                let start = schedule.add_noise(&clean, &noise, &[sampler.timesteps()[0]])?;
                let mut latents = (start * sampler.init_noise_sigma())?;
                for i in 0..steps {
                    let t = sampler.timesteps()[i];
                    let signal = (&clean * schedule.sqrt_alpha_cumprod(t)?)?;
                    let spread = schedule.sqrt_one_minus_alpha_cumprod(t)?;
                    let prediction = ((sampler.scale_model_input(&latents, i)? - signal)? / spread)?;
                    assert!(distance(&sampler.predict_x0(&prediction, i, &latents)?, &clean)? < 1e-9, "{kind} at {i}");
                    latents = sampler.step(&prediction, i, &latents, Address::new(0, "step"))?;
                }
                let error = distance(&latents, &end)?;
                assert!(error < tolerance, "{kind} with {steps} steps: {error}");
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_flow_from_the_next_latents_to_both_inputs() -> Result<()> {
        for kind in SamplerKind::ALL {
            let mut sampler = kind.build(&NoiseSchedule::sdxl(), 4)?;
            let latents = Var::ones((1, 2, 2, 2), DType::F64, &Device::Cpu)?;
            let prediction = Var::ones((1, 2, 2, 2), DType::F64, &Device::Cpu)?;
            let next = sampler.step(&prediction, 0, &latents, Address::new(0, "step"))?;
            let gradients = next.sum_all()?.backward()?;
            for var in [&latents, &prediction] {
                let gradient = gradients.get(var).map(|g| g.abs()?.min_all()?.to_scalar::<f64>()).transpose()?;
                assert!(gradient.is_some_and(|g| g > 1e-6), "{kind}: {gradient:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_step_beyond_the_last_and_a_wrong_shape_are_argument_errors() -> Result<()> {
        let latents = Tensor::zeros((1, 4, 2, 2), DType::F32, &Device::Cpu)?;
        let noise = Address::new(0, "step");
        for kind in SamplerKind::ALL {
            let mut sampler = kind.build(&NoiseSchedule::sdxl(), 4)?;
            assert!(matches!(sampler.step(&latents, 4, &latents, noise), Err(Error::Argument { .. })));
            assert!(matches!(sampler.scale_model_input(&latents, 4), Err(Error::Argument { .. })));
            assert!(matches!(sampler.step(&latents.get(0)?, 0, &latents, noise), Err(Error::Argument { .. })));
        }
        Ok(())
    }
}

//! The preview: what the final image will be, after one step of the LCM denoiser.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::schedule::{LcmBoundary, NoiseSchedule};

/// How the preview is computed from the noise prediction of the LCM denoiser.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreviewForm {
    /// Equation 3 of the paper: the plain prediction of the clean latents.
    #[default]
    #[serde(rename = "eq3")]
    Equation3,
    /// With the boundary condition of consistency models, as the official code: `c_out x0 + c_skip z_t`. Differs from
    /// equation 3 at timesteps 0 and 1 only.
    Boundary,
}

/// Through which denoiser an image loss looks at the picture to come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreviewPath {
    /// The LCM denoiser: the lookahead of the paper.
    #[default]
    Lcm,
    /// The denoiser itself: the one-step DDPM approximation of the clean picture, which the paper's ablation compares
    /// with (table 2, "ID-Loss x0").
    X0,
}

/// Equation 3: `z_0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)`.
///
/// `latents` z_t and `noise_prediction` eps: `(batch, channels, height, width)`; `timesteps`: one a sample. Returns
/// clean latents of the same shape; the gradient flows to both tensors.
///
/// # Errors
/// [`crate::Error::Argument`] for a timestep outside the schedule or another number of timesteps than samples.
pub fn preview(
    schedule: &NoiseSchedule,
    latents: &Tensor,
    noise_prediction: &Tensor,
    timesteps: &[usize],
    form: PreviewForm,
) -> Result<Tensor> {
    let x0 = schedule.predict_x0(latents, noise_prediction, timesteps)?;
    match form {
        PreviewForm::Equation3 => Ok(x0),
        PreviewForm::Boundary => LcmBoundary::default().apply(&x0, latents, timesteps),
    }
}

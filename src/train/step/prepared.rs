//! A batch as the frozen networks encode it.

use candle_core::Tensor;

use crate::models::unet::Conditioning;
use crate::{Result, ops};

/// A batch after everything that needs no gradient.
pub struct Prepared {
    /// Latents of the targets, `(batch, channels, height, width)`.
    pub(super) target_latents: Tensor,
    /// Latents of the conditioning images, of the same shape.
    pub(super) conditioning_latents: Tensor,
    /// Conditioning images, `(batch, 3, height, width)`, which the image losses compare with.
    pub(super) conditioning_images: Tensor,
    /// The noise both are noised with; f32 beside latents of bf16 or f16.
    pub(in crate::train) noise: Tensor,
    pub(super) features: Tensor,
    pub(in crate::train) null_features: Tensor,
    pub(in crate::train) text: Conditioning,
    pub(super) encoder_text: Conditioning,
}

impl Prepared {
    pub(super) fn narrow(&self, count: usize) -> Result<Prepared> {
        self.select(&(0..count).collect::<Vec<_>>())
    }

    pub(super) fn select(&self, samples: &[usize]) -> Result<Prepared> {
        let text = |conditioning: &Conditioning| -> Result<Conditioning> {
            Ok(Conditioning {
                hidden_states: ops::select_samples(&conditioning.hidden_states, samples)?,
                pooled: ops::select_samples(&conditioning.pooled, samples)?,
                time_ids: samples.iter().map(|i| conditioning.time_ids[*i]).collect(),
            })
        };
        Ok(Prepared {
            target_latents: ops::select_samples(&self.target_latents, samples)?,
            conditioning_latents: ops::select_samples(&self.conditioning_latents, samples)?,
            conditioning_images: ops::select_samples(&self.conditioning_images, samples)?,
            noise: ops::select_samples(&self.noise, samples)?,
            features: ops::select_samples(&self.features, samples)?,
            null_features: self.null_features.clone(),
            text: text(&self.text)?,
            encoder_text: text(&self.encoder_text)?,
        })
    }
}

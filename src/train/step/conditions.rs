//! What the denoiser is conditioned on.

use candle_core::Tensor;

use crate::models::unet::{ImageTokens, KeyValues};
use crate::random::Address;
use crate::{Result, ops};

/// What the encoder makes of a batch at its timesteps, and the noised targets.
pub(in crate::train) struct Conditions {
    pub(in crate::train) noised: Tensor,
    pub(in crate::train) image_tokens: ImageTokens,
    pub(in crate::train) reference: Option<KeyValues>,
    /// Where it was drawn which reference tokens are dropped.
    pub(in crate::train) kv_drop: Address,
}

impl Conditions {
    pub(super) fn select(&self, samples: &[usize]) -> Result<Conditions> {
        self.map(|tensor| ops::select_samples(tensor, samples))
    }

    /// The same, no part of any graph.
    pub(super) fn detached(&self) -> Result<Conditions> {
        self.map(|tensor| Ok(tensor.detach()))
    }

    fn map(&self, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Conditions> {
        let key_values = |key_values: &KeyValues| key_values.map(|_, tensor| change(tensor));
        Ok(Conditions {
            noised: change(&self.noised)?,
            image_tokens: ImageTokens {
                key_values: key_values(&self.image_tokens.key_values)?,
                scale: self.image_tokens.scale,
            },
            reference: self.reference.as_ref().map(key_values).transpose()?,
            kv_drop: self.kv_drop,
        })
    }
}

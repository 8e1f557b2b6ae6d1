//! Networks, one file or folder each, with tensors named as their published checkpoints name them.
//!
//! Every network has a `Config` with presets (`mini()` among them), and a `load(&Config, &Weights)`; whether it is
//! frozen or trainable is the choice of the [`Weights`](crate::nn::Weights). Images and latents are NCHW at the public
//! border and channels-last inside.

pub mod autoencoder_kl;
pub mod clip_alignment;
pub mod clip_image_processor;
mod clip_layers;
pub mod clip_text;
pub mod clip_vision;
pub mod face_locator;
pub mod identity;
pub mod ip_adapter;
pub mod ir_resnet;
pub mod iresnet;
pub mod lpips;
pub mod mini_face_locator;
pub mod mini_identity;
pub mod mobile_face_net;
mod on_demand;
pub mod resampler;
pub mod roles;
pub mod sdxl_text;
pub mod sface;
pub mod taesd;
pub mod tokenizer;
pub mod unet;
pub mod yunet;

use candle_core::Tensor;
pub use on_demand::OnDemand;

pub(crate) use crate::ops::{to_channels_first, to_channels_last};
use crate::{Error, Result};

/// Checks that `images` is `(batch, 3, height, width)`, and returns batch, height and width.
pub(crate) fn image_dims(function: &'static str, images: &Tensor) -> Result<(usize, usize, usize)> {
    match images.dims() {
        &[batch, 3, height, width] if batch > 0 && height > 0 && width > 0 => Ok((batch, height, width)),
        other => Err(Error::argument(function, "images", "(batch, 3, height, width)", format!("{other:?}"))),
    }
}

#[cfg(test)]
mod mini_tests {
    use crate::Result;
    use crate::nn::Weights;

    #[test]
    fn all_mini_networks_together_have_fewer_than_two_and_a_half_million_parameters() -> Result<()> {
        let weights = Weights::shapes_only();
        super::taesd::Taesd::load(&super::taesd::Config::mini(), &weights.pp("taesd"))?;
        super::clip_text::ClipText::load(&super::clip_text::Config::mini(), &weights.pp("text"))?;
        super::clip_vision::ClipVision::load(&super::clip_vision::Config::mini(), &weights.pp("vision"))?;
        super::resampler::Resampler::load(&super::resampler::Config::mini(), &weights.pp("resampler"))?;
        super::mini_identity::MiniIdentity::load(&super::mini_identity::Config::mini(), &weights.pp("identity"))?;
        super::mini_face_locator::MiniFaceLocator::load(
            &super::mini_face_locator::Config::mini(),
            &weights.pp("locator"),
        )?;
        let mut by_network = std::collections::BTreeMap::<String, usize>::new();
        for (name, shape) in weights.shapes() {
            let network = name.split('.').next().unwrap_or_default().to_string();
            *by_network.entry(network).or_default() += shape.iter().product::<usize>();
        }
        let total: usize = by_network.values().sum();
        assert!(total < 2_500_000, "{by_network:?}");
        Ok(())
    }
}

//! The miniature's pretrained weights, which are part of the crate.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::MiniConfig;
use crate::lookahead::{Base, FaceEncoder, FaceEncoderConfig};
use crate::nn::{Parameters, Weights};
use crate::random::Address;
use crate::{Error, Result};

/// f16, as [`super::pretrain::bundle`] writes it.
const FILE: &[u8] = include_bytes!("../../assets/mini.safetensors");
const NAME: &str = "mini.safetensors";
const ADAPTER: &str = "adapter.";

/// All pretrained weights of the miniature, frozen: `unet.*`, `autoencoder.*`, `text_encoder.*`, `image_encoder.*`,
/// `identity_network.*`, `face_locator.*`, `lcm_lora.*` and `adapter.*`.
///
/// # Errors
/// [`Error::Candle`] where memory is out.
pub fn weights(dtype: DType, device: &Device) -> Result<Weights> {
    Weights::from_safetensors_bytes(NAME, FILE, dtype, device)
}

/// The miniature's frozen networks.
///
/// # Errors
/// [`Error::Candle`] where memory is out.
pub fn base(dtype: DType, device: &Device) -> Result<Base> {
    base_from(&weights(dtype, device)?)
}

/// The miniature's frozen networks from other weights of the same names, for instance from a file of one's own
/// pretraining.
///
/// # Errors
/// [`Error::Tensor`] for a missing or misshapen tensor.
pub fn base_from(weights: &Weights) -> Result<Base> {
    MiniConfig::mini().load_base(weights)
}

/// The shape of the miniature's face encoder.
pub fn face_encoder_config() -> FaceEncoderConfig {
    MiniConfig::mini().face_encoder()
}

/// The pretrained IP-Adapter that training starts from: `image_proj.*` and `ip_adapter.*`, f32 on the CPU.
///
/// # Errors
/// [`Error::Candle`] where memory is out.
pub fn adapter_tensors() -> Result<HashMap<String, Tensor>> {
    let format = |error: candle_core::Error| Error::Format {
        path: NAME.into(),
        reason: format!("not a whole safetensors file: {error}"),
    };
    let tensors = candle_core::safetensors::load_buffer(FILE, &Device::Cpu).map_err(format)?;
    let adapter =
        tensors.into_iter().filter_map(|(name, tensor)| Some((name.strip_prefix(ADAPTER)?.to_string(), tensor)));
    adapter.map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?))).collect()
}

/// Random weights for all networks of a configuration, the adapter's included, under the prefixes of [`weights`].
/// Unlike a fresh LoRA, the LCM-LoRA is not zero, so it changes what the U-Net does.
///
/// # Errors
/// [`Error::Config`] for a configuration that does not fit together.
pub fn random_weights(
    config: &MiniConfig,
    seed: u64,
    dtype: DType,
    device: &Device,
) -> Result<HashMap<String, Tensor>> {
    let parameters = Parameters::new();
    let weights = Weights::trainable(&parameters, seed, dtype, device);
    let base = config.load_base(&weights)?;
    let adapter = FaceEncoderConfig { kv_encoder: None, ..config.face_encoder() };
    FaceEncoder::load(&adapter, &base.unet, &weights.pp("adapter"), &weights)?;
    let value = |(index, (name, variable)): (usize, (String, candle_core::Var))| {
        let fresh_lora = name.starts_with("lcm_lora.") && name.ends_with("lora_B.weight");
        let tensor = match fresh_lora {
            true => (Address::new(seed, "random lora").sample(index).normal(variable.shape(), dtype, device)? * 0.05)?,
            false => variable.as_detached_tensor(),
        };
        Ok((name, tensor))
    };
    parameters.all().into_iter().enumerate().map(value).collect()
}

/// A miniature with random weights, of the full shapes: for tests that want no trained networks.
///
/// # Errors
/// [`Error::Candle`] where memory is out.
pub fn random_base(seed: u64, dtype: DType, device: &Device) -> Result<Base> {
    random(&MiniConfig::mini(), seed, dtype, device)
}

/// The smallest complete base, with random weights ([`MiniConfig::tiny`]): images of 32 pixels. For tests.
///
/// # Errors
/// [`Error::Candle`] where memory is out.
pub fn tiny_base(seed: u64, dtype: DType, device: &Device) -> Result<Base> {
    random(&MiniConfig::tiny(), seed, dtype, device)
}

fn random(config: &MiniConfig, seed: u64, dtype: DType, device: &Device) -> Result<Base> {
    config.load_base(&Weights::frozen("random weights", random_weights(config, seed, dtype, device)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_every_network_and_the_adapter_in_less_than_ten_megabytes() -> Result<()> {
        assert!(FILE.len() < 10_000_000, "{}", FILE.len());
        let base = base(DType::F32, &Device::Cpu)?;
        assert_eq!((base.resolution, base.dtype), (super::super::RESOLUTION, DType::F32));
        let adapter = Weights::frozen("adapter", adapter_tensors()?);
        let config = FaceEncoderConfig { kv_encoder: None, ..face_encoder_config() };
        FaceEncoder::load(&config, &base.unet, &adapter, &adapter)?;
        Ok(())
    }

    #[test]
    fn images_become_latents_features_and_embeddings_of_the_promised_shapes() -> Result<()> {
        let base = base(DType::F32, &Device::Cpu)?;
        let images = Address::new(1, "images").uniform_tensor((2, 3, 128, 128), DType::F32, &Device::Cpu)?;
        let latents = base.latents(&images, Address::new(1, "posterior"))?;
        assert_eq!(latents.dims(), [2, 4, 32, 32]);
        assert_eq!(base.decoder.decode(&latents)?.dims(), [2, 3, 128, 128]);
        assert_eq!(base.image_features(&images)?.dims(), [2, 65, 96]);
        assert_eq!(base.face_locator.locate(&images)?.len(), 2);
        let conditioning = base.conditioning(&["a photo of a face".into(), "".into()])?;
        let noise = base.unet.forward(&latents, &[3, 990], &conditioning, &Default::default())?;
        assert_eq!(noise.dims(), [2, 4, 32, 32]);
        Ok(())
    }

    #[test]
    fn a_tiny_base_is_complete_in_both_types() -> Result<()> {
        for dtype in [DType::F32, DType::F64] {
            let base = tiny_base(3, dtype, &Device::Cpu)?;
            let images = Address::new(1, "images").uniform_tensor((1, 3, 32, 32), dtype, &Device::Cpu)?;
            let latents = base.latents(&images, Address::new(1, "posterior"))?;
            assert_eq!((latents.dims(), latents.dtype()), (&[1, 4, 8, 8][..], dtype));
            let conditioning = base.conditioning(&["a mosaic of a face".into()])?;
            let plain = base.unet.forward(&latents, &[500], &conditioning, &Default::default())?;
            let pass =
                crate::models::unet::Pass { loras: crate::nn::Loras::one(&base.lcm_lora, 1.0), ..Default::default() };
            let adapted = base.unet.forward(&latents, &[500], &conditioning, &pass)?;
            let difference = (plain - adapted)?.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            assert!(difference > 1e-6, "{difference}");
        }
        Ok(())
    }
}

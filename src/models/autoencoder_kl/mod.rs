//! The autoencoder of Stable Diffusion and SDXL (Rombach et al. 2022), with the tensor names of diffusers'
//! `AutoencoderKL`.

mod blocks;
#[cfg(test)]
mod tests;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::roles::{LatentDecoder, LatentEncoder};
use super::{image_dims, to_channels_first, to_channels_last};
use crate::nn::{Conv2d, GroupNorm, Weights};
use crate::ops::Activation;
use crate::random::Address;
use crate::{Error, Result};
use blocks::{Direction, Mid, Stage, norm};

/// The architecture, with the field names of diffusers' `AutoencoderKL`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels at each resolution, from the image's to the latents'.
    pub block_out_channels: Vec<usize>,
    /// Resnets at each resolution of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Scaled latents are `(latents - shift_factor) * scaling_factor`.
    pub scaling_factor: f64,
    /// See `scaling_factor`; 0 where a published configuration has none.
    pub shift_factor: f64,
    /// Whether the middle blocks have attention.
    pub mid_block_add_attention: bool,
    /// Whether a 1x1 convolution stands behind the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution stands before the decoder.
    pub use_post_quant_conv: bool,
}

impl Config {
    /// SDXL's, which `madebyollin/sdxl-vae-fp16-fix` shares: 83,653,863 parameters in 248 tensors.
    pub fn sdxl() -> Self {
        Config {
            latent_channels: 4,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            norm_num_groups: 32,
            scaling_factor: 0.13025,
            shift_factor: 0.0,
            mid_block_add_attention: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
        }
    }

    /// How many times smaller than the image the latents are, along each side.
    pub fn downscale(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// # Errors
    /// [`Error::Config`] naming the field that is out of range or does not fit the others.
    pub fn validate(&self) -> Result<()> {
        let fault = |field: &str, reason: String| {
            Err(Error::Config { source_name: "autoencoder_kl".into(), field: field.into(), reason })
        };
        let (groups, levels) = (self.norm_num_groups, self.block_out_channels.len());
        if !(1..=8).contains(&levels) {
            return fault("block_out_channels", format!("expected 1 to 8 resolutions, found {levels}"));
        }
        let fits = |channels: &usize| (1..=1 << 14).contains(channels) && groups > 0 && channels.is_multiple_of(groups);
        if let Some(channels) = self.block_out_channels.iter().find(|channels| !fits(channels)) {
            let reason = format!("expected multiples of norm_num_groups ({groups}) up to 16384, found {channels}");
            return fault("block_out_channels", reason);
        }
        if !(1..=16).contains(&self.layers_per_block) || !(1..=256).contains(&self.latent_channels) {
            let found = format!("found {} and {}", self.layers_per_block, self.latent_channels);
            return fault("layers_per_block", format!("expected 1 to 16, and 1 to 256 latent_channels; {found}"));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor != 0.0 && self.shift_factor.is_finite()) {
            return fault("scaling_factor", "must be finite like shift_factor, and not 0".into());
        }
        Ok(())
    }
}

/// What the encoder says of images: a normal distribution for every latent, not yet scaled (diffusers:
/// `DiagonalGaussianDistribution`).
#[derive(Clone, Debug)]
pub struct Posterior {
    /// Means, `(batch, latent_channels, height, width)`.
    pub mean: Tensor,
    /// Logarithms of the variances, clamped to [-30, 20]; shape as `mean`.
    pub logvar: Tensor,
}

impl Posterior {
    /// A sample, drawn at `noise` with one address a sample of the batch. Differentiable.
    ///
    /// # Errors
    /// [`Error::Candle`] where memory is out.
    pub fn sample(&self, noise: Address) -> Result<Tensor> {
        let (batch, channels, height, width) = self.mean.dims4()?;
        let shape = (channels, height, width);
        let noise = noise.normal_batch(batch, shape, self.mean.dtype(), self.mean.device())?;
        Ok((&self.mean + (self.logvar.affine(0.5, 0.0)?.exp()? * noise)?)?)
    }
}

#[derive(Clone, Debug)]
struct Encoder {
    conv_in: Conv2d,
    down: Vec<Stage>,
    mid: Mid,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    quant_conv: Option<Conv2d>,
}

#[derive(Clone, Debug)]
struct Decoder {
    post_quant_conv: Option<Conv2d>,
    conv_in: Conv2d,
    mid: Mid,
    up: Vec<Stage>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// The autoencoder. Both directions are differentiable.
#[derive(Clone, Debug)]
pub struct AutoencoderKl {
    config: Config,
    encoder: Encoder,
    decoder: Decoder,
}

impl AutoencoderKl {
    /// Loads `encoder.*`, `decoder.*`, `quant_conv` and `post_quant_conv`.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        config.validate()?;
        Ok(AutoencoderKl {
            config: config.clone(),
            encoder: Encoder::load(config, weights)?,
            decoder: Decoder::load(config, weights)?,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The posterior of images `(batch, 3, height, width)` in `[-1, 1]`, whose sides [`Config::downscale`] divides.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another.
    pub fn posterior(&self, images: &Tensor) -> Result<Posterior> {
        let (_, height, width) = image_dims("autoencoder_kl encode", images)?;
        let factor = self.config.downscale();
        if height % factor != 0 || width % factor != 0 {
            let expected = format!("sides that are multiples of {factor}");
            return Err(Error::argument("autoencoder_kl encode", "images", expected, format!("{height} x {width}")));
        }
        let moments = to_channels_first(&self.encoder.forward(&to_channels_last(images)?)?)?;
        let channels = self.config.latent_channels;
        Ok(Posterior {
            mean: moments.narrow(1, 0, channels)?.contiguous()?,
            logvar: moments.narrow(1, channels, channels)?.contiguous()?.clamp(-30.0, 20.0)?,
        })
    }

    /// Latents as the encoder gives them to latents of variance near one, as the U-Net takes them.
    ///
    /// # Errors
    /// [`Error::Candle`] where memory is out.
    pub fn scale(&self, latents: &Tensor) -> Result<Tensor> {
        let scale = self.config.scaling_factor;
        Ok(latents.affine(scale, -self.config.shift_factor * scale)?)
    }
}

impl Encoder {
    fn load(config: &Config, all: &Weights) -> Result<Self> {
        let (weights, channels) = (all.pp("encoder"), &config.block_out_channels);
        let (first, last) = (channels[0], channels[channels.len() - 1]); // not empty, as `Config::validate` has made sure
        let moments = 2 * config.latent_channels;
        let stage = |level: usize| {
            let sizes = [channels[level.saturating_sub(1)], channels[level]];
            let is_last = level + 1 == channels.len();
            Stage::load(config, sizes, Direction::Down, is_last, &weights.pp("down_blocks").pp(level))
        };
        let quant_conv = match config.use_quant_conv {
            true => Some(Conv2d::load(moments, moments, 1, 1, 0, true, &all.pp("quant_conv"))?),
            false => None,
        };
        Ok(Encoder {
            conv_in: Conv2d::load(3, first, 3, 1, 1, true, &weights.pp("conv_in"))?,
            down: (0..channels.len()).map(stage).collect::<Result<_>>()?,
            mid: Mid::load(config, last, &weights.pp("mid_block"))?,
            conv_norm_out: norm(config, last, &weights.pp("conv_norm_out"))?,
            conv_out: Conv2d::load(last, moments, 3, 1, 1, true, &weights.pp("conv_out"))?,
            quant_conv,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.conv_in.forward(x)?;
        let x = self.down.iter().try_fold(x, |x, stage| stage.forward(&x))?;
        let x = self.conv_norm_out.forward_with(&self.mid.forward(&x)?, Activation::Silu)?;
        let x = self.conv_out.forward(&x)?;
        self.quant_conv.as_ref().map_or(Ok(x.clone()), |conv| conv.forward(&x))
    }
}

impl Decoder {
    fn load(config: &Config, all: &Weights) -> Result<Self> {
        let (weights, channels) = (all.pp("decoder"), &config.block_out_channels);
        let (first, last) = (channels[0], channels[channels.len() - 1]); // not empty, as `Config::validate` has made sure
        let latent = config.latent_channels;
        let stage = |index: usize| {
            let level = channels.len() - 1 - index;
            let sizes = [channels[(level + 1).min(channels.len() - 1)], channels[level]];
            Stage::load(config, sizes, Direction::Up, level == 0, &weights.pp("up_blocks").pp(index))
        };
        let post_quant_conv = match config.use_post_quant_conv {
            true => Some(Conv2d::load(latent, latent, 1, 1, 0, true, &all.pp("post_quant_conv"))?),
            false => None,
        };
        Ok(Decoder {
            post_quant_conv,
            conv_in: Conv2d::load(latent, last, 3, 1, 1, true, &weights.pp("conv_in"))?,
            mid: Mid::load(config, last, &weights.pp("mid_block"))?,
            up: (0..channels.len()).map(stage).collect::<Result<_>>()?,
            conv_norm_out: norm(config, first, &weights.pp("conv_norm_out"))?,
            conv_out: Conv2d::load(first, 3, 3, 1, 1, true, &weights.pp("conv_out"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.post_quant_conv.as_ref().map_or(Ok(x.clone()), |conv| conv.forward(x))?;
        let x = self.mid.forward(&self.conv_in.forward(&x)?)?;
        let x = self.up.iter().try_fold(x, |x, stage| stage.forward(&x))?;
        self.conv_out.forward(&self.conv_norm_out.forward_with(&x, Activation::Silu)?)
    }
}

impl LatentEncoder for AutoencoderKl {
    fn encode(&self, images: &Tensor, noise: Address) -> Result<Tensor> {
        self.scale(&self.posterior(images)?.sample(noise)?)
    }

    fn factor(&self) -> usize {
        self.config.downscale()
    }
}

impl LatentDecoder for AutoencoderKl {
    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let channels = self.config.latent_channels;
        if latents.rank() != 4 || latents.dims()[1] != channels || latents.elem_count() == 0 {
            let expected = format!("(batch, {channels}, height, width)");
            return Err(Error::argument("autoencoder_kl decode", "latents", expected, format!("{:?}", latents.dims())));
        }
        let latents = latents.affine(1.0 / self.config.scaling_factor, self.config.shift_factor)?;
        to_channels_first(&self.decoder.forward(&to_channels_last(&latents)?)?)
    }
}

//! TAESD, the tiny autoencoder for latent diffusion of Ollin Boer Bohan (<https://github.com/madebyollin/taesd>), with
//! the tensor names of diffusers' `AutoencoderTiny`.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{image_dims, to_channels_first, to_channels_last};
use crate::autograd::{recompute, taped};
use crate::nn::{Conv2d, Weights};
use crate::ops::{self, Activation};
use crate::{Error, Result};

/// The architecture, as diffusers' `AutoencoderTiny` configures it, and the scale of its latents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of every block.
    pub width: usize,
    /// Residual blocks at each resolution of the encoder, from the image's down to the latents'. Between two
    /// resolutions lies a factor of two, so three levels of halving take four entries.
    pub num_encoder_blocks: Vec<usize>,
    /// Residual blocks at each resolution of the decoder, from the latents' up to the image's.
    pub num_decoder_blocks: Vec<usize>,
    /// Scaled latents are `(latents - shift) * scaling_factor`.
    pub scaling_factor: f64,
    /// See `scaling_factor`.
    pub shift: f64,
}

impl Config {
    /// `madebyollin/taesdxl`: 8 times smaller latents of 4 channels. It was trained on latents that are scaled already,
    /// so its factor is 1.
    pub fn taesdxl() -> Self {
        Config {
            latent_channels: 4,
            width: 64,
            num_encoder_blocks: vec![1, 3, 3, 3],
            num_decoder_blocks: vec![3, 3, 3, 1],
            scaling_factor: 1.0,
            shift: 0.0,
        }
    }

    /// The miniature: 4 times smaller latents, `(4, 32, 32)` for 128 pixels. The scale is that of untrained weights;
    /// whoever trains it measures and sets it.
    pub fn mini() -> Self {
        Config { width: 24, num_encoder_blocks: vec![1, 2, 2], num_decoder_blocks: vec![2, 2, 1], ..Self::taesdxl() }
    }

    /// How many times smaller than the image the latents are, along each side.
    pub fn downscale(&self) -> usize {
        1 << self.num_encoder_blocks.len().saturating_sub(1)
    }

    fn check(&self) -> Result<()> {
        let fault = |field: &str, reason: &str| Error::Config {
            source_name: "taesd".into(),
            field: field.into(),
            reason: reason.into(),
        };
        let levels = self.num_encoder_blocks.len();
        if levels == 0 || levels > 8 || self.num_decoder_blocks.len() != levels {
            return Err(fault("num_decoder_blocks", "must have as many entries as num_encoder_blocks, from 1 to 8"));
        }
        if self.latent_channels == 0 || self.width == 0 {
            return Err(fault("width", "width and latent_channels must not be 0"));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor != 0.0 && self.shift.is_finite()) {
            return Err(fault("scaling_factor", "scaling_factor and shift must be finite, the first not 0"));
        }
        Ok(())
    }
}

/// Numbers in an activation from which on a block does not keep its activations.
const LARGE: usize = 1 << 22;

/// Three convolutions and a skip (diffusers: `AutoencoderTinyBlock`).
#[derive(Clone, Debug)]
struct Block {
    conv: [Conv2d; 3],
}

impl Block {
    fn load(width: usize, weights: &Weights) -> Result<Self> {
        let conv = |index: usize| Conv2d::load(width, width, 3, 1, 1, true, &weights.pp("conv").pp(index));
        // Odd indices are the activations between the convolutions.
        Ok(Block { conv: [conv(0)?, conv(2)?, conv(4)?] })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weights = self.conv.each_ref().map(|conv| conv.weight_and_bias(x));
        let [a, b, c] = weights;
        let (a, b, c) = (a?, b?, c?);
        ops::rectified_block(x, [&a, &b, &c].map(|(weight, bias)| (weight.as_ref(), bias.as_ref())))
    }

    /// Whether [`Block::forward`] keeps nothing but input and output.
    fn is_lean(&self, x: &Tensor) -> Result<bool> {
        let [a, b, c] = self.conv.each_ref().map(|conv| conv.weight_and_bias(x));
        let (a, b, c) = (a?, b?, c?);
        Ok(ops::is_lean(x, [&a, &b, &c].map(|(weight, bias)| (weight.as_ref(), bias.as_ref()))))
    }

    /// The same; where a gradient will be asked for and the activations are large, they are computed again for it
    /// instead of kept: at 1024 pixels the nine of the last block are 1.2 GB a picture in bf16.
    fn forward_lean(&self, x: &Tensor) -> Result<Tensor> {
        if !x.track_op() || x.elem_count() < LARGE || self.is_lean(x)? {
            return self.forward(x);
        }
        let block = self.clone();
        let mut outputs = recompute(&[x], move |x| Ok(vec![block.forward(&x[0])?]))?;
        Ok(outputs.swap_remove(0))
    }
}

#[derive(Clone, Debug)]
enum Layer {
    Conv(Conv2d),
    Block(Block),
    Relu,
    Upsample,
}

/// A `torch.nn.Sequential`, numbered as it is published.
#[derive(Clone, Debug)]
struct Sequential {
    layers: Vec<Layer>,
}

impl Sequential {
    fn encoder(config: &Config, weights: &Weights) -> Result<Self> {
        let (weights, width) = (weights.pp("encoder").pp("layers"), config.width);
        let mut layers = Vec::new();
        for (level, &blocks) in config.num_encoder_blocks.iter().enumerate() {
            let at = weights.pp(layers.len());
            layers.push(Layer::Conv(match level {
                0 => Conv2d::load(3, width, 3, 1, 1, true, &at)?,
                _ => Conv2d::load(width, width, 3, 2, 1, false, &at)?,
            }));
            for _ in 0..blocks {
                layers.push(Layer::Block(Block::load(width, &weights.pp(layers.len()))?));
            }
        }
        let at = weights.pp(layers.len());
        layers.push(Layer::Conv(Conv2d::load(width, config.latent_channels, 3, 1, 1, true, &at)?));
        Ok(Sequential { layers })
    }

    fn decoder(config: &Config, weights: &Weights) -> Result<Self> {
        let (weights, width) = (weights.pp("decoder").pp("layers"), config.width);
        let first = Conv2d::load(config.latent_channels, width, 3, 1, 1, true, &weights.pp(0))?;
        let mut layers = vec![Layer::Conv(first), Layer::Relu];
        let last = config.num_decoder_blocks.len() - 1; // `Config::check` has made sure there is one
        for (level, &blocks) in config.num_decoder_blocks.iter().enumerate() {
            for _ in 0..blocks {
                layers.push(Layer::Block(Block::load(width, &weights.pp(layers.len()))?));
            }
            if level < last {
                layers.push(Layer::Upsample);
            }
            let at = weights.pp(layers.len());
            layers.push(Layer::Conv(match level == last {
                true => Conv2d::load(width, 3, 3, 1, 1, true, &at)?,
                false => Conv2d::load(width, width, 3, 1, 1, false, &at)?,
            }));
        }
        Ok(Sequential { layers })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.layers.iter().try_fold(x.clone(), |x, layer| match layer {
            Layer::Conv(conv) => conv.forward(&x),
            Layer::Block(block) => block.forward_lean(&x),
            Layer::Relu => ops::activation(&x, Activation::Relu),
            Layer::Upsample => ops::upsample_nearest_2x(&x),
        })
    }
}

/// The tiny autoencoder. Both directions are differentiable; nothing is sampled.
#[derive(Clone, Debug)]
pub struct Taesd {
    config: Config,
    encoder: Sequential,
    decoder: Sequential,
}

impl Taesd {
    /// Loads `encoder.layers.*` and `decoder.layers.*`.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        config.check()?;
        let (encoder, decoder) = (Sequential::encoder(config, weights)?, Sequential::decoder(config, weights)?);
        Ok(Taesd { config: config.clone(), encoder, decoder })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Images `(batch, 3, height, width)` in `[-1, 1]` to scaled latents
    /// `(batch, latent_channels, height / downscale, width / downscale)`.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another, or a side is no multiple of [`Config::downscale`].
    pub fn encode(&self, images: &Tensor) -> Result<Tensor> {
        let (_, height, width) = image_dims("taesd encode", images)?;
        let factor = self.config.downscale();
        if height % factor != 0 || width % factor != 0 {
            let expected = format!("sides that are multiples of {factor}");
            return Err(Error::argument("taesd encode", "images", expected, format!("{height} x {width}")));
        }
        // TAESD itself works on images in [0, 1].
        let x = to_channels_last(&images.affine(0.5, 0.5)?)?;
        let latents = to_channels_first(&self.encoder.forward(&x)?)?;
        let scale = self.config.scaling_factor;
        Ok(latents.affine(scale, -self.config.shift * scale)?)
    }

    /// Scaled latents `(batch, latent_channels, h, w)` to images `(batch, 3, h * downscale, w * downscale)`, nominally
    /// in `[-1, 1]`; not clamped, so the gradient reaches pixels that overshoot.
    ///
    /// The latents are first squeezed into `[-3, 3]` by `3 tanh(x / 3)`, as diffusers' `DecoderTiny` does.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let channels = self.config.latent_channels;
        if latents.rank() != 4 || latents.dims()[1] != channels {
            let expected = format!("(batch, {channels}, height, width)");
            return Err(Error::argument("taesd decode", "latents", expected, format!("{:?}", latents.dims())));
        }
        let latents = latents.affine(1.0 / self.config.scaling_factor, self.config.shift)?;
        let squeezed = ((latents / 3.0)?.tanh()? * 3.0)?;
        let decoder = self.decoder.clone();
        let mut images = taped(&[&squeezed], move |x| {
            let images = decoder.forward(&to_channels_last(&x[0])?)?;
            Ok(vec![ops::affine(&to_channels_first(&images)?, 2.0, -1.0)?])
        })?;
        Ok(images.swap_remove(0))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::autograd::check_gradients;
    use crate::nn::Parameters;
    use crate::random::Address;

    fn tiny() -> Config {
        Config {
            latent_channels: 2,
            width: 3,
            num_encoder_blocks: vec![1, 1],
            num_decoder_blocks: vec![1, 1],
            scaling_factor: 0.5,
            shift: 0.1,
        }
    }

    fn random(purpose: &'static str, shape: (usize, usize, usize, usize), dtype: DType) -> Result<Tensor> {
        Address::new(5, purpose).normal(shape, dtype, &Device::Cpu)
    }

    #[test]
    fn taesdxl_has_the_tensors_of_the_published_file() -> Result<()> {
        let weights = Weights::shapes_only();
        Taesd::load(&Config::taesdxl(), &weights)?;
        let shapes = weights.shapes();
        assert_eq!(shapes.len(), 134);
        assert_eq!(shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>(), 2_445_063);
        for (name, shape) in [
            ("encoder.layers.0.weight", vec![64, 3, 3, 3]),
            ("encoder.layers.1.conv.4.bias", vec![64]),
            ("encoder.layers.10.weight", vec![64, 64, 3, 3]),
            ("encoder.layers.14.bias", vec![4]),
            ("decoder.layers.0.weight", vec![64, 4, 3, 3]),
            ("decoder.layers.6.weight", vec![64, 64, 3, 3]),
            ("decoder.layers.17.conv.2.weight", vec![64, 64, 3, 3]),
            ("decoder.layers.18.weight", vec![3, 64, 3, 3]),
        ] {
            assert_eq!(shapes.get(name), Some(&shape), "{name}");
        }
        assert!(!shapes.contains_key("encoder.layers.2.bias") && !shapes.contains_key("decoder.layers.6.bias"));
        Ok(())
    }

    #[test]
    fn the_mini_turns_128_pixels_into_latents_of_32_and_back() -> Result<()> {
        let weights = Weights::trainable(&Parameters::new(), 0, DType::F32, &Device::Cpu);
        let taesd = Taesd::load(&Config::mini(), &weights)?;
        let images = random("images", (1, 3, 128, 128), DType::F32)?;
        let latents = taesd.encode(&images)?;
        assert_eq!(latents.dims(), [1, 4, 32, 32]);
        assert_eq!(taesd.decode(&latents)?.dims(), [1, 3, 128, 128]);
        Ok(())
    }

    #[test]
    fn scaled_latents_are_shifted_and_scaled() -> Result<()> {
        let parameters = Parameters::new();
        let weights = Weights::trainable(&parameters, 0, DType::F64, &Device::Cpu);
        let scaled = Taesd::load(&tiny(), &weights)?;
        let plain = Taesd::load(&Config { scaling_factor: 1.0, shift: 0.0, ..tiny() }, &weights)?;
        let images = random("images", (1, 3, 4, 4), DType::F64)?;
        let expected = plain.encode(&images)?.affine(0.5, -0.05)?;
        let difference = (scaled.encode(&images)? - &expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(difference < 1e-12);
        let images = plain.decode(&plain.encode(&images)?)?;
        let difference = (scaled.decode(&expected)? - images)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(difference < 1e-12);
        Ok(())
    }

    #[test]
    fn gradients_reach_images_and_latents_exactly() -> Result<()> {
        let weights = Weights::trainable(&Parameters::new(), 3, DType::F64, &Device::Cpu);
        let taesd = Taesd::load(&tiny(), &weights)?;
        let inputs = [random("images", (1, 3, 4, 4), DType::F64)?, random("latents", (1, 2, 2, 2), DType::F64)?];
        let check = check_gradients(&inputs, |x| Ok(vec![taesd.encode(&x[0])?, taesd.decode(&x[1])?]))?;
        assert!(check.worst() < 1e-7 && check.norms.iter().all(|&norm| norm > 1e-3), "{check:?}");
        Ok(())
    }

    #[test]
    fn every_weight_gets_a_gradient() -> Result<()> {
        let parameters = Parameters::new();
        let weights = Weights::trainable(&parameters, 4, DType::F32, &Device::Cpu);
        let taesd = Taesd::load(&tiny(), &weights)?;
        let images = random("images", (2, 3, 8, 8), DType::F32)?;
        let loss = || Ok(taesd.decode(&taesd.encode(&images)?)?.sqr()?.sum_all()?);
        let gradients = loss()?.backward()?;
        // Where the decoder is one function of the graph.
        let whole = crate::autograd::gradients(|| loss().map(Some))?.unwrap();
        for (name, variable) in parameters.all() {
            let gradient = gradients.get(&variable).unwrap_or_else(|| panic!("no gradient for {name}"));
            let size = gradient.abs()?.max_all()?.to_scalar::<f32>()?;
            let difference = (gradient - whole.get(&variable).unwrap())?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(difference <= 1e-4 * size, "{name}: {difference} of {size}");
        }
        Ok(())
    }

    #[test]
    fn sides_that_do_not_divide_are_refused() -> Result<()> {
        let taesd = Taesd::load(&tiny(), &Weights::trainable(&Parameters::new(), 0, DType::F32, &Device::Cpu))?;
        assert!(matches!(taesd.encode(&random("x", (1, 3, 5, 4), DType::F32)?), Err(Error::Argument { .. })));
        assert!(matches!(taesd.decode(&random("x", (1, 3, 4, 4), DType::F32)?), Err(Error::Argument { .. })));
        Ok(())
    }
}

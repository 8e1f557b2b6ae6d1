//! The miniature's identity network: a small residual network with group normalisation.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::identity::{IdentityNetwork, normalise};
use super::{image_dims, to_channels_last};
use crate::autograd::taped;
use crate::nn::{Conv2d, GroupNorm, Linear, Weights};
use crate::ops::{self, Activation};
use crate::{Error, Result};

const EPS: f64 = 1e-5;

/// The architecture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Width and height of the crops.
    pub crop_size: usize,
    /// Channels of the stages. The first convolution and every stage but the first halve the sides.
    pub widths: Vec<usize>,
    /// Channels normalised together.
    pub group_width: usize,
    /// Length of an embedding.
    pub dimension: usize,
}

impl Config {
    /// The miniature: 64 pixels to 64 numbers, about 0.3 million parameters.
    pub fn mini() -> Self {
        Config { crop_size: 64, widths: vec![16, 32, 64, 96], group_width: 8, dimension: 64 }
    }

    /// Another one, wider, shallower and on smaller crops, that no training looks at: it judges what is trained with
    /// the first.
    pub fn held_out() -> Self {
        Config { crop_size: 48, widths: vec![24, 48, 96], group_width: 8, dimension: 96 }
    }

    fn final_side(&self) -> usize {
        self.crop_size.checked_shr(self.widths.len() as u32).unwrap_or(0)
    }

    fn check(&self) -> Result<()> {
        let fault = |field: &str, reason: String| {
            Err(Error::Config { source_name: "mini_identity".into(), field: field.into(), reason })
        };
        let side = self.final_side();
        if self.widths.is_empty() || side == 0 || side << self.widths.len() != self.crop_size {
            let halvings = self.widths.len();
            return fault("crop_size", format!("{} cannot be halved {halvings} times", self.crop_size));
        }
        if self.group_width == 0 || self.widths.iter().any(|width| *width == 0 || width % self.group_width != 0) {
            return fault("widths", format!("must be multiples of group_width ({})", self.group_width));
        }
        Ok(())
    }
}

/// Two convolutions and a skip; norms before the convolutions.
#[derive(Clone, Debug)]
struct Block {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl Block {
    fn load(input: usize, output: usize, stride: usize, group_width: usize, weights: &Weights) -> Result<Self> {
        let norm = |width: usize, name: &str| GroupNorm::load(width / group_width, width, EPS, &weights.pp(name));
        let shortcut = match input == output && stride == 1 {
            true => None,
            false => Some(Conv2d::load(input, output, 1, stride, 0, false, &weights.pp("shortcut"))?),
        };
        Ok(Block {
            norm1: norm(input, "norm1")?,
            conv1: Conv2d::load(input, output, 3, stride, 1, false, &weights.pp("conv1"))?,
            norm2: norm(output, "norm2")?,
            conv2: Conv2d::load(output, output, 3, 1, 1, false, &weights.pp("conv2"))?,
            shortcut,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.conv1.forward(&self.norm1.forward_with(x, Activation::Relu)?)?;
        let y = self.conv2.forward(&self.norm2.forward_with(&y, Activation::Relu)?)?;
        match &self.shortcut {
            Some(shortcut) => ops::add(&y, &shortcut.forward(x)?),
            None => ops::add(&y, x),
        }
    }
}

/// The miniature's identity network.
#[derive(Clone, Debug)]
pub struct MiniIdentity {
    config: Config,
    conv_in: Conv2d,
    blocks: Vec<Block>,
    norm_out: GroupNorm,
    linear_out: Linear,
}

impl MiniIdentity {
    /// Loads `conv_in`, `blocks.*`, `norm_out` and `linear_out`.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        config.check()?;
        let (widths, side) = (&config.widths, config.final_side());
        let (first, last) = (widths[0], widths[widths.len() - 1]); // not empty, as `check` has made sure
        let block = |i: usize| {
            let (input, stride) = if i == 0 { (first, 1) } else { (widths[i - 1], 2) };
            Block::load(input, widths[i], stride, config.group_width, &weights.pp("blocks").pp(i))
        };
        Ok(MiniIdentity {
            conv_in: Conv2d::load(3, first, 3, 2, 1, false, &weights.pp("conv_in"))?,
            blocks: (0..widths.len()).map(block).collect::<Result<_>>()?,
            norm_out: GroupNorm::load(last / config.group_width, last, EPS, &weights.pp("norm_out"))?,
            linear_out: Linear::load(side * side * last, config.dimension, true, &weights.pp("linear_out"))?,
            config: config.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

impl IdentityNetwork for MiniIdentity {
    fn embed(&self, faces: &Tensor) -> Result<Tensor> {
        let (_, height, width) = image_dims("mini_identity", faces)?;
        let size = self.config.crop_size;
        if (height, width) != (size, size) {
            let expected = format!("(batch, 3, {size}, {size})");
            return Err(Error::argument("mini_identity", "faces", expected, format!("{:?}", faces.dims())));
        }
        let network = self.clone();
        let mut embedded = taped(&[faces], move |faces| {
            let x = network.conv_in.forward(&to_channels_last(&faces[0])?)?;
            let x = network.blocks.iter().try_fold(x, |x, block| block.forward(&x))?;
            let x = network.norm_out.forward_with(&x, Activation::Relu)?;
            // Flattened, not averaged: where a feature lies tells faces that are aligned apart.
            let (batch, flat) = (x.dim(0)?, x.elem_count() / x.dim(0)?.max(1));
            Ok(vec![normalise(&network.linear_out.forward(&ops::reshape(&x, (batch, flat))?)?)?])
        })?;
        Ok(embedded.swap_remove(0))
    }

    fn crop_size(&self) -> usize {
        self.config.crop_size
    }

    fn dimension(&self) -> usize {
        self.config.dimension
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::autograd::check_gradients;
    use crate::nn::Parameters;
    use crate::random::Address;

    fn load(config: &Config, dtype: DType) -> Result<(MiniIdentity, Parameters)> {
        let parameters = Parameters::new();
        let network = MiniIdentity::load(config, &Weights::trainable(&parameters, 1, dtype, &Device::Cpu))?;
        Ok((network, parameters))
    }

    #[test]
    fn embeddings_have_unit_length() -> Result<()> {
        let (network, parameters) = load(&Config::mini(), DType::F32)?;
        let faces = Address::new(1, "faces").normal((3, 3, 64, 64), DType::F32, &Device::Cpu)?;
        let embeddings = network.embed(&faces)?;
        assert_eq!(embeddings.dims(), [3, network.dimension()]);
        for norm in embeddings.sqr()?.sum(1)?.to_vec1::<f32>()? {
            assert!((norm - 1.0).abs() < 1e-5, "{norm}");
        }
        let count = parameters.element_count();
        assert!((250_000..350_000).contains(&count), "{count}");
        Ok(())
    }

    #[test]
    fn gradients_reach_the_pixels_and_every_weight() -> Result<()> {
        let config = Config { crop_size: 8, widths: vec![2, 4], group_width: 2, dimension: 3 };
        let (network, parameters) = load(&config, DType::F64)?;
        let faces = Address::new(1, "faces").normal((1, 3, 8, 8), DType::F64, &Device::Cpu)?;
        let check = check_gradients(std::slice::from_ref(&faces), |x| Ok(vec![network.embed(&x[0])?]))?;
        assert!(check.worst() < 1e-6 && check.norms[0] > 1e-3, "{check:?}");
        let gradients = network.embed(&faces)?.narrow(1, 0, 1)?.sum_all()?.backward()?;
        for (name, variable) in parameters.all() {
            assert!(gradients.get(&variable).is_some(), "{name}");
        }
        Ok(())
    }

    #[test]
    fn crops_and_configurations_that_do_not_fit_are_refused() -> Result<()> {
        let (network, _) = load(&Config::mini(), DType::F32)?;
        let faces = Tensor::zeros((1, 3, 112, 112), DType::F32, &Device::Cpu)?;
        assert!(matches!(network.embed(&faces), Err(Error::Argument { argument: "faces", .. })));
        for config in [Config { crop_size: 60, ..Config::mini() }, Config { widths: vec![12], ..Config::mini() }] {
            let weights = Weights::shapes_only();
            assert!(matches!(MiniIdentity::load(&config, &weights), Err(Error::Config { .. })));
        }
        Ok(())
    }
}

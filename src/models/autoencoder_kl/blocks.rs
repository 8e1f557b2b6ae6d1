//! What the encoder and the decoder are made of.

use candle_core::Tensor;

use super::Config;
use crate::Result;
use crate::nn::{Conv2d, GroupNorm, Linear, Loras, Weights};
use crate::ops::{self, Activation, Addends, Mask};

/// Epsilon of all group norms (diffusers passes it in code, not in the configuration).
const EPS: f64 = 1e-6;

pub(super) fn norm(config: &Config, channels: usize, weights: &Weights) -> Result<GroupNorm> {
    GroupNorm::load(config.norm_num_groups, channels, EPS, weights)
}

/// diffusers' `ResnetBlock2D` without time embedding.
#[derive(Clone, Debug)]
struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl Resnet {
    fn load(config: &Config, input: usize, output: usize, weights: &Weights) -> Result<Self> {
        let conv_shortcut = match input == output {
            true => None,
            false => Some(Conv2d::load(input, output, 1, 1, 0, true, &weights.pp("conv_shortcut"))?),
        };
        Ok(Resnet {
            norm1: norm(config, input, &weights.pp("norm1"))?,
            conv1: Conv2d::load(input, output, 3, 1, 1, true, &weights.pp("conv1"))?,
            norm2: norm(config, output, &weights.pp("norm2"))?,
            conv2: Conv2d::load(output, output, 3, 1, 1, true, &weights.pp("conv2"))?,
            conv_shortcut,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.conv1.forward(&self.norm1.forward_with(x, Activation::Silu)?)?;
        let y = self.norm2.forward_with(&y, Activation::Silu)?;
        let shortcut = self.conv_shortcut.as_ref().map(|conv| conv.forward(x)).transpose()?;
        let residual = Addends { residual: Some(shortcut.as_ref().unwrap_or(x)), ..Addends::default() };
        self.conv2.forward_adding(&y, &Loras::none(), &residual)
    }
}

/// Self-attention over all pixels, with one head (diffusers: `Attention` with `residual_connection`).
#[derive(Clone, Debug)]
struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    fn load(config: &Config, channels: usize, weights: &Weights) -> Result<Self> {
        // Files written before diffusers 0.15 have the second names.
        let linear = |new: &str, old: &str| {
            let name = if weights.contains(&format!("{new}.weight")) { new } else { old };
            Linear::load(channels, channels, true, &weights.pp(name))
        };
        Ok(Attention {
            group_norm: norm(config, channels, &weights.pp("group_norm"))?,
            to_q: linear("to_q", "query")?,
            to_k: linear("to_k", "key")?,
            to_v: linear("to_v", "value")?,
            to_out: linear("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let y = self.group_norm.forward(x)?.reshape((batch, height * width, channels))?;
        let (q, k, v) = (self.to_q.forward(&y)?, self.to_k.forward(&y)?, self.to_v.forward(&y)?);
        let y = ops::attention(&q, (&k, &v), None, 1, Mask::None)?;
        let residual = ops::reshape(x, y.shape())?;
        ops::reshape(&self.to_out.forward_adding(&y, &Loras::none(), Some(&residual))?, x.shape())
    }
}

/// diffusers' `UNetMidBlock2D`.
#[derive(Clone, Debug)]
pub(super) struct Mid {
    resnets: [Resnet; 2],
    attention: Option<Attention>,
}

impl Mid {
    pub fn load(config: &Config, channels: usize, weights: &Weights) -> Result<Self> {
        let resnet = |i: usize| Resnet::load(config, channels, channels, &weights.pp("resnets").pp(i));
        let attention = match config.mid_block_add_attention {
            true => Some(Attention::load(config, channels, &weights.pp("attentions").pp(0))?),
            false => None,
        };
        Ok(Mid { resnets: [resnet(0)?, resnet(1)?], attention })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.resnets[0].forward(x)?;
        let x = match &self.attention {
            Some(attention) => attention.forward(&x)?,
            None => x,
        };
        self.resnets[1].forward(&x)
    }
}

/// The resnets of a resolution, and the way to the next one.
#[derive(Clone, Debug)]
pub(super) struct Stage {
    resnets: Vec<Resnet>,
    resample: Option<Resample>,
}

#[derive(Clone, Debug)]
enum Resample {
    Down(Conv2d),
    Up(Conv2d),
}

/// Which way a [`Stage`] leads.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Direction {
    /// diffusers' `DownEncoderBlock2D`.
    Down,
    /// diffusers' `UpDecoderBlock2D`.
    Up,
}

impl Stage {
    pub fn load(
        config: &Config,
        [input, output]: [usize; 2],
        direction: Direction,
        last: bool,
        weights: &Weights,
    ) -> Result<Self> {
        let count = config.layers_per_block + usize::from(direction == Direction::Up);
        let resnets = (0..count)
            .map(|i| Resnet::load(config, if i == 0 { input } else { output }, output, &weights.pp("resnets").pp(i)))
            .collect::<Result<_>>()?;
        let conv = |name: &str, stride: usize, padding: usize| {
            Conv2d::load(output, output, 3, stride, padding, true, &weights.pp(name).pp(0).pp("conv"))
        };
        let resample = match (last, direction) {
            (true, _) => None,
            // Zeros on the right and below only, as the original autoencoder has them.
            (false, Direction::Down) => Some(Resample::Down(conv("downsamplers", 2, 0)?.with_padding_end(1))),
            (false, Direction::Up) => Some(Resample::Up(conv("upsamplers", 1, 1)?)),
        };
        Ok(Stage { resnets, resample })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.resnets.iter().try_fold(x.clone(), |x, resnet| resnet.forward(&x))?;
        match &self.resample {
            None => Ok(x),
            Some(Resample::Down(conv)) => conv.forward(&x),
            Some(Resample::Up(conv)) => conv.forward(&ops::upsample_nearest_2x(&x)?),
        }
    }
}

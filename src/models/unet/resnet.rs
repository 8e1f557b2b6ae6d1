//! diffusers' `ResnetBlock2D`, `Downsample2D` and `Upsample2D`, channels-last.

use candle_core::Tensor;

use super::Config;
use crate::Result;
use crate::nn::{Conv2d, GroupNorm, Linear, Loras, Weights};
use crate::ops::{Activation, Addends, upsample_nearest_2x};

#[derive(Debug)]
pub(super) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Linear,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl Resnet {
    pub fn load(config: &Config, input: usize, output: usize, weights: &Weights) -> Result<Self> {
        let (groups, eps) = (config.norm_num_groups, config.norm_eps);
        let conv_shortcut = match input == output {
            true => None,
            false => Some(Conv2d::load(input, output, 1, 1, 0, true, &weights.pp("conv_shortcut"))?),
        };
        Ok(Resnet {
            norm1: GroupNorm::load(groups, input, eps, &weights.pp("norm1"))?,
            conv1: Conv2d::load(input, output, 3, 1, 1, true, &weights.pp("conv1"))?,
            time_emb_proj: Linear::load(config.time_embed_dim(), output, true, &weights.pp("time_emb_proj"))?,
            norm2: GroupNorm::load(groups, output, eps, &weights.pp("norm2"))?,
            conv2: Conv2d::load(output, output, 3, 1, 1, true, &weights.pp("conv2"))?,
            conv_shortcut,
        })
    }

    /// `x`: `(batch, height, width, input)`; `time`: `(batch, time_embed_dim)`, after its silu.
    pub fn forward(&self, x: &Tensor, time: &Tensor, loras: &Loras) -> Result<Tensor> {
        self.second_half(&self.first_half(x, time, loras)?, x, loras)
    }

    /// To the first convolution, with the time added.
    pub fn first_half(&self, x: &Tensor, time: &Tensor, loras: &Loras) -> Result<Tensor> {
        let time = self.time_emb_proj.forward_adapted(time, loras)?;
        let with_time = Addends { per_sample: Some(&time), ..Addends::default() };
        self.conv1.forward_adding(&self.norm1.forward_with(x, Activation::Silu)?, loras, &with_time)
    }

    /// From what the first half returns, with `x` as that got it.
    pub fn second_half(&self, hidden: &Tensor, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        let normed = self.norm2.forward_with(hidden, Activation::Silu)?;
        let shortcut = match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward_adapted(x, loras)?,
            None => x.clone(),
        };
        self.conv2.forward_adding(&normed, loras, &Addends { residual: Some(&shortcut), ..Addends::default() })
    }
}

/// Halves the resolution by a convolution of stride 2.
#[derive(Debug)]
pub(super) struct Downsample(Conv2d);

impl Downsample {
    pub fn load(channels: usize, weights: &Weights) -> Result<Self> {
        Ok(Downsample(Conv2d::load(channels, channels, 3, 2, 1, true, &weights.pp("conv"))?))
    }

    pub fn forward(&self, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        self.0.forward_adapted(x, loras)
    }
}

/// Doubles the resolution by repetition and a convolution.
#[derive(Debug)]
pub(super) struct Upsample(Conv2d);

impl Upsample {
    pub fn load(channels: usize, weights: &Weights) -> Result<Self> {
        Ok(Upsample(Conv2d::load(channels, channels, 3, 1, 1, true, &weights.pp("conv"))?))
    }

    pub fn forward(&self, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        self.0.forward_adapted(&upsample_nearest_2x(x)?, loras)
    }
}

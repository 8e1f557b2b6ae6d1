//! The IR residual networks for faces: IR-SE50 of TreB1eN's InsightFace_Pytorch, which the paper's identity loss uses,
//! and IR-101 of CurricularFace (Huang et al. 2020), the paper's evaluator. Tensor names as in both files.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::identity::{IdentityNetwork, check_faces, flat, normalise};
use super::{to_channels_first, to_channels_last};
use crate::nn::{BatchNorm, Conv2d, Linear, PRelu, Weights};
use crate::ops::{self, Activation};
use crate::{Error, Result};

const EPS: f64 = 1e-5;

/// The architecture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Width and height of the crops.
    pub crop_size: usize,
    /// Channels of the input layer.
    pub input_width: usize,
    /// Channels of the stages, each of which halves the sides.
    pub widths: Vec<usize>,
    /// Blocks of the stages.
    pub blocks: Vec<usize>,
    /// Reduction of the squeeze-and-excitation of every block; `None` for none.
    pub se_reduction: Option<usize>,
    /// Length of an embedding.
    pub dimension: usize,
    /// Whether the last batch norm has weight and bias.
    pub affine_output: bool,
}

impl Config {
    /// IR-SE50: `model_ir_se50.pth`.
    pub fn ir_se_50() -> Self {
        Config {
            crop_size: 112,
            input_width: 64,
            widths: vec![64, 128, 256, 512],
            blocks: vec![3, 4, 14, 3],
            se_reduction: Some(16),
            dimension: 512,
            affine_output: true,
        }
    }

    /// CurricularFace's IR-101: `CurricularFace_Backbone.pth`.
    pub fn curricular_face() -> Self {
        Config { blocks: vec![3, 13, 30, 3], se_reduction: None, affine_output: false, ..Self::ir_se_50() }
    }

    fn check(&self) -> Result<usize> {
        let fault = |field: &str, reason: String| {
            Err(Error::Config { source_name: "ir_resnet".into(), field: field.into(), reason })
        };
        let side = self.crop_size.checked_shr(self.widths.len() as u32).unwrap_or(0);
        if self.widths.is_empty() || side == 0 || side << self.widths.len() != self.crop_size {
            return fault("crop_size", format!("{} cannot be halved {} times", self.crop_size, self.widths.len()));
        }
        if self.blocks.len() != self.widths.len() || self.blocks.iter().any(|count| !(1..=256).contains(count)) {
            return fault("blocks", format!("expected 1 to 256 for each of {} stages", self.widths.len()));
        }
        let reduction = self.se_reduction.unwrap_or(1);
        if reduction == 0 || self.widths.iter().any(|width| !(reduction..=1 << 14).contains(width)) {
            return fault("widths", format!("expected se_reduction ({reduction}) to 16384, found {:?}", self.widths));
        }
        Ok(side)
    }
}

/// Weighs the channels by what the whole image holds (Hu et al. 2018).
#[derive(Clone, Debug)]
struct SqueezeExcitation {
    fc1: Conv2d,
    fc2: Conv2d,
}

impl SqueezeExcitation {
    fn load(channels: usize, reduction: usize, weights: &Weights) -> Result<Self> {
        let inner = channels / reduction;
        Ok(SqueezeExcitation {
            fc1: Conv2d::load(channels, inner, 1, 1, 0, false, &weights.pp("fc1"))?,
            fc2: Conv2d::load(inner, channels, 1, 1, 0, false, &weights.pp("fc2"))?,
        })
    }

    /// The logits of the weights, `(batch, 1, 1, channels)`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = ops::activation(&self.fc1.forward(&ops::mean_pixels(x)?)?, Activation::Relu)?;
        self.fc2.forward(&y)
    }
}

#[derive(Clone, Debug)]
struct Block {
    norm1: BatchNorm,
    conv1: Conv2d,
    prelu: PRelu,
    conv2: Conv2d,
    norm2: BatchNorm,
    se: Option<SqueezeExcitation>,
    shortcut: Option<(Conv2d, BatchNorm)>,
    stride: usize,
}

impl Block {
    fn load(config: &Config, input: usize, output: usize, stride: usize, weights: &Weights) -> Result<Self> {
        let (main, side) = (weights.pp("res_layer"), weights.pp("shortcut_layer"));
        let shortcut = match input == output {
            // A maximum over windows of one pixel, which has no weights.
            true => None,
            false => Some((
                Conv2d::load(input, output, 1, stride, 0, false, &side.pp(0))?,
                BatchNorm::load(output, EPS, true, &side.pp(1))?,
            )),
        };
        Ok(Block {
            norm1: BatchNorm::load(input, EPS, true, &main.pp(0))?,
            conv1: Conv2d::load(input, output, 3, 1, 1, false, &main.pp(1))?,
            prelu: PRelu::load(output, &main.pp(2))?,
            conv2: Conv2d::load(output, output, 3, stride, 1, false, &main.pp(3))?,
            norm2: BatchNorm::load(output, EPS, true, &main.pp(4))?,
            se: config.se_reduction.map(|r| SqueezeExcitation::load(output, r, &main.pp(5))).transpose()?,
            shortcut,
            stride,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.prelu.forward(&self.conv1.forward(&self.norm1.forward(x)?)?)?;
        let y = self.norm2.forward(&self.conv2.forward(&y)?)?;
        let shortcut = match (&self.shortcut, self.stride) {
            (Some((conv, norm)), _) => norm.forward(&conv.forward(x)?)?,
            (None, 1) => x.clone(),
            (None, stride) => ops::max_pool2d(x, 1, stride)?,
        };
        match &self.se {
            Some(se) => ops::gated_sum(&y, &se.forward(&y)?, &shortcut),
            None => ops::add(&y, &shortcut),
        }
    }
}

/// An IR network.
#[derive(Clone, Debug)]
pub struct IrResnet {
    config: Config,
    input: (Conv2d, BatchNorm, PRelu),
    body: Vec<Block>,
    output_norm: BatchNorm,
    output: Linear,
    embedding_norm: BatchNorm,
}

impl IrResnet {
    /// Loads `input_layer.*`, `body.*` and `output_layer.*`.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let side = config.check()?;
        let (input, output) = (weights.pp("input_layer"), weights.pp("output_layer"));
        let (mut body, mut width) = (Vec::new(), config.input_width);
        for (&next, &count) in config.widths.iter().zip(&config.blocks) {
            for i in 0..count {
                let stride = if i == 0 { 2 } else { 1 };
                body.push(Block::load(config, width, next, stride, &weights.pp("body").pp(body.len()))?);
                width = next;
            }
        }
        Ok(IrResnet {
            input: (
                Conv2d::load(3, config.input_width, 3, 1, 1, false, &input.pp(0))?,
                BatchNorm::load(config.input_width, EPS, true, &input.pp(1))?,
                PRelu::load(config.input_width, &input.pp(2))?,
            ),
            body,
            output_norm: BatchNorm::load(width, EPS, true, &output.pp(0))?,
            // 1 and 2 are dropout and flattening.
            output: Linear::load(width * side * side, config.dimension, true, &output.pp(3))?,
            embedding_norm: BatchNorm::load(config.dimension, EPS, config.affine_output, &output.pp(4))?,
            config: config.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

impl IdentityNetwork for IrResnet {
    fn embed(&self, faces: &Tensor) -> Result<Tensor> {
        check_faces("ir_resnet", faces, self.config.crop_size)?;
        let (conv, norm, prelu) = &self.input;
        let x = prelu.forward(&norm.forward(&conv.forward(&to_channels_last(faces)?)?)?)?;
        let x = self.body.iter().try_fold(x, |x, block| block.forward(&x))?;
        // Flattened in the order of the published weights: channels first.
        let x = flat(&to_channels_first(&self.output_norm.forward(&x)?)?)?;
        normalise(&self.embedding_norm.forward(&self.output.forward(&x)?)?)
    }

    fn crop_size(&self) -> usize {
        self.config.crop_size
    }

    fn dimension(&self) -> usize {
        self.config.dimension
    }
}

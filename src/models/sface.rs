//! SFace (Zhong et al. 2021), the face recogniser of OpenCV's model zoo, with the names of the initialisers of
//! `face_recognition_sface_2021dec.onnx`.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::identity::{IdentityNetwork, check_faces, flat, normalise};
use super::{to_channels_first, to_channels_last};
use crate::nn::{BatchNorm, Conv2d, DepthwiseConv2d, Init, PRelu, Weights};
use crate::ops;
use crate::{Error, Result};

/// Epsilon of the batch norms behind convolutions.
const EPS: f64 = 1e-3;
/// Epsilon of the batch norms around the last layer.
const OUTPUT_EPS: f64 = 2e-5;

/// The architecture: a MobileNet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Width and height of the crops.
    pub crop_size: usize,
    /// Channels of the first convolution.
    pub input_width: usize,
    /// Channels behind each pair of a depthwise and a pointwise convolution.
    pub widths: Vec<usize>,
    /// Strides of the depthwise convolutions, 1 or 2.
    pub strides: Vec<usize>,
    /// Length of an embedding.
    pub dimension: usize,
}

impl Config {
    /// The published network.
    pub fn sface() -> Self {
        Config {
            crop_size: 112,
            input_width: 32,
            widths: vec![64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024],
            strides: vec![1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1],
            dimension: 128,
        }
    }

    fn check(&self) -> Result<usize> {
        let fits = self.strides.iter().all(|stride| (1..=2).contains(stride));
        let factor: usize = if fits { self.strides.iter().take(16).product() } else { 0 };
        if factor == 0
            || self.widths.is_empty()
            || self.widths.len() != self.strides.len()
            || self.crop_size == 0
            || !self.crop_size.is_multiple_of(factor)
            || self.widths.iter().any(|width| !(1..=1 << 14).contains(width))
        {
            return Err(Error::Config {
                source_name: "sface".into(),
                field: "strides".into(),
                reason: format!(
                    "expected strides of 1 or 2, as many as widths, whose product divides the crop ({}); found {:?}",
                    self.crop_size, self.strides
                ),
            });
        }
        Ok(self.crop_size / factor)
    }
}

#[derive(Clone, Debug)]
enum Convolution {
    Full(Conv2d),
    Depthwise(DepthwiseConv2d),
}

/// Convolution, batch norm, PReLU.
#[derive(Clone, Debug)]
struct Unit {
    conv: Convolution,
    norm: BatchNorm,
    prelu: PRelu,
}

impl Unit {
    fn load(
        name: &str,
        input: Option<usize>,
        output: usize,
        kernel: usize,
        stride: usize,
        all: &Weights,
    ) -> Result<Self> {
        let (weight, padding) = (format!("{name}_conv2d_weight"), kernel / 2);
        let conv = match input {
            Some(input) => {
                Convolution::Full(Conv2d::load_named([input, output, kernel, stride, padding], &weight, None, all)?)
            }
            None => Convolution::Depthwise(DepthwiseConv2d::load_named(
                [output, kernel, stride, padding],
                &weight,
                None,
                all,
            )?),
        };
        Ok(Unit {
            conv,
            norm: batch_norm(&format!("{name}_batchnorm"), output, EPS, all)?,
            prelu: PRelu::load_onnx(output, &format!("{name}_relu_gamma"), all)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = match &self.conv {
            Convolution::Full(conv) => conv.forward(x)?,
            Convolution::Depthwise(conv) => conv.forward(x)?,
        };
        self.prelu.forward(&self.norm.forward(&x)?)
    }
}

fn batch_norm(name: &str, channels: usize, eps: f64, weights: &Weights) -> Result<BatchNorm> {
    let [gamma, beta, mean, variance] =
        ["gamma", "beta", "moving_mean", "moving_var"].map(|part| format!("{name}_{part}"));
    BatchNorm::load_named(channels, eps, [Some(gamma.as_str()), Some(beta.as_str())], [&mean, &variance], weights)
}

/// SFace.
#[derive(Clone, Debug)]
pub struct SFace {
    config: Config,
    scale: Tensor,
    shift: Tensor,
    units: Vec<Unit>,
    bn1: BatchNorm,
    weight: Tensor,
    bias: Tensor,
    fc1: BatchNorm,
}

impl SFace {
    /// Loads the initialisers of the ONNX file by their names.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let side = config.check()?;
        let mut width = config.input_width;
        let mut units = vec![Unit::load("conv_1", Some(3), width, 3, 1, weights)?];
        for (i, (&next, &stride)) in config.widths.iter().zip(&config.strides).enumerate() {
            units.push(Unit::load(&format!("conv_{}_dw", i + 2), None, width, 3, stride, weights)?);
            units.push(Unit::load(&format!("conv_{}", i + 2), Some(width), next, 1, 1, weights)?);
            width = next;
        }
        let flat = width * side * side;
        // What is subtracted, then multiplied by, the same for every channel.
        let (mean, scale) = (weights.get(1, "scalar_op1", Init::Zeros)?, weights.get(1, "scalar_op2", Init::Ones)?);
        Ok(SFace {
            shift: (mean * &scale)?.neg()?.broadcast_as(3)?.contiguous()?,
            scale: scale.broadcast_as(3)?.contiguous()?,
            units,
            bn1: batch_norm("bn1", width, OUTPUT_EPS, weights)?,
            weight: weights.get((config.dimension, flat), "pre_fc1_weight", Init::FanIn(flat))?,
            bias: weights.get(config.dimension, "pre_fc1_bias", Init::Zeros)?,
            fc1: batch_norm("fc1", config.dimension, OUTPUT_EPS, weights)?,
            config: config.clone(),
        })
    }
}

impl IdentityNetwork for SFace {
    fn embed(&self, faces: &Tensor) -> Result<Tensor> {
        check_faces("sface", faces, self.config.crop_size)?;
        // The network itself takes bytes as numbers, RGB.
        let bytes = ops::affine(&to_channels_last(faces)?, 127.5, 127.5)?;
        let x = ops::channel_affine(&bytes, &self.scale, &self.shift)?;
        let x = self.units.iter().try_fold(x, |x, unit| unit.forward(&x))?;
        // Flattened in the order of the published weights: channels first.
        let x = flat(&to_channels_first(&self.bn1.forward(&x)?)?)?;
        normalise(&self.fc1.forward(&ops::linear(&x, &self.weight, Some(&self.bias))?)?)
    }

    fn crop_size(&self) -> usize {
        self.config.crop_size
    }

    fn dimension(&self) -> usize {
        self.config.dimension
    }
}

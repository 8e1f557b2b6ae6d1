//! A MobileFaceNet (Chen et al. 2018) of 1.2 million parameters, with the names of the initialisers of
//! `fr_feature.onnx`: batch norms folded, convolutions and slopes numbered by the exporter.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::identity::{IdentityNetwork, check_faces, flat, normalise};
use super::to_channels_last;
use crate::nn::{Conv2d, DepthwiseConv2d, PRelu, Weights};
use crate::{Error, Result, ops};

/// Blocks of one size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Channels inside a block.
    pub expansion: usize,
    /// Channels behind a block.
    pub width: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Stride of every one of them, 1 or 2. Those of stride 1 are residual.
    pub stride: usize,
}

/// The architecture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Width and height of the crops.
    pub crop_size: usize,
    /// Channels of the first convolutions, of which the first has stride 2.
    pub input_width: usize,
    /// The bottlenecks.
    pub stages: Vec<Stage>,
    /// Channels before the embedding, and its length.
    pub dimension: usize,
    /// The exporter's number of the first convolution's weight; the others count on from it by threes.
    pub first_convolution: usize,
    /// The exporter's number of the first slope.
    pub first_slope: usize,
}

impl Config {
    /// `fr_feature.onnx`.
    pub fn fr_feature() -> Self {
        let stage = |expansion, width, blocks, stride| Stage { expansion, width, blocks, stride };
        Config {
            crop_size: 112,
            input_width: 64,
            stages: vec![
                stage(128, 64, 1, 2),
                stage(128, 64, 4, 1),
                stage(256, 128, 1, 2),
                stage(256, 128, 6, 1),
                stage(512, 128, 1, 2),
                stage(256, 128, 2, 1),
            ],
            dimension: 512,
            first_convolution: 519,
            first_slope: 668,
        }
    }

    fn check(&self) -> Result<usize> {
        let strides = || self.stages.iter().flat_map(|stage| std::iter::repeat_n(stage.stride, stage.blocks.min(64)));
        let halvings = 1 + strides().filter(|stride| *stride == 2).count();
        let side = self.crop_size.checked_shr(halvings as u32).unwrap_or(0);
        let fits = |stage: &Stage| {
            let sizes = [stage.expansion, stage.width, stage.blocks];
            sizes.iter().all(|size| (1..=1 << 14).contains(size)) && (1..=2).contains(&stage.stride)
        };
        if side == 0 || side << halvings != self.crop_size || !self.stages.iter().all(fits) {
            return Err(Error::Config {
                source_name: "mobile_face_net".into(),
                field: "stages".into(),
                reason: format!("expected strides of 1 or 2 that halve {} {halvings} times", self.crop_size),
            });
        }
        Ok(side)
    }
}

/// Hands out the exporter's names in the order of the graph.
struct Names<'a> {
    weights: &'a Weights,
    convolution: usize,
    slope: usize,
}

impl Names<'_> {
    fn next(&mut self) -> [String; 2] {
        self.convolution += 3;
        [self.convolution - 3, self.convolution - 2].map(|number| number.to_string())
    }

    fn conv(&mut self, input: usize, output: usize, kernel: usize, stride: usize) -> Result<Conv2d> {
        let [weight, bias] = self.next();
        Conv2d::load_named([input, output, kernel, stride, kernel / 2], &weight, Some(&bias), self.weights)
    }

    fn depthwise(&mut self, channels: usize, kernel: usize, stride: usize, padding: usize) -> Result<DepthwiseConv2d> {
        let [weight, bias] = self.next();
        DepthwiseConv2d::load_named([channels, kernel, stride, padding], &weight, Some(&bias), self.weights)
    }

    fn prelu(&mut self, channels: usize) -> Result<PRelu> {
        self.slope += 1;
        PRelu::load_onnx(channels, &(self.slope - 1).to_string(), self.weights)
    }
}

/// Expansion, depthwise convolution, projection.
#[derive(Clone, Debug)]
struct Bottleneck {
    expand: (Conv2d, PRelu),
    depthwise: (DepthwiseConv2d, PRelu),
    project: Conv2d,
    residual: bool,
}

impl Bottleneck {
    fn load(input: usize, stage: &Stage, names: &mut Names<'_>) -> Result<Self> {
        let inner = stage.expansion;
        Ok(Bottleneck {
            expand: (names.conv(input, inner, 1, 1)?, names.prelu(inner)?),
            depthwise: (names.depthwise(inner, 3, stage.stride, 1)?, names.prelu(inner)?),
            project: names.conv(inner, stage.width, 1, 1)?,
            residual: stage.stride == 1,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.expand.1.forward(&self.expand.0.forward(x)?)?;
        let y = self.project.forward(&self.depthwise.1.forward(&self.depthwise.0.forward(&y)?)?)?;
        if self.residual { ops::add(&y, x) } else { Ok(y) }
    }
}

/// The MobileFaceNet.
#[derive(Clone, Debug)]
pub struct MobileFaceNet {
    config: Config,
    input: (Conv2d, PRelu),
    depthwise: (DepthwiseConv2d, PRelu),
    bottlenecks: Vec<Bottleneck>,
    head: (Conv2d, PRelu),
    global: DepthwiseConv2d,
    output: Conv2d,
}

impl MobileFaceNet {
    /// Loads the initialisers of the ONNX file by their names.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let side = config.check()?;
        let mut names = Names { weights, convolution: config.first_convolution, slope: config.first_slope };
        let first = config.input_width;
        let input = (names.conv(3, first, 3, 2)?, names.prelu(first)?);
        let depthwise = (names.depthwise(first, 3, 1, 1)?, names.prelu(first)?);
        let (mut bottlenecks, mut width) = (Vec::new(), first);
        for stage in &config.stages {
            for _ in 0..stage.blocks {
                bottlenecks.push(Bottleneck::load(width, stage, &mut names)?);
                width = stage.width;
            }
        }
        let dimension = config.dimension;
        Ok(MobileFaceNet {
            input,
            depthwise,
            bottlenecks,
            head: (names.conv(width, dimension, 1, 1)?, names.prelu(dimension)?),
            global: names.depthwise(dimension, side, 1, 0)?,
            output: names.conv(dimension, dimension, 1, 1)?,
            config: config.clone(),
        })
    }
}

impl IdentityNetwork for MobileFaceNet {
    fn embed(&self, faces: &Tensor) -> Result<Tensor> {
        check_faces("mobile_face_net", faces, self.config.crop_size)?;
        // The network itself takes (byte - 127) / 128, RGB.
        let x = ops::affine(&to_channels_last(faces)?, 127.5 / 128.0, 0.5 / 128.0)?;
        let x = self.input.1.forward(&self.input.0.forward(&x)?)?;
        let x = self.depthwise.1.forward(&self.depthwise.0.forward(&x)?)?;
        let x = self.bottlenecks.iter().try_fold(x, |x, bottleneck| bottleneck.forward(&x))?;
        let x = self.head.1.forward(&self.head.0.forward(&x)?)?;
        normalise(&flat(&self.output.forward(&self.global.forward(&x)?)?)?)
    }

    fn crop_size(&self) -> usize {
        self.config.crop_size
    }

    fn dimension(&self) -> usize {
        self.config.dimension
    }
}

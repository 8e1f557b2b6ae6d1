//! ArcFace's residual networks (Deng et al. 2019), with the tensor names of InsightFace's PyTorch `iresnet50` and
//! `iresnet100`.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::identity::{IdentityNetwork, check_faces, flat, normalise};
use super::{to_channels_first, to_channels_last};
use crate::nn::{BatchNorm, Conv2d, Linear, PRelu, Weights};
use crate::{Error, Result, ops};

const EPS: f64 = 1e-5;

/// The architecture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Width and height of the crops.
    pub crop_size: usize,
    /// Channels of the four layers, each of which halves the sides; the first also of the stem.
    pub widths: [usize; 4],
    /// Blocks of the four layers.
    pub layers: [usize; 4],
    /// Length of an embedding.
    pub dimension: usize,
}

impl Config {
    /// iresnet-50.
    pub fn iresnet_50() -> Self {
        Config { crop_size: 112, widths: [64, 128, 256, 512], layers: [3, 4, 14, 3], dimension: 512 }
    }

    /// iresnet-100.
    pub fn iresnet_100() -> Self {
        Config { layers: [3, 13, 30, 3], ..Self::iresnet_50() }
    }

    fn check(&self) -> Result<usize> {
        let side = self.crop_size / 16;
        let fits = |counts: &[usize; 4], most: usize| counts.iter().all(|count| (1..=most).contains(count));
        if side == 0 || side * 16 != self.crop_size || !fits(&self.widths, 1 << 14) || !fits(&self.layers, 256) {
            return Err(Error::Config {
                source_name: "iresnet".into(),
                field: "crop_size".into(),
                reason: format!(
                    "expected a multiple of 16, widths up to 16384 and up to 256 layers, found {}, {:?} and {:?}",
                    self.crop_size, self.widths, self.layers
                ),
            });
        }
        Ok(side)
    }
}

/// InsightFace's `IBasicBlock`.
#[derive(Clone, Debug)]
struct Block {
    bn1: BatchNorm,
    conv1: Conv2d,
    bn2: BatchNorm,
    prelu: PRelu,
    conv2: Conv2d,
    bn3: BatchNorm,
    downsample: Option<(Conv2d, BatchNorm)>,
}

impl Block {
    fn load(input: usize, output: usize, first: bool, weights: &Weights) -> Result<Self> {
        let norm = |channels: usize, name: &str| BatchNorm::load(channels, EPS, true, &weights.pp(name));
        let (stride, side) = (if first { 2 } else { 1 }, weights.pp("downsample"));
        let downsample = match first {
            true => Some((
                Conv2d::load(input, output, 1, stride, 0, false, &side.pp(0))?,
                BatchNorm::load(output, EPS, true, &side.pp(1))?,
            )),
            false => None,
        };
        Ok(Block {
            bn1: norm(input, "bn1")?,
            conv1: Conv2d::load(input, output, 3, 1, 1, false, &weights.pp("conv1"))?,
            bn2: norm(output, "bn2")?,
            prelu: PRelu::load(output, &weights.pp("prelu"))?,
            conv2: Conv2d::load(output, output, 3, stride, 1, false, &weights.pp("conv2"))?,
            bn3: norm(output, "bn3")?,
            downsample,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.bn2.forward(&self.conv1.forward(&self.bn1.forward(x)?)?)?;
        let y = self.bn3.forward(&self.conv2.forward(&self.prelu.forward(&y)?)?)?;
        match &self.downsample {
            Some((conv, norm)) => ops::add(&y, &norm.forward(&conv.forward(x)?)?),
            None => ops::add(&y, x),
        }
    }
}

/// An ArcFace network.
#[derive(Clone, Debug)]
pub struct IResnet {
    config: Config,
    conv1: Conv2d,
    bn1: BatchNorm,
    prelu: PRelu,
    blocks: Vec<Block>,
    bn2: BatchNorm,
    fc: Linear,
    features: BatchNorm,
}

impl IResnet {
    /// Loads `conv1`, `bn1`, `prelu`, `layer1.*` to `layer4.*`, `bn2`, `fc` and `features`.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let side = config.check()?;
        let first = config.widths[0];
        let (mut blocks, mut width) = (Vec::new(), first);
        for (layer, (&next, &count)) in config.widths.iter().zip(&config.layers).enumerate() {
            let at = weights.pp(format!("layer{}", layer + 1));
            for i in 0..count {
                blocks.push(Block::load(width, next, i == 0, &at.pp(i))?);
                width = next;
            }
        }
        Ok(IResnet {
            conv1: Conv2d::load(3, first, 3, 1, 1, false, &weights.pp("conv1"))?,
            bn1: BatchNorm::load(first, EPS, true, &weights.pp("bn1"))?,
            prelu: PRelu::load(first, &weights.pp("prelu"))?,
            blocks,
            bn2: BatchNorm::load(width, EPS, true, &weights.pp("bn2"))?,
            fc: Linear::load(width * side * side, config.dimension, true, &weights.pp("fc"))?,
            features: BatchNorm::load(config.dimension, EPS, true, &weights.pp("features"))?,
            config: config.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

impl IdentityNetwork for IResnet {
    fn embed(&self, faces: &Tensor) -> Result<Tensor> {
        check_faces("iresnet", faces, self.config.crop_size)?;
        let x = self.conv1.forward(&to_channels_last(faces)?)?;
        let x = self.prelu.forward(&self.bn1.forward(&x)?)?;
        let x = self.blocks.iter().try_fold(x, |x, block| block.forward(&x))?;
        // Flattened in the order of the published weights: channels first.
        let x = flat(&to_channels_first(&self.bn2.forward(&x)?)?)?;
        normalise(&self.features.forward(&self.fc.forward(&x)?)?)
    }

    fn crop_size(&self) -> usize {
        self.config.crop_size
    }

    fn dimension(&self) -> usize {
        self.config.dimension
    }
}

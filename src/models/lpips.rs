//! LPIPS, the learnt perceptual distance of Zhang et al. 2018 (version 0.1), on VGG-16 or AlexNet.

use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};

use super::{image_dims, to_channels_last};
use crate::nn::{Conv2d, Init, Weights};
use crate::ops::{self, Activation};
use crate::{Error, Result};

/// The published scaling of images in [-1, 1].
const SHIFT: [f64; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f64; 3] = [0.458, 0.448, 0.450];

/// Whose features are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backbone {
    /// torchvision's `vgg16`.
    Vgg16,
    /// torchvision's `alexnet`.
    AlexNet,
}

/// The architecture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Whose features are compared.
    pub backbone: Backbone,
    /// Channels of the five compared features.
    pub widths: [usize; 5],
}

/// A convolution: its index in torchvision's `features`, kernel, stride and padding.
type Convolution = (usize, usize, usize, usize);

impl Config {
    /// On VGG-16: what is used as a loss.
    pub fn vgg() -> Self {
        Config { backbone: Backbone::Vgg16, widths: [64, 128, 256, 512, 512] }
    }

    /// On AlexNet: what is used as a metric.
    pub fn alex() -> Self {
        Config { backbone: Backbone::AlexNet, widths: [64, 192, 384, 256, 256] }
    }

    /// For each slice the kernel of the pooling before it, with stride 2, and its convolutions.
    fn slices(&self) -> [(Option<usize>, Vec<Convolution>); 5] {
        let three = |indices: &[usize]| indices.iter().map(|&index| (index, 3, 1, 1)).collect();
        match self.backbone {
            Backbone::Vgg16 => [
                (None, three(&[0, 2])),
                (Some(2), three(&[5, 7])),
                (Some(2), three(&[10, 12, 14])),
                (Some(2), three(&[17, 19, 21])),
                (Some(2), three(&[24, 26, 28])),
            ],
            Backbone::AlexNet => [
                (None, vec![(0, 11, 4, 2)]),
                (Some(3), vec![(3, 5, 1, 2)]),
                (Some(3), three(&[6])),
                (None, three(&[8])),
                (None, three(&[10])),
            ],
        }
    }

    /// The smallest side of an image.
    fn smallest(&self) -> usize {
        match self.backbone {
            Backbone::Vgg16 => 16,
            Backbone::AlexNet => 31,
        }
    }
}

#[derive(Clone, Debug)]
struct Slice {
    pool: Option<usize>,
    convolutions: Vec<Conv2d>,
    /// Weights of the channels, `(1, channels)`.
    head: Tensor,
}

/// The distance. Differentiable in both images.
#[derive(Clone, Debug)]
pub struct Lpips {
    config: Config,
    slices: Vec<Slice>,
}

impl Lpips {
    /// Loads the backbone from torchvision's file (`features.*`) and the weights of the channels from the file of the
    /// `lpips` package (`lin0.model.1.weight` to `lin4`). Both may be the same `state_dict` of the whole network, in
    /// which the backbone is `net.slice1.0` and so on.
    ///
    /// # Errors
    /// [`Error::Tensor`] where a tensor is missing or misshapen.
    pub fn load(config: &Config, backbone: &Weights, heads: &Weights) -> Result<Self> {
        let whole = !backbone.contains("features.0.weight");
        let (mut slices, mut input) = (Vec::new(), 3);
        for (i, (pool, convolutions)) in config.slices().into_iter().enumerate() {
            let width = config.widths[i];
            let at = if whole { backbone.pp("net").pp(format!("slice{}", i + 1)) } else { backbone.pp("features") };
            let mut loaded = Vec::new();
            for (index, kernel, stride, padding) in convolutions {
                loaded.push(Conv2d::load(input, width, kernel, stride, padding, true, &at.pp(index))?);
                input = width;
            }
            let head = heads.pp(format!("lin{i}.model.1")).get((1, width, 1, 1), "weight", Init::FanIn(width))?;
            slices.push(Slice { pool, convolutions: loaded, head: head.reshape((1, width))? });
        }
        Ok(Lpips { config: config.clone(), slices })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The distances of images `a` and `b`, both `(batch, 3, height, width)` in [-1, 1]: `(batch,)`, in f32 for
    /// networks of bf16 and f16.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shapes differ, or a side is below 16 (VGG-16) or 31 (AlexNet).
    pub fn forward(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let (batch, height, width) = image_dims("lpips", a)?;
        if b.dims() != a.dims() {
            return Err(Error::argument("lpips", "b", format!("{:?}, as a", a.dims()), format!("{:?}", b.dims())));
        }
        let smallest = self.config.smallest();
        if height.min(width) < smallest {
            let expected = format!("sides of at least {smallest}");
            return Err(Error::argument("lpips", "a", expected, format!("{height} x {width}")));
        }
        let mut x = scaled(&to_channels_last(&Tensor::cat(&[a, b], 0)?)?)?;
        let mut distance: Option<Tensor> = None;
        for slice in &self.slices {
            if let Some(kernel) = slice.pool {
                x = ops::max_pool2d(&x, kernel, 2)?;
            }
            for conv in &slice.convolutions {
                x = ops::activation(&conv.forward(&x)?, Activation::Relu)?;
            }
            let features = unit(&x)?;
            let difference = (features.narrow(0, 0, batch)? - features.narrow(0, batch, batch)?)?.sqr()?;
            let here =
                ops::linear(&difference.contiguous()?, &ops::widen(&slice.head)?, None)?.flatten_from(1)?.mean(1)?;
            distance = Some(match distance {
                Some(sum) => (sum + here)?,
                None => here,
            });
        }
        distance.ok_or_else(|| Error::argument("lpips", "config", "five slices", "none"))
    }
}

fn scaled(x: &Tensor) -> Result<Tensor> {
    let row = |values: Vec<f64>| -> Result<Tensor> {
        Ok(Tensor::from_vec(values, 3, &candle_core::Device::Cpu)?.to_dtype(x.dtype())?.to_device(x.device())?)
    };
    let factor = row(SCALE.iter().map(|scale| 1.0 / scale).collect())?;
    let term = row(SHIFT.iter().zip(SCALE).map(|(shift, scale)| -shift / scale).collect())?;
    ops::channel_affine(x, &factor, &term)
}

/// The features of every pixel at unit length, as the `lpips` package computes it; in f32 for bf16 and f16.
fn unit(x: &Tensor) -> Result<Tensor> {
    // The tiny term, which f32 cannot see beside any feature, keeps the gradient finite where all features are 0.
    let x = ops::widen(x)?;
    let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + 1e-20)?.sqrt()?;
    Ok(x.broadcast_div(&(norm + 1e-10)?)?)
}

//! Layers that treat every channel by itself, channels last.

use candle_core::Tensor;

use super::{Init, Weights};
use crate::Result;
use crate::ops;

/// `torch.nn.BatchNorm1d` and `BatchNorm2d` as they are at inference: fixed statistics, so a factor and a term for
/// every channel. For networks that stay frozen.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    scale: Tensor,
    shift: Tensor,
}

impl BatchNorm {
    /// Loads `running_mean` and `running_var`, and `weight` and `bias` where `affine` is set, all `(channels,)`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) where one is missing or misshapen.
    pub fn load(channels: usize, eps: f64, affine: bool, weights: &Weights) -> Result<Self> {
        let names = ["weight", "bias", "running_mean", "running_var"];
        Self::load_named(
            channels,
            eps,
            [affine.then_some(names[0]), affine.then_some(names[1])],
            [names[2], names[3]],
            weights,
        )
    }

    /// The same with names of the file's own: `[gamma, beta]`, and `[mean, variance]`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) where one is missing or misshapen.
    pub(crate) fn load_named(
        channels: usize,
        eps: f64,
        affine: [Option<&str>; 2],
        statistics: [&str; 2],
        weights: &Weights,
    ) -> Result<Self> {
        let mean = weights.get(channels, statistics[0], Init::Zeros)?;
        let dtype = mean.dtype();
        // Once, so in f32 even for networks of bf16 or f16.
        let mean = ops::widen(&mean)?;
        let variance = ops::widen(&weights.get(channels, statistics[1], Init::Ones)?)?;
        let mut scale = (variance + eps)?.sqrt()?.recip()?;
        if let Some(name) = affine[0] {
            scale = (scale * ops::widen(&weights.get(channels, name, Init::Ones)?)?)?;
        }
        let mut shift = (mean * &scale)?.neg()?;
        if let Some(name) = affine[1] {
            shift = (shift + ops::widen(&weights.get(channels, name, Init::Zeros)?)?)?;
        }
        Ok(BatchNorm { scale: scale.contiguous()?.to_dtype(dtype)?, shift: shift.contiguous()?.to_dtype(dtype)? })
    }

    /// `x`: `(..., channels)`.
    ///
    /// # Errors
    /// Those of [`ops::channel_affine`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::channel_affine(x, &self.scale, &self.shift)
    }
}

/// `torch.nn.PReLU` with a slope for every channel.
#[derive(Clone, Debug)]
pub struct PRelu {
    slope: Tensor,
}

impl PRelu {
    /// Loads `weight` `(channels,)`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) where it is missing or misshapen.
    pub fn load(channels: usize, weights: &Weights) -> Result<Self> {
        Ok(PRelu { slope: weights.get(channels, "weight", Init::Normal(0.25))? })
    }

    /// The same from the tensor `name` `(channels, 1, 1)`, as ONNX stores it.
    pub(crate) fn load_onnx(channels: usize, name: &str, weights: &Weights) -> Result<Self> {
        Ok(PRelu { slope: weights.get((channels, 1, 1), name, Init::Normal(0.25))?.flatten_all()? })
    }

    /// `x`: `(..., channels)`.
    ///
    /// # Errors
    /// Those of [`ops::prelu`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::prelu(x, &self.slope)
    }
}

/// `torch.nn.Conv2d` with as many groups as channels and a square kernel.
#[derive(Clone, Debug)]
pub struct DepthwiseConv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    stride: usize,
    padding: usize,
}

impl DepthwiseConv2d {
    /// Loads `weight` `(channels, 1, kernel, kernel)`, as PyTorch stores it, and, where `bias` is set, `bias`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) where one is missing or misshapen.
    pub fn load(
        channels: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
        bias: bool,
        weights: &Weights,
    ) -> Result<Self> {
        Self::load_named([channels, kernel, stride, padding], "weight", bias.then_some("bias"), weights)
    }

    /// The same with names of the file's own; `sizes` are channels, kernel, stride and padding.
    pub(crate) fn load_named(sizes: [usize; 4], weight: &str, bias: Option<&str>, weights: &Weights) -> Result<Self> {
        let [channels, kernel, stride, padding] = sizes;
        let init = Init::FanIn(kernel * kernel);
        let weight = weights.get((channels, 1, kernel, kernel), weight, init)?;
        let bias = bias.map(|name| weights.get(channels, name, init)).transpose()?;
        Ok(DepthwiseConv2d { weight: weight.squeeze(1)?.permute((1, 2, 0))?.contiguous()?, bias, stride, padding })
    }

    /// `x`: `(batch, height, width, channels)` to `(batch, height', width', channels)`.
    ///
    /// # Errors
    /// Those of [`ops::depthwise_conv2d`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::depthwise_conv2d(x, &self.weight, self.bias.as_ref(), self.stride, self.padding)
    }
}

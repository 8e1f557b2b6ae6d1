//! The layers networks are made of. Each loads itself from [`Weights`] under the names PyTorch gives its tensors, and
//! is frozen or trainable as those weights are.

use candle_core::{D, Tensor};

use super::lora::Loras;
use super::{Init, Weights};
use crate::ops::{self, Activation};
use crate::{Error, Result};

/// `torch.nn.Linear`, with any number of LoRA sets at run time.
#[derive(Clone, Debug)]
pub struct Linear {
    path: String,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Loads `weight` `(output, input)` and, where `bias` is set, `bias` `(output,)`.
    ///
    /// # Errors
    /// [`Error::Tensor`] where one is missing or misshapen.
    pub fn load(input: usize, output: usize, bias: bool, weights: &Weights) -> Result<Self> {
        let init = Init::FanIn(input);
        let weight = weights.get((output, input), "weight", init)?;
        let bias = if bias { Some(weights.get(output, "bias", init)?) } else { None };
        Ok(Linear { path: weights.path(""), weight, bias })
    }

    /// The layer's full name.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// `x`: `(..., input)` to `(..., output)`.
    ///
    /// # Errors
    /// Those of [`ops::linear`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, self.bias.as_ref())
    }

    /// The same with the LoRA sets that have an entry for this layer added.
    ///
    /// # Errors
    /// Those of [`ops::linear`].
    pub fn forward_adapted(&self, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        let mut y = self.forward(x)?;
        for (layer, scale) in loras.at(&self.path) {
            y = (y + layer.forward_linear(x, scale)?)?;
        }
        Ok(y)
    }
}

/// `torch.nn.Conv2d` with a square kernel, channels-last, with any number of LoRA sets at run time.
#[derive(Clone, Debug)]
pub struct Conv2d {
    path: String,
    weight: Tensor,
    bias: Option<Tensor>,
    stride: usize,
    padding: usize,
}

impl Conv2d {
    /// Loads `weight` `(output, input, kernel, kernel)`, as PyTorch stores it, and, where `bias` is set, `bias`.
    ///
    /// # Errors
    /// [`Error::Tensor`] where one is missing or misshapen.
    pub fn load(
        input: usize,
        output: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
        bias: bool,
        weights: &Weights,
    ) -> Result<Self> {
        Self::load_named([input, output, kernel, stride, padding], "weight", bias.then_some("bias"), weights)
    }

    /// The same with names of the file's own, as ONNX files have; `sizes` are input, output, kernel, stride, padding.
    pub(crate) fn load_named(sizes: [usize; 5], weight: &str, bias: Option<&str>, weights: &Weights) -> Result<Self> {
        let [input, output, kernel, stride, padding] = sizes;
        let init = Init::FanIn(input * kernel * kernel);
        let weight = weights.get_conv(output, input, kernel, weight, init)?;
        let bias = bias.map(|name| weights.get(output, name, init)).transpose()?;
        Ok(Conv2d { path: weights.path(""), weight, bias, stride, padding })
    }

    /// `x`: `(batch, height, width, input)` to `(batch, height', width', output)`.
    ///
    /// # Errors
    /// Those of [`ops::conv2d`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(x, &self.weight, self.bias.as_ref(), self.stride, self.padding)
    }

    /// The same with the LoRA sets that have an entry for this layer added.
    ///
    /// # Errors
    /// Those of [`ops::conv2d`].
    pub fn forward_adapted(&self, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        let mut y = self.forward(x)?;
        for (layer, scale) in loras.at(&self.path) {
            y = (y + layer.forward_conv(x, self.stride, self.padding, scale)?)?;
        }
        Ok(y)
    }
}

/// `torch.nn.GroupNorm` on channels-last tensors.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Loads `weight` and `bias`, both `(channels,)`.
    ///
    /// # Errors
    /// [`Error::Tensor`] where one is missing or misshapen.
    pub fn load(groups: usize, channels: usize, eps: f64, weights: &Weights) -> Result<Self> {
        let weight = weights.get(channels, "weight", Init::Ones)?;
        let bias = weights.get(channels, "bias", Init::Zeros)?;
        Ok(GroupNorm { weight, bias, groups, eps })
    }

    /// `x`: `(batch, ..., channels)`.
    ///
    /// # Errors
    /// Those of [`ops::group_norm`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, Activation::None)
    }

    /// The same followed by an activation, in one operation.
    ///
    /// # Errors
    /// Those of [`ops::group_norm`].
    pub fn forward_with(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        ops::group_norm(x, self.groups, &self.weight, &self.bias, self.eps, activation)
    }
}

/// `torch.nn.LayerNorm` over the last dimension.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Loads `weight` and `bias`, both `(channels,)`.
    ///
    /// # Errors
    /// [`Error::Tensor`] where one is missing or misshapen.
    pub fn load(channels: usize, eps: f64, weights: &Weights) -> Result<Self> {
        let weight = weights.get(channels, "weight", Init::Ones)?;
        let bias = weights.get(channels, "bias", Init::Zeros)?;
        Ok(LayerNorm { weight, bias, eps })
    }

    /// `x`: `(..., channels)`.
    ///
    /// # Errors
    /// Those of [`ops::layer_norm`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// `torch.nn.Embedding`.
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Tensor,
}

impl Embedding {
    /// Loads `weight` `(count, dimension)`.
    ///
    /// # Errors
    /// [`Error::Tensor`] where it is missing or misshapen.
    pub fn load(count: usize, dimension: usize, weights: &Weights) -> Result<Self> {
        Ok(Embedding { weight: weights.get((count, dimension), "weight", Init::Normal(0.02))? })
    }

    /// `ids`: u32 tensor of any shape `(...)` to `(..., dimension)`.
    ///
    /// # Errors
    /// [`Error::Candle`] where an id is out of range.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let mut shape = ids.dims().to_vec();
        shape.push(self.weight.dim(D::Minus1)?);
        Ok(self.weight.index_select(&ids.flatten_all()?, 0)?.reshape(shape)?)
    }

    /// The whole table, `(count, dimension)`.
    pub fn table(&self) -> &Tensor {
        &self.weight
    }
}

/// Makes sure a layer path of a LoRA set fits the layer it is applied to.
pub(super) fn wrong_kind(path: &str, expected: &'static str, found: &'static str) -> Error {
    Error::Tensor { file: "LoRA".into(), tensor: path.to_string(), expected: expected.into(), found: found.into() }
}

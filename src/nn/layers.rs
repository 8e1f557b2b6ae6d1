//! The layers networks are made of. Each loads itself from [`Weights`] under the names PyTorch gives its tensors, and
//! is frozen or trainable as those weights are.
//!
//! A trainable weight may be of another dtype than what it is applied to (f32 parameters in a bf16 network): it is cast
//! on the way in, and its gradient comes back in its own dtype.

use std::borrow::Cow;

use candle_core::{D, Tensor};

use super::lora::{LoraLayer, Loras};
use super::{Init, Weights};
#[cfg(feature = "cuda")]
use crate::ops::low_rank::{Factors, linear_low_rank};
use crate::ops::{self, Activation, Addends};
use crate::{Error, Result};

/// `torch.nn.Linear`, with any number of LoRA sets at run time.
#[derive(Clone, Debug)]
pub struct Linear {
    pub(super) path: String,
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
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
        ops::linear(x, &*like(&self.weight, x)?, like_opt(&self.bias, x)?.as_deref())
    }

    /// The same with the LoRA sets that have an entry for this layer added.
    ///
    /// # Errors
    /// Those of [`ops::linear`].
    pub fn forward_adapted(&self, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        self.forward_adding(x, loras, None)
    }

    /// The same with a residual of the shape of the result added, in one operation.
    ///
    /// # Errors
    /// Those of [`ops::linear_with`].
    pub fn forward_adding(&self, x: &Tensor, loras: &Loras, residual: Option<&Tensor>) -> Result<Tensor> {
        self.apply(x, Adapted::new(like(&self.weight, x)?, loras.at(&self.path))?, residual)
    }

    /// The gated GELU of [`Linear::forward_adapted`], in one operation where that can be.
    ///
    /// # Errors
    /// Those of [`ops::linear_geglu`].
    pub fn forward_geglu(&self, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        let adapted = Adapted::new(like(&self.weight, x)?, loras.at(&self.path))?;
        match adapted.rest.is_empty() {
            true => ops::linear_geglu(x, &adapted.weight, like_opt(&self.bias, x)?.as_deref()),
            false => ops::geglu(&self.apply(x, adapted, None)?),
        }
    }

    fn apply(&self, x: &Tensor, adapted: Adapted<'_>, residual: Option<&Tensor>) -> Result<Tensor> {
        let bias = like_opt(&self.bias, x)?;
        #[cfg(feature = "cuda")]
        if let ([(layer, scale)], false) = (&adapted.rest[..], self.weight.track_op())
            && let Some(low_rank) = layer.factors(*scale)
        {
            let factors = Factors { output: adapted.weight.dims()[0], low_rank: Some(low_rank) };
            return linear_low_rank(x, &adapted.weight, (bias.as_deref(), residual), &[factors]);
        }
        let addends = Addends { bias: bias.as_deref(), residual, per_sample: None };
        let mut y = ops::linear_with(x, &adapted.weight, &addends)?;
        for (layer, scale) in adapted.rest {
            y = layer.add_linear(x, scale, &y)?;
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
    padding: [usize; 2],
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
        Ok(Conv2d { path: weights.path(""), weight, bias, stride, padding: [padding; 2] })
    }

    /// The weight `(output, kernel, kernel, input)` and the bias of a layer that has one, for an operation on `x`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer without bias.
    pub(crate) fn weight_and_bias(&self, x: &Tensor) -> Result<(Cow<'_, Tensor>, Cow<'_, Tensor>)> {
        match like_opt(&self.bias, x)? {
            Some(bias) => Ok((like_conv(&self.weight, x)?, bias)),
            None => Err(Error::argument("Conv2d", "bias", "a layer with a bias", "one without")),
        }
    }

    /// The same layer with another number of zeros right and below the picture.
    pub fn with_padding_end(self, padding_end: usize) -> Self {
        Conv2d { padding: [self.padding[0], padding_end], ..self }
    }

    /// `x`: `(batch, height, width, input)` to `(batch, height', width', output)`.
    ///
    /// # Errors
    /// Those of [`ops::conv2d`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_adding(x, &Loras::none(), &Addends::default())
    }

    /// The same with the LoRA sets that have an entry for this layer added.
    ///
    /// # Errors
    /// Those of [`ops::conv2d`].
    pub fn forward_adapted(&self, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        self.forward_adding(x, loras, &Addends::default())
    }

    /// The same with a vector a sample and a residual added, in one operation; the bias is the layer's own.
    ///
    /// # Errors
    /// Those of [`ops::conv2d_with`].
    pub fn forward_adding(&self, x: &Tensor, loras: &Loras, addends: &Addends<'_>) -> Result<Tensor> {
        let adapted = Adapted::new(like_conv(&self.weight, x)?, loras.at(&self.path))?;
        let bias = like_opt(&self.bias, x)?;
        let addends = Addends { bias: bias.as_deref(), ..*addends };
        let mut y = ops::conv2d_padded(x, &adapted.weight, &addends, self.stride, self.padding)?;
        for (layer, scale) in adapted.rest {
            y = layer.add_conv(x, self.stride, self.padding[0], scale, &y)?;
        }
        Ok(y)
    }
}

/// A layer's weight with the LoRA layers merged into it that can be, and the others.
struct Adapted<'a> {
    weight: Cow<'a, Tensor>,
    rest: Vec<(&'a LoraLayer, f64)>,
}

impl<'a> Adapted<'a> {
    fn new(weight: Cow<'a, Tensor>, layers: impl Iterator<Item = (&'a LoraLayer, f64)>) -> Result<Self> {
        let mut adapted = Adapted { weight, rest: Vec::new() };
        for (layer, scale) in layers {
            match layer.merged(&adapted.weight, scale)? {
                Some(weight) => adapted.weight = Cow::Owned(weight),
                None => adapted.rest.push((layer, scale)),
            }
        }
        Ok(adapted)
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
        let (weight, bias) = (like(&self.weight, x)?, like(&self.bias, x)?);
        ops::group_norm(x, self.groups, &weight, &bias, self.eps, activation)
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
        ops::layer_norm(x, &*like(&self.weight, x)?, &*like(&self.bias, x)?, self.eps)
    }

    /// `x + residual`, and what [`LayerNorm::forward`] makes of it, in one operation.
    ///
    /// # Errors
    /// Those of [`ops::add_layer_norm`].
    pub fn forward_adding(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        let (weight, bias) = (like(&self.weight, x)?, like(&self.bias, x)?);
        ops::add_layer_norm(x, residual, &weight, &bias, self.eps)
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

/// A trainable weight in the dtype of `x`; a frozen one as it is, as casting it anew in every pass would be a waste.
pub(super) fn like<'a>(weight: &'a Tensor, x: &Tensor) -> Result<Cow<'a, Tensor>> {
    match weight.track_op() && weight.dtype() != x.dtype() {
        true => Ok(Cow::Owned(ops::cast(weight, x.dtype())?)),
        false => Ok(Cow::Borrowed(weight)),
    }
}

/// The same for the weight of a convolution, in the order of [`ops::conv2d`].
pub(super) fn like_conv<'a>(weight: &'a Tensor, x: &Tensor) -> Result<Cow<'a, Tensor>> {
    match weight.is_variable() {
        true => Ok(Cow::Owned(ops::to_channels_last(&*like(weight, x)?)?)),
        false => like(weight, x),
    }
}

fn like_opt<'a>(weight: &'a Option<Tensor>, x: &Tensor) -> Result<Option<Cow<'a, Tensor>>> {
    weight.as_ref().map(|weight| like(weight, x)).transpose()
}

/// Makes sure a layer path of a LoRA set fits the layer it is applied to.
pub(super) fn wrong_kind(path: &str, expected: &'static str, found: &'static str) -> Error {
    Error::Tensor { file: "LoRA".into(), tensor: path.to_string(), expected: expected.into(), found: found.into() }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{DType, Device};

    use super::*;
    use crate::nn::Parameters;
    use crate::random::Address;

    #[test]
    fn a_trainable_weight_of_another_dtype_is_cast_and_its_gradient_comes_back_in_its_own() -> Result<()> {
        let parameters = Parameters::new();
        let weights = Weights::trainable(&parameters, 1, DType::F64, &Device::Cpu);
        let (linear, conv) =
            (Linear::load(4, 6, true, &weights.pp("linear"))?, Conv2d::load(6, 4, 3, 1, 1, true, &weights.pp("conv"))?);
        let (group, layer) = (
            GroupNorm::load(2, 4, 1e-5, &weights.pp("group_norm"))?,
            LayerNorm::load(4, 1e-5, &weights.pp("layer_norm"))?,
        );
        let run = |dtype| -> Result<_> {
            let x = Address::new(9, "x").normal((1, 3, 3, 4), DType::F64, &Device::Cpu)?.to_dtype(dtype)?;
            let y = layer.forward(&group.forward(&conv.forward(&linear.forward(&x)?)?)?)?;
            assert_eq!(y.dtype(), dtype);
            Ok(y.powf(3.0)?.sum_all()?.backward()?)
        };
        let (exact, cast) = (run(DType::F64)?, run(DType::F32)?);
        assert_eq!(parameters.len(), 8);
        for (name, variable) in parameters.all() {
            let (exact, cast) = (exact.get(&variable).unwrap(), cast.get(&variable).unwrap());
            assert_eq!(cast.dtype(), DType::F64, "{name}");
            let size = |t: &Tensor| -> Result<f64> { Ok(t.abs()?.max_all()?.to_scalar()?) };
            // The bias before a group norm of two channels a group hardly counts: what is left of it is rounding.
            assert!(size(&(exact - cast)?)? < 1e-3 * size(exact)?.max(1.0), "{name}");
        }
        Ok(())
    }

    #[test]
    fn a_frozen_weight_of_another_dtype_is_an_error() -> Result<()> {
        let weight = Tensor::zeros((6, 4), DType::F64, &Device::Cpu)?;
        let weights = Weights::frozen("weights", HashMap::from([("weight".to_string(), weight)]));
        let linear = Linear::load(4, 6, false, &weights)?;
        let error = linear.forward(&Tensor::zeros((2, 4), DType::F32, &Device::Cpu)?).unwrap_err().to_string();
        assert!(error.contains("weight") && error.contains("F64") && error.contains("F32"), "{error}");
        Ok(())
    }
}

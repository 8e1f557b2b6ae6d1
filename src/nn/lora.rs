//! Low-rank adaptation (Hu et al. 2021) as an argument of a forward pass.
//!
//! Nothing is fused into the base weights: a set of LoRA layers is handed to a forward pass together with a scale, so
//! changing the scale (paper, section 4.2) or using several sets costs nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::Tensor;

use super::layers::{like, like_conv, wrong_kind};
use super::{Init, Weights};
use crate::ops::{self, Addends};
use crate::{Error, Result};

/// The LoRA of one layer: `scale * up(down(x))`.
#[derive(Clone, Debug)]
pub struct LoraLayer {
    pub(super) path: String,
    /// Linear `(rank, input)`, or convolution in the order `(rank, kernel, kernel, input)` (a variable: as stored).
    pub(super) down: Tensor,
    /// Linear `(output, rank)`, or convolution `(output, 1, 1, rank)` (a variable: as stored).
    pub(super) up: Tensor,
    /// alpha / rank.
    pub(super) scale: f64,
}

impl LoraLayer {
    /// `x`: `(..., input)` to `(..., output)`, times `scale` times the layer's own alpha / rank.
    ///
    /// # Errors
    /// [`Error::Tensor`] where this is the LoRA of a convolution.
    pub fn forward_linear(&self, x: &Tensor, scale: f64) -> Result<Tensor> {
        ops::linear(&self.low_linear(x, scale)?, &*like(&self.up, x)?, None)
    }

    /// `y + forward_linear(x)`.
    pub(super) fn add_linear(&self, x: &Tensor, scale: f64, y: &Tensor) -> Result<Tensor> {
        let addends = Addends { residual: Some(y), ..Addends::default() };
        ops::linear_with(&self.low_linear(x, scale)?, &*like(&self.up, x)?, &addends)
    }

    fn low_linear(&self, x: &Tensor, scale: f64) -> Result<Tensor> {
        if self.down.rank() != 2 {
            return Err(wrong_kind(&self.path, "a linear layer's LoRA", "a convolution's LoRA"));
        }
        ops::scale(&ops::linear(x, &*like(&self.down, x)?, None)?, scale * self.scale)
    }

    /// `x`: `(batch, height, width, input)`; stride and padding are the base layer's.
    ///
    /// # Errors
    /// [`Error::Tensor`] where this is the LoRA of a linear layer.
    pub fn forward_conv(&self, x: &Tensor, stride: usize, padding: usize, scale: f64) -> Result<Tensor> {
        let low = self.low_conv(x, stride, padding, scale)?;
        ops::conv2d(&low, &*like_conv(&self.up, x)?, None, 1, 0)
    }

    /// `y + forward_conv(x)`.
    pub(super) fn add_conv(&self, x: &Tensor, stride: usize, padding: usize, scale: f64, y: &Tensor) -> Result<Tensor> {
        let addends = Addends { residual: Some(y), ..Addends::default() };
        ops::conv2d_with(&self.low_conv(x, stride, padding, scale)?, &*like_conv(&self.up, x)?, &addends, 1, 0)
    }

    fn low_conv(&self, x: &Tensor, stride: usize, padding: usize, scale: f64) -> Result<Tensor> {
        if self.down.rank() != 4 {
            return Err(wrong_kind(&self.path, "a convolution's LoRA", "a linear layer's LoRA"));
        }
        ops::scale(&ops::conv2d(x, &*like_conv(&self.down, x)?, None, stride, padding)?, scale * self.scale)
    }

    /// The base layer's weight with this LoRA added to it, where that pays: for a frozen LoRA of a frozen layer. Two
    /// products with a narrow matrix cost as much as the layer itself on a GPU and a good part of it on a CPU, while
    /// adding to the weight is a read and a write of it.
    pub(super) fn merged(&self, weight: &Tensor, scale: f64) -> Result<Option<Tensor>> {
        let Some((up, down)) = self.mergeable(weight)? else { return Ok(None) };
        #[cfg(feature = "cuda")]
        if weight.device().is_cuda() {
            let factors = ops::low_rank::Factors {
                output: weight.dims().first().copied().unwrap_or(0),
                low_rank: Some((down, up, scale * self.scale)),
            };
            return Ok(Some(ops::low_rank::merge(weight, &[factors])?));
        }
        Ok(Some(ops::add_low_rank(weight, up, down, scale * self.scale)?))
    }

    /// `down`, `up` and the scale of all in all, where they are the f32 factors of a linear layer on a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn factors(&self, scale: f64) -> Option<(&Tensor, &Tensor, f64)> {
        let fits = |tensor: &Tensor| {
            tensor.device().is_cuda() && tensor.rank() == 2 && tensor.dtype() == candle_core::DType::F32
        };
        (fits(&self.down) && fits(&self.up)).then_some((&self.down, &self.up, scale * self.scale))
    }

    /// The factors `up` and `down`, where both they and the weight are frozen.
    pub(super) fn mergeable(&self, weight: &Tensor) -> Result<Option<(&Tensor, &Tensor)>> {
        if [weight, &self.down, &self.up].iter().any(|tensor| tensor.track_op()) {
            return Ok(None);
        }
        if weight.rank() != self.down.rank() {
            return Err(wrong_kind(&self.path, "a LoRA of the layer's kind", "one of another"));
        }
        Ok(Some((&self.up, &self.down)))
    }
}

/// A set of LoRA layers for one base model, by the path of the layer each belongs to. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct LoraSet {
    pub(super) layers: Arc<HashMap<String, LoraLayer>>,
}

impl LoraSet {
    /// Loads, or makes as variables, LoRA layers of a rank for the base layers given by path and weight shape
    /// (`(output, input)` or `(output, input, kernel, kernel)`; see
    /// [`UNet::shapes`](crate::models::unet::UNet::shapes)).
    ///
    /// Tensors are named as peft names them: `<path>.lora_A.weight`, `<path>.lora_B.weight`. New variables start as the
    /// official code's: `down ~ N(0, 1/rank)`, `up = 0`, so a new set changes nothing. The scale is 1 (alpha = rank).
    ///
    /// # Errors
    /// [`Error::Tensor`] where a tensor is missing or misshapen, [`Error::Argument`] for rank 0 or a layer that is
    /// neither linear nor a convolution.
    pub fn load(layers: &BTreeMap<String, Vec<usize>>, rank: usize, weights: &Weights) -> Result<Self> {
        if rank == 0 {
            return Err(Error::argument("LoraSet::load", "rank", "at least 1", "0"));
        }
        let mut loaded = HashMap::new();
        for (path, shape) in layers {
            let (down, up) = (weights.pp(path).pp("lora_A"), weights.pp(path).pp("lora_B"));
            let init = Init::Normal(1.0 / rank as f64);
            let (down, up) = match shape[..] {
                [output, input] => {
                    (down.get((rank, input), "weight", init)?, up.get((output, rank), "weight", Init::Zeros)?)
                }
                [output, input, kernel, _] => (
                    down.get_conv(rank, input, kernel, "weight", init)?,
                    up.get_conv(output, rank, 1, "weight", Init::Zeros)?,
                ),
                _ => {
                    let found = format!("{path}: {shape:?}");
                    return Err(Error::argument("LoraSet::load", "layers", "linear or convolution weights", found));
                }
            };
            loaded.insert(path.clone(), LoraLayer { path: path.clone(), down, up, scale: 1.0 });
        }
        Ok(LoraSet { layers: Arc::new(loaded) })
    }

    /// The LoRA of a layer, where the set has one.
    pub fn get(&self, path: &str) -> Option<&LoraLayer> {
        self.layers.get(path)
    }

    /// How many layers have a LoRA.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }
}

/// The LoRA sets of one forward pass, each with its scale at run time.
#[derive(Clone, Debug, Default)]
pub struct Loras {
    sets: Vec<(LoraSet, f64)>,
}

impl Loras {
    /// No LoRA: the base model as it is.
    pub fn none() -> Self {
        Self::default()
    }

    /// One set at a scale.
    pub fn one(set: &LoraSet, scale: f64) -> Self {
        Self::none().with(set, scale)
    }

    /// These sets and one more. A set at scale 0 is left out: it would change nothing.
    pub fn with(mut self, set: &LoraSet, scale: f64) -> Self {
        if scale != 0.0 && !set.is_empty() {
            self.sets.push((set.clone(), scale));
        }
        self
    }

    /// The LoRA layers for the base layer at `path`, with their scales.
    pub(super) fn at<'a>(&'a self, path: &'a str) -> impl Iterator<Item = (&'a LoraLayer, f64)> {
        self.sets.iter().filter_map(move |(set, scale)| set.get(path).map(|layer| (layer, *scale)))
    }
}

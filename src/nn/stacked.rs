//! Several frozen projections of the same input as one.

use candle_core::Tensor;

use super::layers::Linear;
use super::lora::Loras;
use crate::Result;
use crate::ops;
#[cfg(feature = "cuda")]
use crate::ops::low_rank::{Factors, linear_low_rank, merge};

/// Frozen linear layers whose weights, and biases where they have them, lie one after the other in memory, so that one
/// product makes all their outputs, side by side. The layers themselves stay usable: their weights are parts of the
/// stack.
///
/// Made on a GPU only, where one large product is faster than several small ones.
#[derive(Clone, Debug)]
pub struct StackedLinear {
    /// `(sum of the outputs, input)`.
    weight: Tensor,
    /// `(sum of the outputs,)`.
    bias: Option<Tensor>,
    layers: Vec<(String, Tensor)>,
}

impl StackedLinear {
    /// Stacks layers of one input width; `None` where they are no frozen layers on a GPU, all with a bias or all without.
    ///
    /// # Errors
    /// [`crate::Error::Candle`] where the input widths differ or memory is out.
    pub fn new(layers: &mut [&mut Linear]) -> Result<Option<Self>> {
        let biases: Vec<&Tensor> = layers.iter().filter_map(|layer| layer.bias.as_ref()).collect();
        let frozen = |layer: &&mut Linear| layer.weight.device().is_cuda() && !layer.weight.track_op();
        if layers.is_empty()
            || !layers.iter().all(frozen)
            || biases.iter().any(|bias| bias.track_op())
            || ![0, layers.len()].contains(&biases.len())
        {
            return Ok(None);
        }
        let bias = if biases.is_empty() { None } else { Some(Tensor::cat(&biases, 0)?) };
        let weights: Vec<&Tensor> = layers.iter().map(|layer| &layer.weight).collect();
        let weight = Tensor::cat(&weights, 0)?;
        let mut start = 0;
        let mut stacked = Vec::with_capacity(layers.len());
        for layer in layers {
            let rows = layer.weight.dim(0)?;
            layer.weight = weight.narrow(0, start, rows)?;
            stacked.push((layer.path.clone(), layer.weight.clone()));
            start += rows;
        }
        Ok(Some(StackedLinear { weight, bias, layers: stacked }))
    }

    /// The stack of `count` of the layers, from `start` on, in the same memory.
    ///
    /// # Errors
    /// [`crate::Error::Candle`] where there are fewer.
    pub fn part(&self, start: usize, count: usize) -> Result<Self> {
        let rows = |layers: &[(String, Tensor)]| layers.iter().map(|(_, weight)| weight.dims()[0]).sum::<usize>();
        let end = (start + count).min(self.layers.len());
        let (before, layers) = (&self.layers[..start.min(end)], &self.layers[start.min(end)..end]);
        let (first, count) = (rows(before), rows(layers));
        let part = |tensor: &Tensor| tensor.narrow(0, first, count);
        let bias = self.bias.as_ref().map(part).transpose()?;
        Ok(StackedLinear { weight: part(&self.weight)?, bias, layers: layers.to_vec() })
    }

    /// `x`: `(..., input)` to one output for each of `parts` equal parts of the stack, each `(..., its outputs)` and
    /// contiguous. `None` where a layer has a bias, several LoRA sets or a trainable one, or a gradient has to come back
    /// to `x`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the product fails.
    pub fn forward_parts(&self, x: &Tensor, parts: usize, loras: &Loras) -> Result<Option<Vec<Tensor>>> {
        #[cfg(feature = "cuda")]
        if self.bias.is_none()
            && !x.track_op()
            && x.dtype() == self.weight.dtype()
            && x.dims().last() == self.weight.dims().last()
        {
            let Some(weight) = self.adapted(loras)? else { return Ok(None) };
            let outputs = crate::ops::linear_products(x, &weight, parts)?;
            let part = |i| outputs.narrow(0, i, 1)?.squeeze(0);
            return Ok(Some((0..parts).map(part).collect::<candle_core::Result<_>>()?));
        }
        let _ = (x, parts, loras);
        Ok(None)
    }

    /// `x`: `(..., input)` to one output for each layer, each `(..., its outputs)`, with the LoRA sets that have an entry
    /// for a layer added; `None` where a layer has several, or a trainable one.
    ///
    /// # Errors
    /// Those of [`ops::linear`].
    pub fn forward_each(&self, x: &Tensor, loras: &Loras) -> Result<Option<Vec<Tensor>>> {
        let Some(weight) = self.adapted(loras)? else { return Ok(None) };
        let mut outputs = Vec::with_capacity(self.layers.len());
        let mut start = 0;
        for (_, layer) in &self.layers {
            let rows = layer.dim(0)?;
            let bias = self.bias.as_ref().map(|bias| bias.narrow(0, start, rows)).transpose()?;
            outputs.push(ops::linear(x, &weight.narrow(0, start, rows)?, bias.as_ref())?);
            start += rows;
        }
        Ok(Some(outputs))
    }

    /// `x`: `(..., input)` to `(..., sum of the outputs)`, with the LoRA sets that have an entry for a layer added;
    /// `None` where a layer has several, or of a kind that the layers have to run one by one.
    ///
    /// # Errors
    /// Those of [`ops::linear`].
    pub fn forward(&self, x: &Tensor, loras: &Loras) -> Result<Option<Tensor>> {
        if let Some(weight) = self.adapted(loras)? {
            return Ok(Some(ops::linear(x, &weight, self.bias.as_ref())?));
        }
        #[cfg(feature = "cuda")]
        if let Some(factors) = self.factors(loras) {
            return linear_low_rank(x, &self.weight, (self.bias.as_ref(), None), &factors).map(Some);
        }
        Ok(None)
    }

    /// The factors of the layers; `None` where a layer has several sets, or factors of another kind than
    /// [`linear_low_rank`] takes.
    #[cfg(feature = "cuda")]
    fn factors<'a>(&'a self, loras: &'a Loras) -> Option<Vec<Factors<'a>>> {
        let mut factors = Vec::with_capacity(self.layers.len());
        for (path, weight) in &self.layers {
            let mut found = loras.at(path);
            let low_rank = match (found.next(), found.next()) {
                (None, _) => None,
                (Some((layer, scale)), None) => Some(layer.factors(scale)?),
                _ => return None,
            };
            factors.push(Factors { output: weight.dims()[0], low_rank });
        }
        Some(factors)
    }

    /// The stack with the LoRA layers added; `None` where a layer has several, or a trainable one.
    fn adapted(&self, loras: &Loras) -> Result<Option<Tensor>> {
        if self.layers.iter().all(|(path, _)| loras.at(path).next().is_none()) {
            return Ok(Some(self.weight.clone()));
        }
        #[cfg(feature = "cuda")]
        return self.merged(loras);
        #[cfg(not(feature = "cuda"))]
        Ok(None)
    }

    #[cfg(feature = "cuda")]
    fn merged(&self, loras: &Loras) -> Result<Option<Tensor>> {
        let mut layers = Vec::with_capacity(self.layers.len());
        for (path, weight) in &self.layers {
            let mut found = loras.at(path);
            let low_rank = match (found.next(), found.next()) {
                (None, _) => None,
                (Some((layer, scale)), None) => match layer.mergeable(weight)? {
                    Some((up, down)) => Some((down, up, scale * layer.scale)),
                    None => return Ok(None),
                },
                _ => return Ok(None),
            };
            layers.push(Factors { output: weight.dims()[0], low_rank });
        }
        merge(&self.weight, &layers).map(Some)
    }
}

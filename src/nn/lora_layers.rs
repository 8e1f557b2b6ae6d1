//! LoRA sets whose layers differ in rank and alpha, as published files have them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::lora::{LoraLayer, LoraSet};
use crate::{Error, Result};

/// The LoRA of one layer, as files store it.
#[derive(Clone, Debug)]
pub struct LoraTensors {
    /// Linear `(rank, input)`, or convolution `(rank, input, kernel, kernel)`.
    pub down: Tensor,
    /// Linear `(output, rank)`, or convolution `(output, rank, 1, 1)`.
    pub up: Tensor,
    /// The layer adds `alpha / rank * up(down(x))`.
    pub alpha: f64,
}

impl LoraTensors {
    /// The rank: outputs of `down`.
    pub fn rank(&self) -> usize {
        self.down.dims().first().copied().unwrap_or(0)
    }

    /// Checks that both tensors fit the base layer's weight `(output, input[, kernel, kernel])` and one another, and
    /// returns them in the shapes that belong to that layer: a linear layer's LoRA may be stored as a convolution of
    /// one pixel, and the reverse.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming `file` and the layer.
    pub fn fit(&self, file: &str, path: &str, base: &[usize]) -> Result<Self> {
        let rank = self.rank();
        let fault = |part: &str, expected: &[usize], found: &Tensor| Error::Tensor {
            file: file.to_string(),
            tensor: format!("{path}, {part}"),
            expected: format!("shape {expected:?} for a layer of shape {base:?}"),
            found: format!("shape {:?}", found.dims()),
        };
        let (down, up) = match base {
            [output, input] => (vec![rank, *input], vec![*output, rank]),
            [output, input, kernel, width] => (vec![rank, *input, *kernel, *width], vec![*output, rank, 1, 1]),
            _ => return Err(fault("base layer", &[], &self.down)),
        };
        let squeezed = |dims: &[usize]| match dims {
            [rows, columns, 1, 1] => vec![*rows, *columns],
            other => other.to_vec(),
        };
        let fitted = |part: &str, tensor: &Tensor, shape: Vec<usize>| match rank > 0
            && squeezed(tensor.dims()) == squeezed(&shape)
        {
            true => Ok(tensor.reshape(shape)?),
            false => Err(fault(part, &shape, tensor)),
        };
        Ok(LoraTensors { down: fitted("down", &self.down, down)?, up: fitted("up", &self.up, up)?, alpha: self.alpha })
    }
}

impl LoraSet {
    /// A frozen set from tensors whose ranks and alphas may differ from layer to layer, by the layers' paths.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that is neither linear nor a convolution, or of rank 0.
    pub fn from_tensors(layers: &BTreeMap<String, LoraTensors>, dtype: DType, device: &Device) -> Result<Self> {
        let place = |tensor: &Tensor, path: &str| -> Result<Tensor> {
            let tensor = tensor.to_device(device)?.to_dtype(dtype)?.detach();
            match tensor.rank() {
                2 => Ok(tensor),
                // To the order that convolutions compute in.
                4 => Ok(tensor.permute((0, 2, 3, 1))?.contiguous()?),
                _ => {
                    let found = format!("{path}: {:?}", tensor.dims());
                    Err(Error::argument("LoraSet::from_tensors", "layers", "linear or convolution weights", found))
                }
            }
        };
        let mut loaded = HashMap::with_capacity(layers.len());
        for (path, layer) in layers {
            if layer.rank() == 0 {
                return Err(Error::argument("LoraSet::from_tensors", "layers", "a rank of at least 1", path.as_str()));
            }
            let (down, up) = (place(&layer.down, path)?, place(&layer.up, path)?);
            let scale = layer.alpha / layer.rank() as f64;
            loaded.insert(path.clone(), LoraLayer { path: path.clone(), down, up, scale });
        }
        Ok(LoraSet { layers: Arc::new(loaded) })
    }
}

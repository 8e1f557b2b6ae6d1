//! The transformer layers that CLIP's text and vision towers share.

use candle_core::Tensor;

use crate::nn::{LayerNorm, Linear, Loras, StackedLinear, Weights};
use crate::ops::{self, Activation, Mask};
use crate::{Error, Result};

const EPS: f64 = 1e-5;

/// The size of a tower's layers.
pub(super) struct Shape {
    pub width: usize,
    pub heads: usize,
    pub mlp_width: usize,
    pub layers: usize,
    pub activation: Activation,
}

impl Shape {
    /// Checks what would otherwise fail deep inside the attention.
    pub fn check(&self, source: &str) -> Result<()> {
        if self.layers < 2 || self.heads == 0 || !self.width.is_multiple_of(self.heads) {
            return Err(Error::Config {
                source_name: source.into(),
                field: "num_attention_heads".into(),
                reason: format!(
                    "at least 2 layers and a width ({}) that the heads ({}) divide are needed",
                    self.width, self.heads
                ),
            });
        }
        Ok(())
    }
}

pub(super) fn layer_norm(width: usize, weights: &Weights) -> Result<LayerNorm> {
    LayerNorm::load(width, EPS, weights)
}

/// Pre-norm attention and MLP (transformers: `CLIPEncoderLayer`).
#[derive(Clone, Debug)]
struct Layer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    /// The three of them, where they are frozen and on a GPU.
    projections: Option<StackedLinear>,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    activation: Activation,
}

impl Layer {
    fn load(shape: &Shape, weights: &Weights) -> Result<Self> {
        let width = shape.width;
        let attention = |name: &str| Linear::load(width, width, true, &weights.pp("self_attn").pp(name));
        let [mut q_proj, mut k_proj, mut v_proj] = [attention("q_proj")?, attention("k_proj")?, attention("v_proj")?];
        let projections = StackedLinear::new(&mut [&mut q_proj, &mut k_proj, &mut v_proj])?;
        Ok(Layer {
            layer_norm1: layer_norm(width, &weights.pp("layer_norm1"))?,
            q_proj,
            k_proj,
            v_proj,
            projections,
            out_proj: attention("out_proj")?,
            layer_norm2: layer_norm(width, &weights.pp("layer_norm2"))?,
            fc1: Linear::load(width, shape.mlp_width, true, &weights.pp("mlp").pp("fc1"))?,
            fc2: Linear::load(shape.mlp_width, width, true, &weights.pp("mlp").pp("fc2"))?,
            heads: shape.heads,
            activation: shape.activation,
        })
    }

    fn forward(&self, x: &Tensor, mask: Mask) -> Result<Tensor> {
        let loras = Loras::none();
        let y = self.attend(&self.layer_norm1.forward(x)?, mask)?;
        let x = self.out_proj.forward_adding(&y, &loras, Some(x))?;
        let y = self.fc1.forward(&self.layer_norm2.forward(&x)?)?;
        self.fc2.forward_adding(&ops::activation(&y, self.activation)?, &loras, Some(&x))
    }

    /// Attention among the tokens, before `out_proj`.
    fn attend(&self, x: &Tensor, mask: Mask) -> Result<Tensor> {
        let packed = self.projections.as_ref().map(|stack| stack.forward(x, &Loras::none())).transpose()?;
        if let Some(packed) = packed.flatten() {
            return ops::attention_packed_masked(&packed, self.heads, mask);
        }
        let (q, k, v) = (self.q_proj.forward(x)?, self.k_proj.forward(x)?, self.v_proj.forward(x)?);
        ops::attention(&q, (&k, &v), None, self.heads, mask)
    }
}

/// All layers of a tower (transformers: `CLIPEncoder`).
#[derive(Clone, Debug)]
pub(super) struct Encoder {
    layers: Vec<Layer>,
}

impl Encoder {
    /// Loads `encoder.layers.*`.
    pub fn load(shape: &Shape, weights: &Weights) -> Result<Self> {
        let weights = weights.pp("encoder").pp("layers");
        let layers = (0..shape.layers).map(|i| Layer::load(shape, &weights.pp(i))).collect::<Result<_>>()?;
        Ok(Encoder { layers })
    }

    /// The states before the last layer (transformers: `hidden_states[-2]`) and after it, each as `x`.
    pub fn forward(&self, x: &Tensor, mask: Mask) -> Result<(Tensor, Tensor)> {
        let penultimate = self.penultimate(x, mask)?;
        let last = match self.layers.last() {
            Some(layer) => layer.forward(&penultimate, mask)?,
            None => penultimate.clone(),
        };
        Ok((penultimate, last))
    }

    /// The states before the last layer, which is not run.
    pub fn penultimate(&self, x: &Tensor, mask: Mask) -> Result<Tensor> {
        let all_but_last = &self.layers[..self.layers.len().saturating_sub(1)];
        all_but_last.iter().try_fold(x.clone(), |x, layer| layer.forward(&x, mask))
    }
}

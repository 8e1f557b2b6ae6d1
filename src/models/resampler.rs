//! The Resampler of IP-Adapter Plus: a few learnt queries read the image encoder's many tokens, and become the image
//! tokens the denoiser attends to. Tensor names as the `image_proj` part of the published checkpoints.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::nn::{Init, LayerNorm, Linear, Weights};
use crate::ops::{self, Activation, Mask};
use crate::{Error, Result};

const EPS: f64 = 1e-5;

/// The architecture, with the argument names of IP-Adapter's `Resampler`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Width of the queries.
    pub dim: usize,
    /// Number of layers.
    pub depth: usize,
    /// Width of an attention head.
    pub dim_head: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Number of queries, and so of image tokens.
    pub num_queries: usize,
    /// Width of the image encoder's hidden states.
    pub embedding_dim: usize,
    /// Width of the image tokens.
    pub output_dim: usize,
    /// Width inside a feed-forward layer, as a multiple of `dim`.
    pub ff_mult: usize,
}

impl Config {
    /// `ip-adapter-plus_sdxl_vit-h` and `ip-adapter-plus-face_sdxl_vit-h`: 16 tokens.
    pub fn ip_adapter_plus_sdxl() -> Self {
        Config {
            dim: 1280,
            depth: 4,
            dim_head: 64,
            heads: 20,
            num_queries: 16,
            embedding_dim: 1280,
            output_dim: 2048,
            ff_mult: 4,
        }
    }

    /// The miniature: 8 tokens.
    pub fn mini() -> Self {
        Config {
            dim: 64,
            depth: 2,
            dim_head: 16,
            heads: 4,
            num_queries: 8,
            embedding_dim: 96,
            output_dim: 64,
            ff_mult: 4,
        }
    }
}

/// Attention from the queries to the image and to themselves (IP-Adapter: `PerceiverAttention`).
#[derive(Clone, Debug)]
struct Attention {
    norm1: LayerNorm,
    norm2: LayerNorm,
    to_q: Linear,
    to_kv: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (dim, inner) = (config.dim, config.dim_head * config.heads);
        Ok(Attention {
            norm1: LayerNorm::load(dim, EPS, &weights.pp("norm1"))?,
            norm2: LayerNorm::load(dim, EPS, &weights.pp("norm2"))?,
            to_q: Linear::load(dim, inner, false, &weights.pp("to_q"))?,
            to_kv: Linear::load(dim, 2 * inner, false, &weights.pp("to_kv"))?,
            to_out: Linear::load(inner, dim, false, &weights.pp("to_out"))?,
            heads: config.heads,
        })
    }

    /// `image` `(batch, tokens, dim)` and `queries` `(batch, num_queries, dim)`.
    ///
    /// The publication concatenates image and queries and scales query and key by `dim_head^-1/4` each; attending to
    /// two sets with the scale `dim_head^-1/2` is the same.
    fn forward(&self, image: &Tensor, queries: &Tensor) -> Result<Tensor> {
        let (image, queries) = (self.norm1.forward(image)?, self.norm2.forward(queries)?);
        let q = self.to_q.forward(&queries)?;
        let (own_k, own_v) = self.keys_and_values(&queries)?;
        let (image_k, image_v) = self.keys_and_values(&image)?;
        let y = ops::attention(&q, (&own_k, &own_v), Some((&image_k, &image_v)), self.heads, Mask::None)?;
        self.to_out.forward(&y)
    }

    fn keys_and_values(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let kv = self.to_kv.forward(x)?;
        let inner = kv.dim(2)? / 2;
        Ok((ops::narrow(&kv, 0, inner)?, ops::narrow(&kv, inner, inner)?))
    }
}

/// Norm, linear, GELU, linear (IP-Adapter: `FeedForward`, a sequence whose third member is the GELU).
#[derive(Clone, Debug)]
struct FeedForward {
    norm: LayerNorm,
    up: Linear,
    down: Linear,
}

impl FeedForward {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (dim, inner) = (config.dim, config.dim * config.ff_mult);
        Ok(FeedForward {
            norm: LayerNorm::load(dim, EPS, &weights.pp(0))?,
            up: Linear::load(dim, inner, false, &weights.pp(1))?,
            down: Linear::load(inner, dim, false, &weights.pp(3))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.up.forward(&self.norm.forward(x)?)?;
        self.down.forward(&ops::activation(&y, Activation::Gelu)?)
    }
}

/// The Resampler.
#[derive(Clone, Debug)]
pub struct Resampler {
    config: Config,
    latents: Tensor,
    proj_in: Linear,
    layers: Vec<(Attention, FeedForward)>,
    proj_out: Linear,
    norm_out: LayerNorm,
}

impl Resampler {
    /// Loads `latents`, `proj_in`, `layers.*`, `proj_out` and `norm_out`; a published checkpoint has them under
    /// `image_proj`.
    ///
    /// # Errors
    /// [`Error::Tensor`] where a tensor is missing or misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (dim, layers) = (config.dim, weights.pp("layers"));
        let layer = |i: usize| -> Result<_> {
            let at = layers.pp(i);
            Ok((Attention::load(config, &at.pp(0))?, FeedForward::load(config, &at.pp(1))?))
        };
        Ok(Resampler {
            config: config.clone(),
            latents: weights.get((1, config.num_queries, dim), "latents", Init::Normal((dim as f64).powf(-0.5)))?,
            proj_in: Linear::load(config.embedding_dim, dim, true, &weights.pp("proj_in"))?,
            layers: (0..config.depth).map(layer).collect::<Result<_>>()?,
            proj_out: Linear::load(dim, config.output_dim, true, &weights.pp("proj_out"))?,
            norm_out: LayerNorm::load(config.output_dim, EPS, &weights.pp("norm_out"))?,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The image encoder's hidden states `(batch, tokens, embedding_dim)` to image tokens
    /// `(batch, num_queries, output_dim)`.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another.
    pub fn forward(&self, hidden_states: &Tensor) -> Result<Tensor> {
        let width = self.config.embedding_dim;
        if hidden_states.rank() != 3 || hidden_states.dims()[2] != width {
            let expected = format!("(batch, tokens, {width})");
            return Err(Error::argument("resampler", "hidden_states", expected, format!("{:?}", hidden_states.dims())));
        }
        let image = self.proj_in.forward(hidden_states)?;
        let mut x = ops::repeat_sample(&ops::cast(&self.latents, image.dtype())?, hidden_states.dim(0)?)?;
        for (attention, feed_forward) in &self.layers {
            x = ops::add(&attention.forward(&image, &x)?, &x)?;
            x = ops::add(&feed_forward.forward(&x)?, &x)?;
        }
        self.norm_out.forward(&self.proj_out.forward(&x)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::autograd::check_gradients;
    use crate::nn::Parameters;
    use crate::random::Address;

    fn tiny() -> Config {
        Config { dim: 4, depth: 2, dim_head: 2, heads: 2, num_queries: 2, embedding_dim: 3, output_dim: 5, ff_mult: 2 }
    }

    #[test]
    fn the_published_one_has_its_tensors_and_parameters() -> Result<()> {
        let weights = Weights::shapes_only();
        Resampler::load(&Config::ip_adapter_plus_sdxl(), &weights)?;
        let shapes = weights.shapes();
        assert_eq!(shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>(), 82_961_664);
        for (name, shape) in [
            ("latents", vec![1, 16, 1280]),
            ("proj_in.bias", vec![1280]),
            ("layers.3.0.to_kv.weight", vec![2560, 1280]),
            ("layers.0.0.norm2.bias", vec![1280]),
            ("layers.0.1.0.weight", vec![1280]),
            ("layers.0.1.1.weight", vec![5120, 1280]),
            ("layers.0.1.3.weight", vec![1280, 5120]),
            ("proj_out.weight", vec![2048, 1280]),
            ("norm_out.bias", vec![2048]),
        ] {
            assert_eq!(shapes.get(name), Some(&shape), "{name}");
        }
        // 7 around the layers; 7 of attention and 4 of feed-forward in each.
        assert_eq!(shapes.len(), 7 + 4 * 11);
        Ok(())
    }

    #[test]
    fn the_order_of_the_image_tokens_does_not_matter() -> Result<()> {
        let model = Resampler::load(&tiny(), &Weights::trainable(&Parameters::new(), 1, DType::F64, &Device::Cpu))?;
        let x = Address::new(1, "x").normal((2, 6, 3), DType::F64, &Device::Cpu)?;
        let order = Tensor::new(&[5u32, 3, 1, 0, 2, 4], &Device::Cpu)?;
        let (a, b) = (model.forward(&x)?, model.forward(&x.index_select(&order, 1)?)?);
        assert_eq!(a.dims(), [2, 2, 5]);
        assert!((a - b)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-12);
        Ok(())
    }

    #[test]
    fn gradients_reach_the_image_and_every_weight() -> Result<()> {
        let parameters = Parameters::new();
        let model = Resampler::load(&tiny(), &Weights::trainable(&parameters, 1, DType::F64, &Device::Cpu))?;
        let x = Address::new(1, "x").normal((2, 3, 3), DType::F64, &Device::Cpu)?;
        let check = check_gradients(std::slice::from_ref(&x), |x| Ok(vec![model.forward(&x[0])?]))?;
        assert!(check.worst() < 1e-6 && check.norms[0] > 1e-3, "{check:?}");
        let gradients = model.forward(&x)?.sqr()?.sum_all()?.backward()?;
        for (name, variable) in parameters.all() {
            assert!(gradients.get(&variable).is_some(), "{name}");
        }
        Ok(())
    }
}

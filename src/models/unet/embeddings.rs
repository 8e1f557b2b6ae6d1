//! What the U-Net knows about time and size: diffusers' `Timesteps`, `TimestepEmbedding` and `text_time` embedding.

use candle_core::{DType, Device, Tensor};

use super::{Conditioning, Config};
use crate::Result;
use crate::nn::{Linear, Loras, Weights};
use crate::ops::{Activation, activation, add, concat_channels};

/// Sinusoidal embedding, cosines first (diffusers: `flip_sin_to_cos=True`, `downscale_freq_shift=0`).
///
/// `values`: any numbers; returns `(values, dimension)`.
pub(super) fn sinusoid(values: &[f64], dimension: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let half = dimension / 2;
    let mut embedded = Vec::with_capacity(values.len() * dimension);
    for value in values {
        let angle = |i: usize| value * (-(10_000f64.ln()) * i as f64 / half as f64).exp();
        embedded.extend((0..half).map(|i| angle(i).cos()));
        embedded.extend((0..half).map(|i| angle(i).sin()));
        embedded.resize(embedded.len() + dimension % 2, 0.0);
    }
    Ok(Tensor::from_vec(embedded, (values.len(), dimension), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
}

/// `linear_2(silu(linear_1(x)))`.
#[derive(Debug)]
pub(super) struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
}

impl TimestepEmbedding {
    pub fn load(input: usize, output: usize, weights: &Weights) -> Result<Self> {
        Ok(TimestepEmbedding {
            linear_1: Linear::load(input, output, true, &weights.pp("linear_1"))?,
            linear_2: Linear::load(output, output, true, &weights.pp("linear_2"))?,
        })
    }

    fn forward(&self, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        let hidden = activation(&self.linear_1.forward_adapted(x, loras)?, Activation::Silu)?;
        self.linear_2.forward_adapted(&hidden, loras)
    }
}

/// The embedding all resnets receive: time, plus pooled text and the six time ids.
#[derive(Debug)]
pub(super) struct Embeddings {
    time_embedding: TimestepEmbedding,
    add_embedding: TimestepEmbedding,
    time_width: usize,
    time_id_width: usize,
}

impl Embeddings {
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (time_width, output) = (config.block_out_channels[0], config.time_embed_dim());
        Ok(Embeddings {
            time_embedding: TimestepEmbedding::load(time_width, output, &weights.pp("time_embedding"))?,
            add_embedding: TimestepEmbedding::load(config.add_embedding_dim(), output, &weights.pp("add_embedding"))?,
            time_width,
            time_id_width: config.addition_time_embed_dim,
        })
    }

    /// Returns `silu` of the embedding, `(batch, time_embed_dim)`: every user of it starts with that.
    pub fn forward(&self, timesteps: &[usize], conditioning: &Conditioning, loras: &Loras) -> Result<Tensor> {
        let pooled = &conditioning.pooled;
        let (dtype, device) = (pooled.dtype(), pooled.device());
        let times: Vec<f64> = timesteps.iter().map(|t| *t as f64).collect();
        let time = sinusoid(&times, self.time_width, dtype, device)?;
        let ids: Vec<f64> = conditioning.time_ids.iter().flatten().copied().collect();
        let ids = sinusoid(&ids, self.time_id_width, dtype, device)?.reshape((timesteps.len(), ()))?;
        let added = concat_channels(pooled, &ids)?;
        let embedding = add(&self.time_embedding.forward(&time, loras)?, &self.add_embedding.forward(&added, loras)?)?;
        activation(&embedding, Activation::Silu)
    }
}

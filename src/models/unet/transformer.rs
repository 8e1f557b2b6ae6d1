//! diffusers' `Transformer2DModel` and `BasicTransformerBlock`, with the hooks of the method.

use candle_core::Tensor;

use super::Config;
use super::pass::{Pass, Recording};
use crate::Result;
use crate::nn::{GroupNorm, LayerNorm, Linear, Loras, Weights};
use crate::ops::{self, Mask};

/// One attention layer's projections.
#[derive(Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn load(channels: usize, context: usize, heads: usize, weights: &Weights) -> Result<Self> {
        Ok(Attention {
            to_q: Linear::load(channels, channels, false, &weights.pp("to_q"))?,
            to_k: Linear::load(context, channels, false, &weights.pp("to_k"))?,
            to_v: Linear::load(context, channels, false, &weights.pp("to_v"))?,
            to_out: Linear::load(channels, channels, true, &weights.pp("to_out").pp(0))?,
            heads,
        })
    }

    fn key_value(&self, x: &Tensor, loras: &Loras) -> Result<(Tensor, Tensor)> {
        Ok((self.to_k.forward_adapted(x, loras)?, self.to_v.forward_adapted(x, loras)?))
    }
}

/// What one transformer block takes besides its hidden states. All tensors; the rest of a pass is in [`Pass`].
#[derive(Clone, Debug)]
pub(super) struct BlockInputs {
    /// Keys and values of the reference for `attn1`.
    pub reference: Option<(Tensor, Tensor)>,
    /// Keys and values of the image tokens for `attn2`.
    pub image: Option<(Tensor, Tensor)>,
}

#[derive(Debug)]
struct TransformerBlock {
    name: String,
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    proj: Linear,
    out: Linear,
}

impl TransformerBlock {
    fn load(config: &Config, channels: usize, heads: usize, weights: &Weights) -> Result<Self> {
        let norm = |name| LayerNorm::load(channels, 1e-5, &weights.pp(name));
        let ff = weights.pp("ff").pp("net");
        Ok(TransformerBlock {
            name: weights.path(""),
            norm1: norm("norm1")?,
            attn1: Attention::load(channels, channels, heads, &weights.pp("attn1"))?,
            norm2: norm("norm2")?,
            attn2: Attention::load(channels, config.cross_attention_dim, heads, &weights.pp("attn2"))?,
            norm3: norm("norm3")?,
            proj: Linear::load(channels, channels * 8, true, &ff.pp(0).pp("proj"))?,
            out: Linear::load(channels * 4, channels, true, &ff.pp(2))?,
        })
    }

    /// The keys and values exported for a reference, from the normed input of `attn1`.
    fn record(&self, normed: &Tensor, pass: &Pass, recording: &Recording) -> Result<(Tensor, Tensor)> {
        match &recording.projections {
            Some(projections) => self.attn1.key_value(normed, &Loras::one(projections, 1.0)),
            None => self.attn1.key_value(normed, &pass.loras),
        }
    }

    /// Self-attention, cross-attention, feed-forward, each on a normed input and added to the residual stream.
    fn forward(
        &self,
        hidden: &Tensor,
        normed: &Tensor,
        text: &Tensor,
        inputs: &BlockInputs,
        pass: &Pass,
        image_scale: f64,
    ) -> Result<Tensor> {
        let loras = &pass.loras;
        let query = self.attn1.to_q.forward_adapted(normed, loras)?;
        let (key, value) = self.attn1.key_value(normed, loras)?;
        let (own, heads) = ((&key, &value), self.attn1.heads);
        let attended = match (&inputs.reference, &pass.sees_reference) {
            (Some((key, value)), Some(sees)) => ops::attention_where(&query, own, (key, value), sees, heads)?,
            (Some((key, value)), None) => ops::attention(&query, own, Some((key, value)), heads, Mask::None)?,
            (None, _) => ops::attention(&query, own, None, heads, Mask::None)?,
        };
        let hidden = self.attn1.to_out.forward_adding(&attended, loras, Some(hidden))?;

        let normed = self.norm2.forward(&hidden)?;
        let query = self.attn2.to_q.forward_adapted(&normed, loras)?;
        let (key, value) = self.attn2.key_value(text, loras)?;
        let image = inputs.image.as_ref().map(|(key, value)| ((key, value), image_scale));
        let attended = ops::cross_attention(&query, (&key, &value), image, self.attn2.heads)?;
        let hidden = self.attn2.to_out.forward_adding(&attended, loras, Some(&hidden))?;

        let gated = ops::geglu(&self.proj.forward_adapted(&self.norm3.forward(&hidden)?, loras)?)?;
        self.out.forward_adding(&gated, loras, Some(&hidden))
    }
}

/// What [`Transformer::forward`] returns.
pub(super) struct TransformerOutput {
    /// Hidden states; `None` where the pass ended inside, at the last block to be recorded.
    pub hidden: Option<Tensor>,
    /// Keys and values of the recorded blocks, in their order.
    pub recorded: Vec<(Tensor, Tensor)>,
}

#[derive(Debug)]
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<TransformerBlock>,
    proj_out: Linear,
}

impl Transformer {
    pub fn load(config: &Config, level: usize, weights: &Weights) -> Result<Self> {
        let (channels, heads) = (config.block_out_channels[level], config.attention_heads[level]);
        let blocks = (0..config.transformer_layers_per_block[level])
            .map(|i| TransformerBlock::load(config, channels, heads, &weights.pp("transformer_blocks").pp(i)))
            .collect::<Result<_>>()?;
        Ok(Transformer {
            norm: GroupNorm::load(config.norm_num_groups, channels, 1e-6, &weights.pp("norm"))?,
            proj_in: Linear::load(channels, channels, true, &weights.pp("proj_in"))?,
            blocks,
            proj_out: Linear::load(channels, channels, true, &weights.pp("proj_out"))?,
        })
    }

    /// The names of the transformer blocks, in their order.
    pub fn block_names(&self) -> impl Iterator<Item = &str> {
        self.blocks.iter().map(|block| block.name.as_str())
    }

    /// `x`: `(batch, height, width, channels)`; `text`: `(batch, text tokens, cross_attention_dim)`; `inputs`: one a
    /// block. Ends at the block `last`, where given, as soon as that one is recorded.
    pub fn forward(
        &self,
        x: &Tensor,
        text: &Tensor,
        inputs: &[BlockInputs],
        pass: &Pass,
        recording: Option<&Recording>,
        last: Option<&str>,
    ) -> Result<TransformerOutput> {
        let (batch, height, width, channels) = x.dims4()?;
        let image_scale = pass.image_tokens.as_ref().map_or(0.0, |tokens| tokens.scale);
        let tokens = ops::reshape(&self.norm.forward(x)?, (batch, height * width, channels))?;
        let mut hidden = self.proj_in.forward_adapted(&tokens, &pass.loras)?;
        let mut recorded = Vec::new();
        for (block, inputs) in self.blocks.iter().zip(inputs) {
            let normed = block.norm1.forward(&hidden)?;
            if let Some(recording) = recording.filter(|recording| recording.includes(&block.name)) {
                recorded.push(block.record(&normed, pass, recording)?);
                if last == Some(block.name.as_str()) {
                    return Ok(TransformerOutput { hidden: None, recorded });
                }
            }
            hidden = block.forward(&hidden, &normed, text, inputs, pass, image_scale)?;
        }
        let residual = ops::reshape(x, (batch, height * width, channels))?;
        let hidden = self.proj_out.forward_adding(&hidden, &pass.loras, Some(&residual))?;
        Ok(TransformerOutput { hidden: Some(ops::reshape(&hidden, (batch, height, width, channels))?), recorded })
    }
}

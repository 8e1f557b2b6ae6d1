//! diffusers' `Transformer2DModel` and `BasicTransformerBlock`, with the hooks of the method.

use candle_core::Tensor;

use super::Config;
use super::pass::{Pass, Recording};
use crate::Result;
use crate::nn::{GroupNorm, LayerNorm, Linear, Loras, StackedLinear, Weights};
use crate::ops::{self, Mask};

/// One attention layer's projections.
#[derive(Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    /// Queries, keys and values in one product (self-attention), or keys and values (cross-attention), where frozen
    /// weights lie on a GPU.
    stacked: Option<StackedLinear>,
    heads: usize,
}

impl Attention {
    /// Self-attention where `context` is `None`, else cross-attention to hidden states of that width.
    fn load(channels: usize, context: Option<usize>, heads: usize, weights: &Weights) -> Result<Self> {
        let width = context.unwrap_or(channels);
        let mut to_q = Linear::load(channels, channels, false, &weights.pp("to_q"))?;
        let mut to_k = Linear::load(width, channels, false, &weights.pp("to_k"))?;
        let mut to_v = Linear::load(width, channels, false, &weights.pp("to_v"))?;
        let stacked = match context {
            None => StackedLinear::new(&mut [&mut to_q, &mut to_k, &mut to_v])?,
            Some(_) => None, // the transformer stacks those of all its blocks
        };
        let to_out = Linear::load(channels, channels, true, &weights.pp("to_out").pp(0))?;
        Ok(Attention { to_q, to_k, to_v, to_out, stacked, heads })
    }

    fn stacked(&self, x: &Tensor, loras: &Loras) -> Result<Option<Tensor>> {
        self.stacked.as_ref().map_or(Ok(None), |stacked| stacked.forward(x, loras))
    }

    /// Self-attention on normed hidden states, extended by a reference's keys and values where there are any.
    fn attend_to_self(&self, x: &Tensor, reference: Option<&(Tensor, Tensor)>, pass: &Pass) -> Result<Tensor> {
        let reference = reference.map(|(key, value)| (key, value));
        let sees = pass.sees_reference.as_deref();
        if let Some(packed) = self.stacked(x, &pass.loras)? {
            return ops::attention_packed(&packed, reference, sees, self.heads);
        }
        let query = self.to_q.forward_adapted(x, &pass.loras)?;
        let (key, value) = self.key_value(x, &pass.loras)?;
        match (reference, sees) {
            (Some(reference), Some(sees)) => ops::attention_where(&query, (&key, &value), reference, sees, self.heads),
            (reference, _) => ops::attention(&query, (&key, &value), reference, self.heads, Mask::None),
        }
    }

    /// Cross-attention of normed hidden states to text (or its keys and values, where they are there already) and, where
    /// there are any, image tokens with a scale.
    fn attend_to_text(
        &self,
        x: &Tensor,
        (text, text_key_value): (&Tensor, Option<&Tensor>),
        image: Option<(&(Tensor, Tensor), f64)>,
        loras: &Loras,
    ) -> Result<Tensor> {
        let image = image.map(|((key, value), scale)| ((key, value), scale));
        let query = self.to_q.forward_adapted(x, loras)?;
        let packed = match text_key_value {
            Some(packed) => Some(packed.clone()),
            None => self.stacked(text, loras)?,
        };
        if let Some(packed) = packed {
            return ops::cross_attention_packed(&query, &packed, image, self.heads);
        }
        let (key, value) = self.key_value(text, loras)?;
        ops::cross_attention(&query, (&key, &value), image, self.heads)
    }

    /// Keys and values of self-attention that go out of it, so that they are tensors of their own.
    fn exported_key_value(&self, x: &Tensor, loras: &Loras) -> Result<(Tensor, Tensor)> {
        if let Some(stacked) = &self.stacked
            && let Some([key, value]) = stacked.part(1, 2)?.forward_each(x, loras)?.as_deref()
        {
            return Ok((key.clone(), value.clone()));
        }
        self.key_value(x, loras)
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
            attn1: Attention::load(channels, None, heads, &weights.pp("attn1"))?,
            norm2: norm("norm2")?,
            attn2: Attention::load(channels, Some(config.cross_attention_dim), heads, &weights.pp("attn2"))?,
            norm3: norm("norm3")?,
            proj: Linear::load(channels, channels * 8, true, &ff.pp(0).pp("proj"))?,
            out: Linear::load(channels * 4, channels, true, &ff.pp(2))?,
        })
    }

    /// The keys and values exported for a reference, from the normed input of `attn1`.
    fn record(&self, normed: &Tensor, pass: &Pass, recording: &Recording) -> Result<(Tensor, Tensor)> {
        // Tokens nobody will look at are left out here, where they cost no projection.
        let normed = match recording.kept.get(&self.name) {
            Some(kept) => &ops::select_tokens(normed, kept)?,
            None => normed,
        };
        match &recording.projections {
            Some(projections) => self.attn1.exported_key_value(normed, &Loras::one(projections, 1.0)),
            None => self.attn1.exported_key_value(normed, &pass.loras),
        }
    }

    /// Self-attention, cross-attention, feed-forward, each on a normed input and added to the residual stream. Returns
    /// the stream and, where the block behind this one has a norm, what that makes of it.
    fn forward(
        &self,
        hidden: &Tensor,
        normed: &Tensor,
        text: (&Tensor, Option<&Tensor>),
        inputs: &BlockInputs,
        pass: &Pass,
        next_norm: Option<&LayerNorm>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let loras = &pass.loras;
        let attended = self.attn1.attend_to_self(normed, inputs.reference.as_ref(), pass)?;
        let attended = self.attn1.to_out.forward_adapted(&attended, loras)?;
        let (hidden, normed) = self.norm2.forward_adding(&attended, hidden)?;

        let scale = pass.image_tokens.as_ref().map_or(0.0, |tokens| tokens.scale);
        let image = inputs.image.as_ref().map(|image| (image, scale));
        let attended = self.attn2.attend_to_text(&normed, text, image, loras)?;
        let attended = self.attn2.to_out.forward_adapted(&attended, loras)?;
        let (hidden, normed) = self.norm3.forward_adding(&attended, &hidden)?;

        let gated = self.proj.forward_geglu(&normed, loras)?;
        match next_norm {
            Some(norm) => {
                let (hidden, normed) = norm.forward_adding(&self.out.forward_adapted(&gated, loras)?, &hidden)?;
                Ok((hidden, Some(normed)))
            }
            None => Ok((self.out.forward_adding(&gated, loras, Some(&hidden))?, None)),
        }
    }
}

/// What [`Transformer::forward`] and [`Transformer::block`] return.
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
    /// Keys and values of the text for all blocks in one product, where frozen weights lie on a GPU.
    text_projections: Option<StackedLinear>,
    proj_out: Linear,
}

impl Transformer {
    pub fn load(config: &Config, level: usize, weights: &Weights) -> Result<Self> {
        let (channels, heads) = (config.block_out_channels[level], config.attention_heads[level]);
        let mut blocks = (0..config.transformer_layers_per_block[level])
            .map(|i| TransformerBlock::load(config, channels, heads, &weights.pp("transformer_blocks").pp(i)))
            .collect::<Result<Vec<_>>>()?;
        let mut projections: Vec<&mut Linear> =
            blocks.iter_mut().flat_map(|block| [&mut block.attn2.to_k, &mut block.attn2.to_v]).collect();
        let text_projections = StackedLinear::new(&mut projections)?;
        if let Some(all) = &text_projections {
            for (i, block) in blocks.iter_mut().enumerate() {
                block.attn2.stacked = Some(all.part(2 * i, 2)?);
            }
        }
        Ok(Transformer {
            norm: GroupNorm::load(config.norm_num_groups, channels, 1e-6, &weights.pp("norm"))?,
            proj_in: Linear::load(channels, channels, true, &weights.pp("proj_in"))?,
            blocks,
            text_projections,
            proj_out: Linear::load(channels, channels, true, &weights.pp("proj_out"))?,
        })
    }

    /// The names of the transformer blocks, in their order.
    pub fn block_names(&self) -> impl Iterator<Item = &str> {
        self.blocks.iter().map(|block| block.name.as_str())
    }

    /// What stands before the blocks: `x` `(batch, height, width, channels)` to hidden states `(batch, tokens, channels)`.
    pub fn enter(&self, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let tokens = ops::reshape(&self.norm.forward(x)?, (batch, height * width, channels))?;
        self.proj_in.forward_adapted(&tokens, loras)
    }

    /// What stands behind the blocks, with `x` as [`Transformer::enter`] got it, of which the result has the shape.
    pub fn leave(&self, hidden: &Tensor, x: &Tensor, loras: &Loras) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let residual = ops::reshape(x, (batch, height * width, channels))?;
        let hidden = self.proj_out.forward_adding(hidden, loras, Some(&residual))?;
        ops::reshape(&hidden, (batch, height, width, channels))
    }

    /// Keys and values of the text for every block, where one product makes them all.
    pub fn text_key_values(&self, text: &Tensor, loras: &Loras) -> Result<Option<Vec<Tensor>>> {
        match &self.text_projections {
            Some(all) => all.forward_parts(text, self.blocks.len(), loras),
            None => Ok(None),
        }
    }

    /// One block alone. With a recording it ends as soon as the block is recorded, if it is the last one to be.
    ///
    /// `text`: as [`Transformer::forward`] takes it, and the block's part of [`Transformer::text_key_values`].
    pub fn block(
        &self,
        index: usize,
        hidden: &Tensor,
        text: (&Tensor, Option<&Tensor>),
        inputs: &BlockInputs,
        pass: &Pass,
        (recording, last): (Option<&Recording>, Option<&str>),
    ) -> Result<TransformerOutput> {
        let block = &self.blocks[index];
        let normed = block.norm1.forward(hidden)?;
        let mut recorded = Vec::new();
        if let Some(recording) = recording.filter(|recording| recording.includes(&block.name)) {
            recorded.push(block.record(&normed, pass, recording)?);
            if last == Some(block.name.as_str()) {
                return Ok(TransformerOutput { hidden: None, recorded });
            }
        }
        let (hidden, _) = block.forward(hidden, &normed, text, inputs, pass, None)?;
        Ok(TransformerOutput { hidden: Some(hidden), recorded })
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
        let mut hidden = self.enter(x, &pass.loras)?;
        let text_key_values = self.text_key_values(text, &pass.loras)?;
        let mut recorded = Vec::new();
        let mut normed = None;
        for (i, (block, inputs)) in self.blocks.iter().zip(inputs).enumerate() {
            let block_input = match normed.take() {
                Some(normed) => normed,
                None => block.norm1.forward(&hidden)?,
            };
            if let Some(recording) = recording.filter(|recording| recording.includes(&block.name)) {
                recorded.push(block.record(&block_input, pass, recording)?);
                if last == Some(block.name.as_str()) {
                    return Ok(TransformerOutput { hidden: None, recorded });
                }
            }
            let next_norm = self.blocks.get(i + 1).map(|next| &next.norm1);
            let text = (text, text_key_values.as_ref().map(|all| &all[i]));
            (hidden, normed) = block.forward(&hidden, &block_input, text, inputs, pass, next_norm)?;
        }
        Ok(TransformerOutput { hidden: Some(self.leave(&hidden, x, &pass.loras)?), recorded })
    }
}

//! One frozen base, called in several ways: what differs between passes is an argument.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::FreeU;
use crate::nn::{LoraSet, Loras};
use crate::ops::TokenSelection;

/// Keys and values of attention layers, by the name of the transformer block they belong to
/// (`down_blocks.1.attentions.0.transformer_blocks.0`); each `(batch, tokens, channels)`.
#[derive(Clone, Debug, Default)]
pub struct KeyValues {
    blocks: BTreeMap<String, (Tensor, Tensor)>,
}

impl KeyValues {
    /// Sets the keys and values of a block.
    pub fn insert(&mut self, block: impl Into<String>, key: Tensor, value: Tensor) {
        self.blocks.insert(block.into(), (key, value));
    }

    /// The keys and values of a block, where there are any.
    pub fn get(&self, block: &str) -> Option<&(Tensor, Tensor)> {
        self.blocks.get(block)
    }

    /// All blocks with their keys and values, in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &(Tensor, Tensor))> {
        self.blocks.iter().map(|(name, pair)| (name.as_str(), pair))
    }

    /// How many blocks have keys and values.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether no block has any.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The same after a change to every tensor, keys and values alike.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn map(&self, mut change: impl FnMut(&str, &Tensor) -> crate::Result<Tensor>) -> crate::Result<KeyValues> {
        let mut changed = KeyValues::default();
        for (name, (key, value)) in self.iter() {
            changed.insert(name, change(name, key)?, change(name, value)?);
        }
        Ok(changed)
    }
}

/// Image tokens as the decoupled cross-attention takes them: their keys and values in every block, and a scale.
#[derive(Clone, Debug)]
pub struct ImageTokens {
    /// Keys and values of the image tokens, made by
    /// [`IpAdapter::project`](crate::models::ip_adapter::IpAdapter::project).
    pub key_values: KeyValues,
    /// Weight of the image attention beside the text attention (`adapter_attention_scale`), 1.0 in the paper.
    pub scale: f64,
}

/// How a forward pass differs from the plain base model.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// LoRA sets with their scales.
    pub loras: Loras,
    /// Keys and values that the self-attention of the blocks they name attends to besides its own (paper, section 4.3).
    /// Blocks that are not named stay plain.
    pub reference: Option<KeyValues>,
    /// Which samples of the batch see the reference; all where `None`.
    pub sees_reference: Option<Vec<bool>>,
    /// Image tokens for the decoupled cross-attention (IP-Adapter).
    pub image_tokens: Option<ImageTokens>,
    /// FreeU in the first two up blocks.
    pub freeu: Option<FreeU>,
    /// Recompute activations in the backward pass, half a resnet or one transformer block at a time, instead of keeping
    /// them.
    pub recompute: bool,
    /// Where activations are recomputed, keep the outputs of self-attention nonetheless: they take little memory for the
    /// time they take.
    pub keep_attention: bool,
}

impl Pass {
    /// The same without keys and values, for code that gets those by other ways.
    pub(super) fn apart(&self) -> Pass {
        let image_tokens = self.image_tokens.as_ref();
        Pass {
            loras: self.loras.clone(),
            reference: None,
            sees_reference: self.sees_reference.clone(),
            image_tokens: image_tokens
                .map(|ImageTokens { scale, .. }| ImageTokens { key_values: KeyValues::default(), scale: *scale }),
            freeu: self.freeu,
            recompute: self.recompute,
            keep_attention: self.keep_attention,
        }
    }
}

/// How self-attention keys and values are recorded.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// LoRA of the projections that export keys and values, under the paths `<block>.attn1.to_k` and `.to_v`: the
    /// export is a projection of its own, the base's frozen one plus this LoRA, on the input of `attn1` (official
    /// code). `None` records what `attn1` itself uses (the paper's text).
    pub projections: Option<LoraSet>,
    /// Names, or beginnings of names, of the transformer blocks to record; empty for all.
    pub blocks: Vec<String>,
    /// Which tokens of a block to record; all of a block that is not named here.
    pub kept: BTreeMap<String, TokenSelection>,
}

impl Recording {
    /// Whether the block of this name is recorded.
    pub fn includes(&self, block: &str) -> bool {
        self.blocks.is_empty()
            || self.blocks.iter().any(|beginning| {
                block.strip_prefix(beginning.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            })
    }
}

//! The shape of a U-Net.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The shape of an SDXL-type U-Net; the fields are those of diffusers' `UNet2DConditionModel` configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Channels of the latents.
    pub in_channels: usize,
    /// Channels of the noise prediction.
    pub out_channels: usize,
    /// Channels at each resolution, from the finest to the coarsest.
    pub block_out_channels: Vec<usize>,
    /// Resnets per down block (an up block has one more).
    pub layers_per_block: usize,
    /// Transformer blocks behind each resnet, per resolution; 0 makes the block one without attention. The last value
    /// is the middle block's too.
    pub transformer_layers_per_block: Vec<usize>,
    /// Attention heads per resolution (diffusers calls this `attention_head_dim`). Ignored where there is no attention.
    pub attention_heads: Vec<usize>,
    /// Width of the text (and image) tokens.
    pub cross_attention_dim: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Epsilon of the resnets' group norms.
    pub norm_eps: f64,
    /// Width of the sinusoidal embedding of each of the six time ids.
    pub addition_time_embed_dim: usize,
    /// Width of the pooled text embedding.
    pub pooled_dim: usize,
}

impl Config {
    /// SDXL base 1.0: 2,567,463,684 parameters in 1,680 tensors.
    pub fn sdxl() -> Self {
        Config {
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280],
            layers_per_block: 2,
            transformer_layers_per_block: vec![0, 2, 10],
            attention_heads: vec![5, 10, 20],
            cross_attention_dim: 2048,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            addition_time_embed_dim: 256,
            pooled_dim: 1280,
        }
    }

    /// The miniature: every mechanism of SDXL's U-Net at 32x32 latents, small enough to train on a CPU.
    pub fn mini() -> Self {
        Config {
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![32, 64, 80],
            layers_per_block: 1,
            transformer_layers_per_block: vec![0, 1, 2],
            attention_heads: vec![1, 4, 5],
            cross_attention_dim: 64,
            norm_num_groups: 8,
            norm_eps: 1e-5,
            addition_time_embed_dim: 16,
            pooled_dim: 64,
        }
    }

    /// Width of the input of `add_embedding`: the pooled text and six embedded time ids
    /// (`projection_class_embeddings_input_dim` in diffusers).
    pub fn add_embedding_dim(&self) -> usize {
        self.pooled_dim + 6 * self.addition_time_embed_dim
    }

    /// Width of the time embedding.
    pub fn time_embed_dim(&self) -> usize {
        self.block_out_channels.first().copied().unwrap_or(0) * 4
    }

    /// Channels of the transformer block (or any layer) of this name.
    pub fn block_channels(&self, name: &str) -> usize {
        let levels = self.block_out_channels.len();
        let mut parts = name.split('.');
        let level = match (parts.next(), parts.next().and_then(|index| index.parse::<usize>().ok())) {
            (Some("down_blocks"), Some(index)) => index,
            (Some("up_blocks"), Some(index)) => (levels - 1).saturating_sub(index),
            _ => levels - 1,
        };
        self.block_out_channels[level.min(levels - 1)]
    }

    /// # Errors
    /// [`Error::Config`] naming the field that does not fit the others.
    pub fn validate(&self) -> Result<()> {
        let wrong = |field: &str, reason: String| {
            Err(Error::Config { source_name: "U-Net configuration".into(), field: field.into(), reason })
        };
        let levels = self.block_out_channels.len();
        if !(2..=8).contains(&levels) {
            return wrong("block_out_channels", format!("expected 2 to 8 resolutions, found {levels}"));
        }
        for (field, length) in [
            ("transformer_layers_per_block", self.transformer_layers_per_block.len()),
            ("attention_heads", self.attention_heads.len()),
        ] {
            if length != levels {
                return wrong(field, format!("expected {levels} values, one a resolution, found {length}"));
            }
        }
        for (channels, (heads, layers)) in
            self.block_out_channels.iter().zip(self.attention_heads.iter().zip(&self.transformer_layers_per_block))
        {
            if *channels == 0 || *channels > 1 << 16 {
                return wrong("block_out_channels", format!("expected 1 to 65536 channels, found {channels}"));
            }
            if self.norm_num_groups == 0 || channels % self.norm_num_groups != 0 {
                let groups = self.norm_num_groups;
                return wrong("norm_num_groups", format!("expected a divisor of {channels} channels, found {groups}"));
            }
            if *layers > 0 && (*heads == 0 || channels % heads != 0) {
                return wrong("attention_heads", format!("expected a divisor of {channels} channels, found {heads}"));
            }
            if *layers > 64 {
                return wrong("transformer_layers_per_block", format!("expected at most 64 layers, found {layers}"));
            }
        }
        if self.layers_per_block == 0 || self.layers_per_block > 16 {
            return wrong("layers_per_block", format!("expected 1 to 16, found {}", self.layers_per_block));
        }
        if self.transformer_layers_per_block.last() == Some(&0) {
            return wrong("transformer_layers_per_block", "expected at least one layer at the coarsest level".into());
        }
        Ok(())
    }
}

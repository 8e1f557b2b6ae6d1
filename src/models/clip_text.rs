//! CLIP's text encoder, with the tensor names of transformers' `CLIPTextModelWithProjection`.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::clip_layers::{Encoder, Shape, layer_norm};
use super::tokenizer;
use crate::nn::{Embedding, LayerNorm, Linear, Weights};
use crate::ops::{Activation, Mask};
use crate::{Error, Result};

/// The architecture, with the field names of transformers' `CLIPTextConfig`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Number of tokens of the vocabulary.
    pub vocab_size: usize,
    /// Most tokens of a prompt.
    pub max_position_embeddings: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the MLPs.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads.
    pub num_attention_heads: usize,
    /// Activation of the MLPs.
    pub hidden_act: Activation,
    /// Width of the pooled embedding; `None` for a model without projection.
    pub projection_dim: Option<usize>,
    /// The token whose first occurrence is where the pooled embedding is read.
    pub eos_token_id: u32,
}

impl Config {
    /// OpenAI's CLIP ViT-L/14, SDXL's first text encoder (without projection, as SDXL publishes it).
    pub fn clip_l() -> Self {
        Config {
            vocab_size: 49408,
            max_position_embeddings: 77,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            hidden_act: Activation::QuickGelu,
            projection_dim: None,
            eos_token_id: 49407,
        }
    }

    /// OpenCLIP ViT-bigG/14, SDXL's second text encoder.
    pub fn open_clip_big_g() -> Self {
        Config {
            hidden_size: 1280,
            intermediate_size: 5120,
            num_hidden_layers: 32,
            num_attention_heads: 20,
            hidden_act: Activation::Gelu,
            projection_dim: Some(1280),
            ..Self::clip_l()
        }
    }

    /// The text tower of OpenAI's CLIP ViT-B/16.
    pub fn vit_b_16() -> Self {
        Config {
            hidden_size: 512,
            intermediate_size: 2048,
            num_attention_heads: 8,
            projection_dim: Some(512),
            ..Self::clip_l()
        }
    }

    /// The miniature, for the vocabulary of [`tokenizer::PromptTokenizer::mini`].
    pub fn mini() -> Self {
        Config {
            vocab_size: tokenizer::mini_vocabulary().len(),
            max_position_embeddings: tokenizer::MINI_LENGTH,
            hidden_size: 64,
            intermediate_size: 256,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            hidden_act: Activation::Gelu,
            projection_dim: Some(64),
            eos_token_id: tokenizer::MINI_END,
        }
    }
}

/// What the denoiser takes of a text.
#[derive(Clone, Debug)]
pub struct TextEmbeddings {
    /// States before the last layer, without the final norm (transformers: `hidden_states[-2]`):
    /// `(batch, tokens, hidden_size)`.
    pub hidden_states: Tensor,
    /// The projected state of the end-of-text token: `(batch, projection_dim)`; without projection
    /// `(batch, hidden_size)`.
    pub pooled: Tensor,
}

impl TextEmbeddings {
    /// The embeddings of batches of prompts that were joined, taken apart again.
    ///
    /// # Errors
    /// [`Error::Candle`] where there are fewer embeddings than prompts.
    pub fn split(&self, batches: &[&[String]]) -> Result<Vec<TextEmbeddings>> {
        let mut start = 0;
        let part = |prompts: &&[String]| {
            let part = |tensor: &Tensor| tensor.narrow(0, start, prompts.len());
            let text = TextEmbeddings { hidden_states: part(&self.hidden_states)?, pooled: part(&self.pooled)? };
            start += prompts.len();
            Ok(text)
        };
        batches.iter().map(part).collect()
    }
}

/// The text encoder.
#[derive(Clone, Debug)]
pub struct ClipText {
    config: Config,
    token_embedding: Embedding,
    position_embedding: Embedding,
    encoder: Encoder,
    final_layer_norm: LayerNorm,
    text_projection: Option<Linear>,
}

impl ClipText {
    /// Loads `text_model.*` and, where the configuration has a projection, `text_projection.weight`.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let shape = Shape {
            width: config.hidden_size,
            heads: config.num_attention_heads,
            mlp_width: config.intermediate_size,
            layers: config.num_hidden_layers,
            activation: config.hidden_act,
        };
        shape.check("clip_text")?;
        // transformers 5 writes a text encoder without projection without this prefix.
        let embedding = "embeddings.token_embedding.weight";
        let model = match weights.contains(embedding) && !weights.contains(&format!("text_model.{embedding}")) {
            true => weights.clone(),
            false => weights.pp("text_model"),
        };
        let (embeddings, width) = (model.pp("embeddings"), config.hidden_size);
        let text_projection = match config.projection_dim {
            Some(dim) => Some(Linear::load(width, dim, false, &weights.pp("text_projection"))?),
            None => None,
        };
        Ok(ClipText {
            config: config.clone(),
            token_embedding: Embedding::load(config.vocab_size, width, &embeddings.pp("token_embedding"))?,
            position_embedding: Embedding::load(
                config.max_position_embeddings,
                width,
                &embeddings.pp("position_embedding"),
            )?,
            encoder: Encoder::load(&shape, &model)?,
            final_layer_norm: layer_norm(width, &model.pp("final_layer_norm"))?,
            text_projection,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the weights lie.
    pub fn device(&self) -> &Device {
        self.token_embedding.table().device()
    }

    /// Embeds prompts given as token ids, u32 `(batch, tokens)`, each with at least one end-of-text token. They are
    /// looked at on the CPU: from there they go to the weights without waiting for work that a GPU has still to do.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape or an id does not fit, or a row has no end-of-text token.
    pub fn forward(&self, ids: &Tensor) -> Result<TextEmbeddings> {
        let ends = self.check(ids)?;
        let ids = &ids.to_device(self.device())?;
        let (batch, length) = ids.dims2()?;
        let positions = self.position_embedding.table().narrow(0, 0, length)?;
        let x = self.token_embedding.forward(ids)?.broadcast_add(&positions)?;
        let (hidden_states, last) = self.encoder.forward(&x, Mask::Causal)?;
        // The norm works on each token alone, so only the pooled ones need it.
        let rows = Tensor::from_vec(ends, batch, ids.device())?;
        let at_end = last.reshape((batch * length, self.config.hidden_size))?.index_select(&rows, 0)?;
        let pooled = self.final_layer_norm.forward(&at_end)?;
        let pooled = match &self.text_projection {
            Some(projection) => projection.forward(&pooled)?,
            None => pooled,
        };
        Ok(TextEmbeddings { hidden_states, pooled })
    }

    /// Checks the ids, and returns for each sample the row of its end-of-text token in `(batch * tokens, ...)`.
    fn check(&self, ids: &Tensor) -> Result<Vec<u32>> {
        let fault = |expected: String, found: String| Error::argument("clip_text", "ids", expected, found);
        let most = self.config.max_position_embeddings;
        if ids.rank() != 2 || ids.dtype() != DType::U32 || ids.dims()[1] > most {
            let found = format!("{:?} of shape {:?}", ids.dtype(), ids.dims());
            return Err(fault(format!("U32 of shape (batch, at most {most})"), found));
        }
        let length = ids.dims()[1];
        let mut ends = Vec::with_capacity(ids.dims()[0]);
        for (sample, row) in ids.to_vec2::<u32>()?.iter().enumerate() {
            if let Some(id) = row.iter().find(|&&id| id as usize >= self.config.vocab_size) {
                return Err(fault(format!("ids below {}", self.config.vocab_size), format!("{id} in sample {sample}")));
            }
            let end = self.config.eos_token_id;
            match row.iter().position(|&id| id == end) {
                Some(position) => ends.push((sample * length + position) as u32),
                None => return Err(fault(format!("an end-of-text token ({end}) in every row"), format!("{row:?}"))),
            }
        }
        Ok(ends)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::nn::Parameters;

    fn tiny() -> Config {
        Config {
            vocab_size: 7,
            max_position_embeddings: 5,
            hidden_size: 4,
            intermediate_size: 6,
            num_attention_heads: 2,
            projection_dim: Some(3),
            eos_token_id: 6,
            ..Config::mini()
        }
    }

    fn shapes(config: &Config) -> Result<std::collections::BTreeMap<String, Vec<usize>>> {
        let weights = Weights::shapes_only();
        ClipText::load(config, &weights)?;
        Ok(weights.shapes())
    }

    #[test]
    fn the_published_encoders_have_their_published_tensors() -> Result<()> {
        for (config, tensors, elements) in
            [(Config::clip_l(), 196, 123_060_480), (Config::open_clip_big_g(), 517, 694_659_840)]
        {
            let shapes = shapes(&config)?;
            assert_eq!(shapes.len(), tensors);
            assert_eq!(shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>(), elements);
        }
        let shapes = shapes(&Config::open_clip_big_g())?;
        for (name, shape) in [
            ("text_model.embeddings.token_embedding.weight", vec![49408, 1280]),
            ("text_model.embeddings.position_embedding.weight", vec![77, 1280]),
            ("text_model.encoder.layers.31.self_attn.out_proj.bias", vec![1280]),
            ("text_model.encoder.layers.0.mlp.fc1.weight", vec![5120, 1280]),
            ("text_model.encoder.layers.0.layer_norm2.weight", vec![1280]),
            ("text_model.final_layer_norm.bias", vec![1280]),
            ("text_projection.weight", vec![1280, 1280]),
        ] {
            assert_eq!(shapes.get(name), Some(&shape), "{name}");
        }
        Ok(())
    }

    #[test]
    fn a_file_without_the_prefix_is_read_too() -> Result<()> {
        let parameters = Parameters::new();
        let config = Config { projection_dim: None, ..tiny() };
        let model = ClipText::load(&config, &Weights::trainable(&parameters, 1, DType::F64, &Device::Cpu))?;
        let bare = parameters.all().into_iter().map(|(name, variable)| {
            Ok((name.strip_prefix("text_model.").unwrap_or(&name).to_string(), variable.as_detached_tensor()))
        });
        let other = ClipText::load(&config, &Weights::frozen("bare", bare.collect::<Result<_>>()?))?;
        let ids = Tensor::new(&[[1u32, 2, 6, 6, 6]], &Device::Cpu)?;
        let (a, b) = (model.forward(&ids)?.pooled, other.forward(&ids)?.pooled);
        assert_eq!(a.to_vec2::<f64>()?, b.to_vec2::<f64>()?);
        Ok(())
    }

    #[test]
    fn what_follows_the_end_of_text_changes_only_later_states() -> Result<()> {
        let model = ClipText::load(&tiny(), &Weights::trainable(&Parameters::new(), 1, DType::F64, &Device::Cpu))?;
        let embed = |row: [u32; 5]| model.forward(&Tensor::new(&[row], &Device::Cpu)?);
        let (a, b) = (embed([1, 2, 6, 6, 6])?, embed([1, 2, 6, 0, 3])?);
        assert_eq!(a.hidden_states.dims(), [1, 5, 4]);
        assert_eq!(a.pooled.to_vec2::<f64>()?, b.pooled.to_vec2::<f64>()?);
        let (a, b) = (a.hidden_states.to_vec3::<f64>()?, b.hidden_states.to_vec3::<f64>()?);
        assert_eq!(a[0][..3], b[0][..3]);
        assert_ne!(a[0][3], b[0][3]);
        Ok(())
    }

    #[test]
    fn every_weight_gets_a_gradient() -> Result<()> {
        let parameters = Parameters::new();
        let model = ClipText::load(&tiny(), &Weights::trainable(&parameters, 1, DType::F32, &Device::Cpu))?;
        let embeddings = model.forward(&Tensor::new(&[[1u32, 2, 6, 6, 6], [3, 4, 5, 0, 6]], &Device::Cpu)?)?;
        let loss = (embeddings.hidden_states.sqr()?.sum_all()? + embeddings.pooled.sqr()?.sum_all()?)?;
        let gradients = loss.backward()?;
        for (name, variable) in parameters.all() {
            assert!(gradients.get(&variable).is_some(), "{name}");
        }
        Ok(())
    }

    #[test]
    fn ids_that_do_not_fit_are_refused() -> Result<()> {
        let model = ClipText::load(&tiny(), &Weights::trainable(&Parameters::new(), 1, DType::F32, &Device::Cpu))?;
        for row in [vec![1u32, 2, 3], vec![1, 7, 6], vec![1, 1, 1, 1, 1, 6]] {
            let ids = Tensor::new(vec![row], &Device::Cpu)?;
            assert!(matches!(model.forward(&ids), Err(Error::Argument { argument: "ids", .. })));
        }
        Ok(())
    }
}

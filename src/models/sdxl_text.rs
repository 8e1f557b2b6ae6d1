//! SDXL's two text encoders as the one that its U-Net expects.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::clip_text::TextEmbeddings;
use super::roles::{TextEncoder, TokenizedClipText};
use super::tokenizer::PromptTokenizer;
use crate::Result;

/// CLIP ViT-L and OpenCLIP ViT-bigG: hidden states side by side, pooled embedding of the second (diffusers:
/// `StableDiffusionXLPipeline.encode_prompt`).
#[derive(Clone, Debug)]
pub struct SdxlText {
    /// `tokenizer` and `text_encoder`.
    pub first: TokenizedClipText,
    /// `tokenizer_2` and `text_encoder_2`.
    pub second: TokenizedClipText,
}

impl SdxlText {
    /// The two tokenizers from the vocabulary they share: they differ in the token after the end.
    ///
    /// # Errors
    /// Those of [`PromptTokenizer::clip`].
    pub fn tokenizers(vocab: impl AsRef<Path>, merges: impl AsRef<Path>) -> Result<[PromptTokenizer; 2]> {
        let tokenizer = |padding: &str| PromptTokenizer::clip(vocab.as_ref(), merges.as_ref(), padding);
        Ok([tokenizer("<|endoftext|>")?, tokenizer("!")?])
    }

    /// Where the weights lie.
    pub fn device(&self) -> &Device {
        self.first.network.device()
    }
}

impl TextEncoder for SdxlText {
    fn encode(&self, prompts: &[String]) -> Result<TextEmbeddings> {
        let (first, second) = (self.first.encode(prompts)?, self.second.encode(prompts)?);
        Ok(TextEmbeddings {
            hidden_states: Tensor::cat(&[&first.hidden_states, &second.hidden_states], 2)?,
            pooled: second.pooled,
        })
    }

    fn encode_batches(&self, batches: &[&[String]]) -> Result<Vec<TextEmbeddings>> {
        self.encode(&batches.concat())?.split(batches)
    }
}

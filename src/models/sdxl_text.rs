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

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::models::clip_text::{ClipText, Config};
    use crate::nn::{Parameters, Weights};

    #[test]
    fn batches_that_are_encoded_together_get_what_each_gets_alone() -> Result<()> {
        let encoder = |seed: u64| -> Result<TokenizedClipText> {
            let weights = Weights::trainable(&Parameters::new(), seed, DType::F64, &Device::Cpu);
            Ok(TokenizedClipText {
                tokenizer: PromptTokenizer::mini()?,
                network: ClipText::load(&Config::mini(), &weights)?,
            })
        };
        let text = SdxlText { first: encoder(1)?, second: encoder(2)? };
        let prompts = ["a portrait", "", "a painting of a person"].map(String::from);
        let batches = [&prompts[..2], &prompts[2..], &prompts[1..]];
        let together = text.encode_batches(&batches)?;
        assert_eq!(together.len(), 3);
        for (prompts, together) in batches.iter().zip(&together) {
            let alone = text.encode(prompts)?;
            for (a, b) in [(&together.hidden_states, &alone.hidden_states), (&together.pooled, &alone.pooled)] {
                assert_eq!(a.dims(), b.dims());
                let difference = (a - b)?.abs()?.max_all()?.to_scalar::<f64>()?;
                assert!(difference < 1e-12, "{difference}");
            }
        }
        Ok(())
    }
}

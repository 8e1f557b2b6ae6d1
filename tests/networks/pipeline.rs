use std::sync::Arc;

use anyhow::Result;
use candle_core::DType;
use lcm_lookahead::models::autoencoder_kl::{self, AutoencoderKl};
use lcm_lookahead::models::clip_text::{self, ClipText};
use lcm_lookahead::models::roles::TokenizedClipText;
use lcm_lookahead::models::sdxl_text::SdxlText;
use lcm_lookahead::models::unet::{self, FreeU, UNet};
use lcm_lookahead::nn::Weights;
use lcm_lookahead::ops::Activation;
use lcm_lookahead::personalize::{TextToImage, TextToImageOptions};
use lcm_lookahead::schedule::{NoiseSchedule, SamplerKind};

use crate::support::{Case, fixture};

/// diffusers computes sinusoidal embeddings, the noise schedule and FreeU's transforms in f32 in any case.
const KINDS: [(DType, f64); 2] = [(DType::F64, 1e-5), (DType::F32, 1e-3)];

fn pipeline(dtype: DType) -> Result<TextToImage> {
    let weights = |case: &str| -> Result<Weights> { Case::load("pipeline", case)?.weights_as(dtype) };
    let [tokenizer, tokenizer_2] = SdxlText::tokenizers(fixture("clip_vocab.json"), fixture("clip_merges.txt"))?;
    let first = clip_text::Config {
        vocab_size: tokenizer.vocabulary_size(),
        hidden_size: 8,
        intermediate_size: 16,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        eos_token_id: tokenizer.vocabulary_size() as u32 - 1,
        ..clip_text::Config::clip_l()
    };
    let second = clip_text::Config { hidden_act: Activation::Gelu, projection_dim: Some(6), ..first.clone() };
    let text_encoder = SdxlText {
        first: TokenizedClipText { tokenizer, network: ClipText::load(&first, &weights("text_encoder")?)? },
        second: TokenizedClipText {
            tokenizer: tokenizer_2,
            network: ClipText::load(&second, &weights("text_encoder_2")?)?,
        },
    };
    let unet = unet::Config {
        block_out_channels: vec![4, 8, 8],
        layers_per_block: 1,
        transformer_layers_per_block: vec![0, 1, 2],
        attention_heads: vec![1, 2, 4],
        cross_attention_dim: 16,
        norm_num_groups: 2,
        addition_time_embed_dim: 8,
        pooled_dim: 6,
        ..unet::Config::sdxl()
    };
    let vae = autoencoder_kl::Config {
        block_out_channels: vec![4, 8, 8],
        layers_per_block: 1,
        norm_num_groups: 2,
        ..autoencoder_kl::Config::sdxl()
    };
    Ok(TextToImage {
        unet: UNet::load(&unet, &weights("unet")?)?,
        text_encoder: Arc::new(text_encoder),
        decoder: Arc::new(AutoencoderKl::load(&vae, &weights("vae")?)?),
        schedule: NoiseSchedule::sdxl(),
        factor: vae.downscale(),
    })
}

#[test]
fn sdxl_draws_what_diffusers_draws_without_and_with_freeu() -> Result<()> {
    let case = Case::load("pipeline", "result")?;
    let prompts = ["A photo of a face in the forest", "an oil painting, in the style of Monet"].map(String::from);
    for (dtype, limit) in KINDS {
        let (pipeline, noise) = (pipeline(dtype)?, case.get_as("noise", dtype)?);
        for (name, freeu) in [("plain", None), ("freeu", Some(FreeU::sdxl()))] {
            let options =
                TextToImageOptions { steps: 10, sampler: SamplerKind::Ddim, freeu, ..TextToImageOptions::default() };
            let latents = pipeline.latents(&prompts, &noise, &options)?;
            case.assert_within(limit, &format!("{name}.latents"), &latents)?;
            let images = pipeline.generate(&prompts, &noise, &options)?.affine(0.5, 0.5)?.clamp(0.0, 1.0)?;
            case.assert_within(limit, &format!("{name}.images"), &images)?;
        }
    }
    Ok(())
}

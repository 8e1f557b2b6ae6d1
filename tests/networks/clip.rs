use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use image::RgbImage;
use lcm_lookahead::models::clip_alignment::ClipAlignment;
use lcm_lookahead::models::clip_image_processor::clip_pixel_values;
use lcm_lookahead::models::clip_text;
use lcm_lookahead::models::clip_vision::{self, CLIP_STD};
use lcm_lookahead::models::sdxl_text::SdxlText;
use lcm_lookahead::models::tokenizer::PromptTokenizer;
use lcm_lookahead::ops::Activation;

use crate::KINDS;
use crate::support::{Case, fixture};

fn prompts() -> Result<Vec<String>> {
    Ok(serde_json::from_str(&std::fs::read_to_string(fixture("clip_prompts.json"))?)?)
}

#[test]
fn both_of_sdxls_tokenizers_give_the_ids_of_transformers() -> Result<()> {
    let case = Case::load("clip", "tokenizer")?;
    let prompts = prompts()?;
    let ours = SdxlText::tokenizers(fixture("clip_vocab.json"), fixture("clip_merges.txt"))?;
    let json =
        ["<|endoftext|>", "!"].map(|padding| PromptTokenizer::clip_from_json(fixture("clip_tokenizer.json"), padding));
    for (name, (from_vocabulary, from_json)) in ["first", "second"].iter().zip(ours.iter().zip(json)) {
        let expected = case.get(name)?.to_dtype(DType::U32)?.to_vec2::<u32>()?;
        for tokenizer in [from_vocabulary, &from_json?] {
            let found = tokenizer.encode(&prompts, &Device::Cpu)?.to_vec2::<u32>()?;
            for ((prompt, found), expected) in prompts.iter().zip(&found).zip(&expected) {
                assert_eq!(found, expected, "{name}: {prompt:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_a_long_prompt_loses_is_told() -> Result<()> {
    let [tokenizer, _] = SdxlText::tokenizers(fixture("clip_vocab.json"), fixture("clip_merges.txt"))?;
    let prompts = prompts()?;
    let lost = tokenizer.truncated(prompts.last().context("no prompt")?)?;
    assert!(lost.is_some_and(|lost| lost.ends_with("and a dog")));
    assert_eq!(tokenizer.truncated(&prompts[0])?, None);
    Ok(())
}

#[test]
fn pictures_are_resized_as_pillow_resizes_them() -> Result<()> {
    let case = Case::load("clip", "image_processor")?;
    for i in 0..5 {
        let (picture, expected) = (case.get(&format!("{i}.picture"))?, case.get(&format!("{i}.pixel_values"))?);
        let (height, width, _) = picture.dims3()?;
        let bytes = picture.flatten_all()?.to_vec1::<u8>()?;
        let picture = RgbImage::from_raw(width as u32, height as u32, bytes).context("a picture's size")?;
        let size = expected.dims()[1];
        let found = clip_pixel_values(&picture, size, &Device::Cpu)?;
        // One step of a byte is more than 0.01: not one byte differs.
        let difference = (&found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        println!("clip.image_processor.{i}: largest difference {difference:.1e}");
        assert!(difference < 2e-6, "picture {i}: {difference}");
    }
    Ok(())
}

#[test]
fn the_differentiable_preprocessing_differs_by_less_than_a_byte_step_on_average() -> Result<()> {
    let case = Case::load("clip", "image_processor")?;
    for i in 0..5 {
        let (picture, expected) = (case.get(&format!("{i}.picture"))?, case.get(&format!("{i}.pixel_values"))?);
        let size = expected.dims()[1];
        let config = clip_vision::Config { image_size: size, patch_size: 1, ..clip_vision::Config::mini() };
        let model = clip_vision::ClipVision::load(&config, &lcm_lookahead::nn::Weights::shapes_only())?;
        let images = picture.to_dtype(DType::F32)?.permute((2, 0, 1))?.unsqueeze(0)?.affine(2.0 / 255.0, -1.0)?;
        let images = images.contiguous()?;
        let exact = (model.pixel_values(&images)?.squeeze(0)? - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(exact < 2e-6, "picture {i}: {exact}");
        let difference = (model.preprocess(&images)?.squeeze(0)? - expected)?.abs()?;
        // The original rounds, and cuts off what overshoots, between rows and columns too.
        let (step, mean) = (1.0 / 255.0 / CLIP_STD[1], f64::from(difference.mean_all()?.to_scalar::<f32>()?));
        println!("clip.preprocess.{i}: on average {:.2} steps of a byte", mean / step);
        assert!(mean < step, "picture {i}: {mean}");
    }
    Ok(())
}

#[test]
fn images_fit_texts_as_in_transformers() -> Result<()> {
    let case = Case::load("clip", "model")?;
    let text = clip_text::Config {
        vocab_size: 20,
        max_position_embeddings: 7,
        hidden_size: 8,
        intermediate_size: 12,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        hidden_act: Activation::QuickGelu,
        projection_dim: Some(5),
        eos_token_id: 19,
    };
    let vision = clip_vision::Config {
        image_size: 6,
        patch_size: 2,
        hidden_size: 8,
        intermediate_size: 12,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        hidden_act: Activation::QuickGelu,
        projection_dim: 5,
    };
    for (dtype, limit) in KINDS {
        let model = ClipAlignment::load(&text, &vision, PromptTokenizer::mini()?, &case.weights_as(dtype)?)?;
        let pixels = Var::from_tensor(&case.get_as("pixels", dtype)?)?;
        let texts = model.embed_ids(&case.get("ids")?.to_dtype(DType::U32)?)?;
        let logits: Tensor = model.logits(&model.embed_pixel_values(&pixels)?, &texts)?;
        case.assert_within(limit, "logits", &logits)?;
        let gradients = logits.get(0)?.get(1)?.backward()?;
        case.assert_within(limit, "gradient", gradients.get(&pixels).context("no gradient")?)?;
    }
    Ok(())
}

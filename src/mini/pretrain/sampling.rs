//! Pictures of what a stage has learnt.

use candle_core::{DType, Tensor};
use image::RgbImage;

use super::encoded::Encoders;
use super::training::Options;
use crate::Result;
use crate::data::from_tensor;
use crate::lookahead::{AdapterTokens, FaceEncoder};
use crate::mini::MiniConfig;
use crate::models::unet::{Conditioning, Pass, UNet};
use crate::random::Address;
use crate::schedule::{NoiseSchedule, SamplerKind};
use crate::train::ContactSheet;

/// What is sampled.
pub(super) const PROMPTS: [&str; 10] = [
    "a photo of a face",
    "a photo of a face in a forest",
    "a photo of a face on a beach",
    "a photo of an old man with tan skin and short grey hair",
    "a photo of a young woman with dark skin and long black hair in the snow",
    "an oil painting of a face in a flower garden",
    "a pencil drawing of a face",
    "a comic book drawing of a face as a pirate",
    "a pop art print of a face",
    "a neon sign of a face wearing a crown",
];

const STEPS: usize = 20;

/// How many pictures are sampled at once: one by each worker on the CPU, all on a GPU.
pub(super) fn piece(options: &Options, all: usize) -> usize {
    if options.device.is_cpu() { 1 } else { all }
}

/// Samples prompts with DDIM and classifier-free guidance; captioned pictures.
///
/// `image`: a face encoder and its tokens, `(prompts, ..)`. `index` addresses the noise.
pub(super) fn sample(
    options: &Options,
    unet: &UNet,
    encoders: &Encoders,
    prompts: &[String],
    image: Option<(&FaceEncoder, &AdapterTokens)>,
    guidance_scale: f64,
    index: usize,
) -> Result<Vec<(String, RgbImage)>> {
    let (schedule, count) = (NoiseSchedule::sdxl(), prompts.len());
    let side = MiniConfig::mini().resolution / 4;
    let address = Address::new(7, "pretraining sample").step(index as u64);
    let mut latents = address.normal_batch(count, (4, side, side), DType::F32, &options.device)?;
    let text = encoders.conditioning(prompts)?;
    let conditioning = Conditioning::cat(&[&text.without_text()?, &text])?;
    let mut pass = Pass::default();
    if let Some((face, tokens)) = image {
        let unconditional = tokens.unconditional.broadcast_as(tokens.conditional.shape())?.contiguous()?;
        pass.image_tokens = Some(face.image_tokens(&Tensor::cat(&[&unconditional, &tokens.conditional], 0)?, 1.0)?);
    }
    let mut sampler = SamplerKind::Ddim.build(&schedule, STEPS)?;
    for (i, t) in sampler.timesteps().to_vec().into_iter().enumerate() {
        let both = Tensor::cat(&[&latents, &latents], 0)?;
        let noise = unet
            .forward(&options.input(&both)?, &vec![t; 2 * count], &conditioning, &pass)?
            .detach()
            .to_dtype(DType::F32)?;
        let (without, with) = (noise.narrow(0, 0, count)?, noise.narrow(0, count, count)?);
        let noise = (&without + ((with - &without)? * guidance_scale)?)?;
        latents = sampler.step(&noise, i, &latents, address)?.detach();
    }
    decoded(options, encoders, &latents, prompts)
}

/// Latents as captioned pictures.
pub(super) fn decoded(
    options: &Options,
    encoders: &Encoders,
    latents: &Tensor,
    captions: &[String],
) -> Result<Vec<(String, RgbImage)>> {
    let images = encoders.autoencoder.decode(&options.input(latents)?)?.detach().to_dtype(DType::F32)?;
    captions.iter().enumerate().map(|(i, caption)| Ok((caption.clone(), from_tensor(&images.get(i)?)?))).collect()
}

/// Captioned pictures in rows of `columns`.
pub(super) fn sheet_of(pictures: &[(String, RgbImage)], columns: usize) -> Result<RgbImage> {
    let size = MiniConfig::mini().resolution as u32;
    let mut sheet = ContactSheet::new(size, size);
    for row in pictures.chunks(columns.max(1)) {
        sheet.add_row(row.to_vec())?;
    }
    Ok(sheet.render())
}

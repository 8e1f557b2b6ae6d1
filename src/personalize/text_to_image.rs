//! Plain text to image with the base, without any reference: what the base can do by itself, and what data for the
//! encoder's training is drawn with.

use std::sync::Arc;

use candle_core::Tensor;

use super::guidance::plain;
use super::{GuidedPictures, LatentGuidance, Through};
use crate::autograd::with_large_stack;
use crate::lookahead::Base;
use crate::models::roles::{LatentDecoder, TextEncoder};
use crate::models::unet::{Conditioning, FreeU, Pass, UNet};
use crate::nn::Loras;
use crate::random::Address;
use crate::schedule::{NoiseSchedule, SamplerKind};
use crate::{Error, Result};

/// How pictures are drawn from text alone.
#[derive(Clone, Debug)]
pub struct TextToImageOptions {
    /// Number of denoising steps.
    pub steps: usize,
    /// The sampler.
    pub sampler: SamplerKind,
    /// Guidance scale; with 1 or less there is no unconditional pass (Turbo, LCM).
    pub guidance_scale: f64,
    /// FreeU, where wanted.
    pub freeu: Option<FreeU>,
    /// LoRA sets on the U-Net, such as the LCM-LoRA.
    pub loras: Loras,
}

impl Default for TextToImageOptions {
    /// diffusers' defaults for SDXL: 50 steps, guidance 5.
    fn default() -> Self {
        TextToImageOptions {
            steps: 50,
            sampler: SamplerKind::default(),
            guidance_scale: 5.0,
            freeu: None,
            loras: Loras::none(),
        }
    }
}

/// Text to pictures (diffusers: `StableDiffusionXLPipeline`).
#[derive(Clone)]
pub struct TextToImage {
    /// The denoiser.
    pub unet: UNet,
    /// Prompts to embeddings.
    pub text_encoder: Arc<dyn TextEncoder>,
    /// Latents to images.
    pub decoder: Arc<dyn LatentDecoder>,
    /// The diffusion process the U-Net was trained with.
    pub schedule: NoiseSchedule,
    /// Pixels a latent stands for, in each direction (8 for SDXL).
    pub factor: usize,
}

impl TextToImage {
    /// Text to pictures with the frozen networks of a base, which are shared, not copied.
    pub fn new(base: &Base) -> Self {
        TextToImage {
            unet: base.unet.clone(),
            text_encoder: base.text_encoder.clone(),
            decoder: base.decoder.clone(),
            schedule: base.schedule.clone(),
            factor: base.encoder.factor(),
        }
    }

    /// One picture a prompt, from standard normal `noise` `(prompts, channels, height, width)`:
    /// `(prompts, 3, height * factor, width * factor)`, nominally in [-1, 1].
    ///
    /// Without text (for the guidance) embeddings are zero, as SDXL was trained.
    ///
    /// # Errors
    /// [`Error::Argument`] where there are not as many prompts as noises, or for a number of steps the sampler cannot
    /// take; those of the networks.
    pub fn generate(&self, prompts: &[String], noise: &Tensor, options: &TextToImageOptions) -> Result<Tensor> {
        self.decoder.decode(&self.latents(prompts, noise, options)?)
    }

    /// The scaled latents that [`TextToImage::generate`] decodes, as `noise`.
    ///
    /// # Errors
    /// As there.
    pub fn latents(&self, prompts: &[String], noise: &Tensor, options: &TextToImageOptions) -> Result<Tensor> {
        Ok(self.walk(prompts, noise, options, None)?.0)
    }

    /// As [`TextToImage::generate`], with guidance of the latents at one step (paper, section 5.1).
    ///
    /// # Errors
    /// [`Error::Argument`] also where there is no such step, or not one target a prompt; those of the loss.
    pub fn generate_guided(
        &self,
        prompts: &[String],
        noise: &Tensor,
        options: &TextToImageOptions,
        guidance: &LatentGuidance<'_>,
    ) -> Result<GuidedPictures> {
        let targets = guidance.target.dims().first().copied().unwrap_or(0);
        if targets != prompts.len() {
            let expected = format!("{}, one a prompt", prompts.len());
            return Err(Error::argument("TextToImage", "target", expected, targets.to_string()));
        }
        // The graph of a whole U-Net is deep.
        let (latents, losses) = with_large_stack(|| self.walk(prompts, noise, options, Some(guidance)))?;
        Ok(GuidedPictures { images: self.decoder.decode(&latents)?, losses })
    }

    /// The whole way, and what the guided step's losses were.
    fn walk(
        &self,
        prompts: &[String],
        noise: &Tensor,
        options: &TextToImageOptions,
        guidance: Option<&LatentGuidance<'_>>,
    ) -> Result<(Tensor, Vec<f64>)> {
        let (batch, _, height, width) = noise.dims4()?;
        if prompts.len() != batch {
            let found = prompts.len().to_string();
            return Err(Error::argument("TextToImage", "prompts", format!("{batch}, as many as noises"), found));
        }
        let text = self.text_encoder.encode(prompts)?;
        let (height, width) = ((height * self.factor) as f64, (width * self.factor) as f64);
        let text = Conditioning {
            hidden_states: text.hidden_states.detach(),
            pooled: text.pooled.detach(),
            time_ids: vec![[height, width, 0.0, 0.0, height, width]; batch],
        };
        let guided = (options.guidance_scale > 1.0).then(|| text.without_text()).transpose()?;
        let pass = Pass { loras: options.loras.clone(), freeu: options.freeu, ..Pass::default() };
        let mut sampler = options.sampler.build(&self.schedule, options.steps)?;
        let mut latents = (noise * sampler.init_noise_sigma())?;
        let guided_step = guidance.map(|guidance| guidance.index(sampler.timesteps().len())).transpose()?;
        let mut losses = Vec::new();
        for (i, timestep) in sampler.timesteps().to_vec().into_iter().enumerate() {
            let forward = |latents: &Tensor, text: &Conditioning, pass: &Pass| {
                self.unet.forward(&sampler.scale_model_input(latents, i)?, &vec![timestep; batch], text, pass)
            };
            let predict = |latents: &Tensor, pass: &Pass| match &guided {
                Some(no_text) => {
                    plain(&forward(latents, no_text, pass)?, &forward(latents, &text, pass)?, options.guidance_scale)
                }
                None => forward(latents, &text, pass),
            };
            if let Some(guidance) = guidance.filter(|_| guided_step == Some(i)) {
                let clean = |latents: &Tensor| {
                    let prediction = match &guidance.through {
                        Through::X0 => predict(latents, &Pass { recompute: guidance.recompute, ..pass.clone() })?,
                        Through::Preview(lcm_lora) => {
                            let loras = Loras::one(lcm_lora, 1.0);
                            forward(latents, &text, &Pass { loras, recompute: guidance.recompute, ..Pass::default() })?
                        }
                    };
                    sampler.predict_x0(&prediction, i, latents)
                };
                (latents, losses) = guidance.guide(&latents, clean)?;
            }
            let prediction = predict(&latents, &pass)?;
            latents = sampler.step(&prediction, i, &latents, Address::new(0, "text to image"))?.detach();
        }
        Ok((latents, losses))
    }
}

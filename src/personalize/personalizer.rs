//! The sampler with the encoder's conditions wired up.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use image::RgbImage;

use super::guidance::{Branch, Guidance, ReferenceText};
use super::reference_key_values::ReferenceKeyValues;
use super::{Options, Reference};
use crate::autograd::on_pool;
use crate::data::{Crop, from_tensor, resize_and_crop, to_tensor};
use crate::formats::EncoderFile;
use crate::lookahead::{Base, FaceEncoder, FaceEncoderConfig, KvEncoderConfig, PreviewForm, preview};
use crate::models::resampler;
use crate::models::unet::{Conditioning, ImageTokens, KeyValues, Pass};
use crate::nn::{Loras, Weights};
use crate::random::Address;
use crate::schedule::SamplerKind;
use crate::train::{Checkpoint, TrainConfig};
use crate::{Error, Result, ops};

/// Draws a person in any scene or style, from one photograph.
#[derive(Clone)]
pub struct Personalizer {
    base: Base,
    encoder: FaceEncoder,
    noisy_encoder_input: bool,
    encoder_prompt: String,
}

impl Personalizer {
    /// A personalizer of an encoder whose weights are frozen. (With trainable ones sampling would record a graph.)
    pub fn new(base: Base, encoder: FaceEncoder) -> Self {
        let Options { noisy_encoder_input, encoder_prompt, .. } = Options::default();
        Personalizer { base, encoder, noisy_encoder_input, encoder_prompt }
    }

    /// A personalizer from a checkpoint folder of the [`Trainer`](crate::train::Trainer): `.../checkpoint-<step>`, or
    /// the run's folder, whose latest checkpoint is taken. Averaged parameters are used where the run kept them.
    ///
    /// `resampler`: the shape of the adapter's resampler, which belongs to the base
    /// ([`crate::mini::face_encoder_config`] for the miniature).
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] where the folder holds no whole checkpoint, [`Error::Tensor`] where it belongs
    /// to another base.
    pub fn from_checkpoint(base: Base, resampler: &resampler::Config, folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let folder = match crate::train::checkpoint::latest(folder) {
            Ok(Some(latest)) => latest,
            _ => folder.to_path_buf(),
        };
        let checkpoint = Checkpoint::load(&folder)?;
        // A moving average's own bookkeeping rides along in the same map; the encoder asks for its tensors only.
        let tensors = checkpoint.ema.as_ref().unwrap_or(&checkpoint.parameters);
        let source = folder.display().to_string();
        Self::from_tensors(base, resampler, &checkpoint.config, &source, tensors)
    }

    /// A personalizer from the parameters of a run, by name (`image_proj.*`, `ip_adapter.*`, `kv_encoder.*`).
    ///
    /// # Errors
    /// [`Error::Tensor`] naming `source` where a tensor is missing or misshapen.
    pub fn from_tensors(
        base: Base,
        resampler: &resampler::Config,
        config: &TrainConfig,
        source: &str,
        tensors: &HashMap<String, Tensor>,
    ) -> Result<Self> {
        let converted = tensors
            .iter()
            .filter(|(_, tensor)| tensor.dtype().is_float())
            .map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(base.dtype)?.to_device(&base.device)?.detach())));
        let weights = Weights::frozen(source, converted.collect::<Result<_>>()?);
        let encoder_config = encoder_config(resampler, config);
        let encoder = FaceEncoder::load(&encoder_config, &base.unet, &weights, &weights)?;
        Ok(Personalizer {
            base,
            encoder,
            noisy_encoder_input: config.adapter.noisy_encoder_input,
            encoder_prompt: config.data.instance_prompt.clone(),
        })
    }

    /// The adapter branch alone, from a pretrained IP-Adapter (`image_proj.*`, `ip_adapter.*`).
    ///
    /// # Errors
    /// [`Error::Tensor`] where a tensor is missing or misshapen.
    pub fn from_adapter(base: Base, resampler: &resampler::Config, tensors: HashMap<String, Tensor>) -> Result<Self> {
        let placed =
            tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(base.dtype)?.to_device(&base.device)?)));
        let weights = Weights::frozen("IP-Adapter", placed.collect::<Result<_>>()?);
        let config = FaceEncoderConfig { resampler: resampler.clone(), kv_encoder: None };
        let encoder = FaceEncoder::load(&config, &base.unet, &weights, &weights)?;
        Ok(Self::new(base, encoder))
    }

    /// An encoder in any published form: a folder of this crate's, a checkpoint of a run, an IP-Adapter, or the authors'
    /// released checkpoint.
    ///
    /// # Errors
    /// [`Error::Tensor`] where a tensor is missing or misshapen.
    pub fn from_encoder(base: Base, file: &EncoderFile) -> Result<Self> {
        let placed = |(name, tensor): (&String, &Tensor)| {
            Ok((name.clone(), tensor.to_dtype(base.dtype)?.to_device(&base.device)?.detach()))
        };
        let weights = Weights::frozen("the face encoder", file.tensors.iter().map(placed).collect::<Result<_>>()?);
        let encoder = FaceEncoder::load(&file.config, &base.unet, &weights, &weights)?;
        Ok(Self::new(base, encoder))
    }

    /// The frozen networks.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The options this encoder was trained for: with its KV path, where it has one, and plain guidance where not.
    pub fn default_options(&self) -> Options {
        let (noisy_encoder_input, encoder_prompt) = (self.noisy_encoder_input, self.encoder_prompt.clone());
        let options = Options { noisy_encoder_input, encoder_prompt, ..Options::default() };
        match self.encoder.kv_encoder() {
            Some(_) => options,
            None => Options { guidance: Guidance::Plain { scale: 5.0 }, ..options },
        }
    }

    /// Encodes a photograph: its short side is resized to the base's resolution, and the middle is kept.
    ///
    /// # Errors
    /// Those of the networks.
    pub fn reference(&self, photograph: &RgbImage) -> Result<Reference> {
        let size = u32::try_from(self.base.resolution).unwrap_or(u32::MAX);
        let picture = resize_and_crop(photograph, size, Crop::Center);
        self.reference_from_tensor(&to_tensor(&picture, &self.base.device)?.unsqueeze(0)?)
    }

    /// Encodes photographs given as a tensor `(people, 3, resolution, resolution)`, RGB in [-1, 1].
    ///
    /// # Errors
    /// Those of the networks.
    pub fn reference_from_tensor(&self, image: &Tensor) -> Result<Reference> {
        // Encoded once, at a fixed address: the official pipeline samples the posterior again at every step.
        let latents = self.base.latents(image, Address::new(0, "reference posterior"))?;
        let features = self.base.image_features(image)?;
        let tokens = self.encoder.tokens(&features, &self.base.image_encoder.null_features()?)?;
        Ok(Reference { latents, tokens })
    }

    /// Draws one picture a prompt: all of the reference's person, or, where it holds several photographs, each of the
    /// one in the prompt's place ([`Reference::select`]).
    ///
    /// # Errors
    /// [`Error::Argument`] for a number of steps the sampler cannot take, where [`Options::reference_steps`] or
    /// [`Options::reference_interval`] is 0, or where the reference has neither one photograph nor one for each prompt;
    /// those of the networks.
    pub fn generate(&self, reference: &Reference, prompts: &[String], options: &Options) -> Result<Vec<RgbImage>> {
        let images = self.generate_tensor(reference, prompts, options)?;
        (0..prompts.len()).map(|i| from_tensor(&images.get(i)?)).collect()
    }

    /// The same as a tensor `(prompts, 3, height, width)`, nominally in [-1, 1].
    ///
    /// # Errors
    /// As [`Personalizer::generate`].
    pub fn generate_tensor(&self, reference: &Reference, prompts: &[String], options: &Options) -> Result<Tensor> {
        if prompts.is_empty() {
            return Err(Error::argument("Personalizer::generate", "prompts", "at least one", "none"));
        }
        options.validate()?;
        on_pool(&self.base.device, || self.generate_here(reference, prompts, options))
    }

    fn generate_here(&self, reference: &Reference, prompts: &[String], options: &Options) -> Result<Tensor> {
        let base = &self.base;
        let batch = prompts.len();
        reference.check_count("Personalizer::generate", batch)?;
        let (_, channels, height, width) = reference.latents.dims4()?;
        let noise_address = Address::new(options.seed, "initial noise");
        // The latents stay in f32 between the steps, whatever the networks compute in.
        let (shape, dtype) = ((channels, height, width), ops::wide_dtype(base.dtype));
        let noise = noise_address.normal_batch(batch, shape, dtype, &base.device)?;
        let conditions = self.conditions(reference, prompts, options, noise.clone())?;
        let mut sampler = options.sampler.build(&base.schedule, options.steps)?;
        let mut latents = (noise * sampler.init_noise_sigma())?;
        let timesteps = sampler.timesteps().to_vec();
        let mut references = ReferenceKeyValues::new(&timesteps, conditions.references(), options);
        for (i, timestep) in timesteps.into_iter().enumerate() {
            let input = ops::cast(&sampler.scale_model_input(&latents, i)?, base.dtype)?;
            let reference = references.at(i, |timesteps| self.key_values(&conditions, timesteps, options))?;
            let prediction = self.predict(&conditions, &input, timestep, reference, options)?;
            latents = sampler.step(&ops::widen(&prediction)?, i, &latents, noise_address)?;
        }
        drop(references);
        base.decoder.decode(&ops::cast(&latents, base.dtype)?)
    }

    /// The one-step preview (equation 3) of a picture noised to a timestep, as the lookahead loss sees it with the
    /// LCM-LoRA at full scale.
    ///
    /// `image`: `(1, 3, height, width)` in [-1, 1]; `reference`: of one photograph. Returns an image of the same shape.
    ///
    /// # Errors
    /// [`Error::Argument`] where the reference holds several photographs; those of the networks.
    pub fn preview(
        &self,
        reference: &Reference,
        prompt: &str,
        image: &Tensor,
        timestep: usize,
        options: &Options,
    ) -> Result<Tensor> {
        reference.check_count("Personalizer::preview", 1)?;
        self.previews(reference, &[prompt.to_string()], image, timestep, options)
    }

    /// The same of several pictures, `images` `(prompts, 3, height, width)`, each with its prompt.
    ///
    /// # Errors
    /// [`Error::Argument`] where the reference has neither one photograph nor one for each prompt; those of the networks.
    pub fn previews(
        &self,
        reference: &Reference,
        prompts: &[String],
        images: &Tensor,
        timestep: usize,
        options: &Options,
    ) -> Result<Tensor> {
        let (base, count) = (&self.base, prompts.len());
        reference.check_count("Personalizer::previews", count)?;
        let address = Address::new(options.seed, "preview noise");
        let clean = base.latents(&images.clamp(-1.0, 1.0)?, address)?;
        let noise = address.normal_batch(count, &clean.dims()[1..], base.dtype, &base.device)?;
        let timesteps = vec![timestep; count];
        let latents = base.schedule.add_noise(&clean, &noise, &timesteps)?;
        let lcm = Options { sampler: SamplerKind::Lcm, guidance: Guidance::None, ..options.clone() };
        let conditions = self.conditions(reference, prompts, &lcm, noise)?;
        let key_values = self.key_values(&conditions, &[timestep], &lcm)?;
        let prediction = self.predict(&conditions, &latents, timestep, key_values, &lcm)?;
        let form = PreviewForm::Equation3;
        base.preview_decoder.decode(&preview(&base.schedule, &latents, &prediction, &timesteps, form)?)
    }

    /// All that does not change over the steps, for the branches of the guidance one after the other in one batch.
    fn conditions(
        &self,
        reference: &Reference,
        prompts: &[String],
        options: &Options,
        noise: Tensor,
    ) -> Result<Conditions> {
        let base = &self.base;
        let batch = prompts.len();
        let repeat = |tensor: &Tensor| -> Result<Tensor> {
            let shape = [&[batch], &tensor.dims()[1..]].concat();
            Ok(tensor.broadcast_as(shape)?.contiguous()?)
        };
        let with_reference = options.use_reference && self.encoder.kv_encoder().is_some();
        let branches = options.guidance.branches(with_reference);
        let encoder_prompts = vec![options.encoder_prompt.clone(); batch];
        let [text, prompt] = base.conditionings([prompts, &encoder_prompts])?;
        let no_text = text.without_text()?;
        let texts: Vec<&Conditioning> =
            branches.iter().map(|branch| if branch.conditional { &text } else { &no_text }).collect();
        let (tokens, no_tokens) = (repeat(&reference.tokens.conditional)?, repeat(&reference.tokens.unconditional)?);
        let images: Vec<&Tensor> =
            branches.iter().map(|branch| if branch.conditional { &tokens } else { &no_tokens }).collect();

        let no_prompt = prompt.without_text()?;
        let encoder_texts: Vec<&Conditioning> = branches
            .iter()
            .filter_map(|branch| branch.reference)
            .map(|kind| match kind {
                ReferenceText::Prompt => &prompt,
                ReferenceText::None => &no_prompt,
            })
            .collect();
        Ok(Conditions {
            branches,
            text: Conditioning::cat(&texts)?,
            image: self.encoder.image_tokens(&Tensor::cat(&images, 0)?, options.adapter_scale)?,
            encoder_text: if encoder_texts.is_empty() { None } else { Some(Conditioning::cat(&encoder_texts)?) },
            reference_latents: Tensor::cat(&vec![&repeat(&reference.latents)?; encoder_texts.len().max(1)], 0)?,
            noise: Tensor::cat(&vec![&noise; encoder_texts.len().max(1)], 0)?,
        })
    }

    /// The reference's keys and values at some timesteps, one timestep after the other in the batch: at each those of the
    /// branches that look at it, which are the first ones. `None` where no branch does.
    fn key_values(&self, conditions: &Conditions, timesteps: &[usize], options: &Options) -> Result<Option<KeyValues>> {
        let (Some(kv_encoder), Some(text)) = (self.encoder.kv_encoder(), &conditions.encoder_text) else {
            return Ok(None);
        };
        let (base, count) = (&self.base, timesteps.len());
        let of_each = |tensor: &Tensor| Tensor::cat(&vec![tensor; count], 0);
        let text = Conditioning::cat(&vec![text; count])?;
        let timesteps: Vec<usize> =
            timesteps.iter().flat_map(|timestep| std::iter::repeat_n(*timestep, conditions.references())).collect();
        let latents = of_each(&conditions.reference_latents)?;
        let latents = match options.noisy_encoder_input {
            // The same noise at every step, the one the picture starts from (official pipeline).
            true => base.schedule.add_noise(&latents, &of_each(&conditions.noise)?, &timesteps)?,
            false => latents,
        };
        Ok(Some(kv_encoder.encode(&base.unet, &latents, &timesteps, &text, &Pass::default())?))
    }

    fn predict(
        &self,
        conditions: &Conditions,
        latents: &Tensor,
        timestep: usize,
        reference: Option<KeyValues>,
        options: &Options,
    ) -> Result<Tensor> {
        let base = &self.base;
        let batch = latents.dim(0)?;
        let loras = match options.sampler {
            SamplerKind::Lcm => Loras::one(&base.lcm_lora, 1.0),
            _ => Loras::none(),
        };
        let sees = |branch: &Branch| std::iter::repeat_n(branch.reference.is_some(), batch);
        let pass = Pass {
            loras,
            reference,
            sees_reference: Some(conditions.branches.iter().flat_map(sees).collect()),
            image_tokens: Some(conditions.image.clone()),
            freeu: options.freeu,
            ..Pass::default()
        };
        // One pass for all branches.
        let count = conditions.branches.len();
        let latents = Tensor::cat(&vec![latents; count], 0)?;
        let timesteps = vec![timestep; batch * count];
        let prediction = base.unet.forward(&latents, &timesteps, &conditions.text, &pass)?;
        options.guidance.combine(&prediction.chunk(count, 0)?)
    }
}

/// What does not change over the steps of one call.
struct Conditions {
    branches: &'static [Branch],
    /// Of all branches, one after the other.
    text: Conditioning,
    image: ImageTokens,
    /// Of the branches that look at the reference.
    encoder_text: Option<Conditioning>,
    reference_latents: Tensor,
    noise: Tensor,
}

impl Conditions {
    /// How many samples the KV encoder takes for one step.
    fn references(&self) -> usize {
        self.encoder_text.as_ref().map_or(0, Conditioning::batch)
    }
}

/// The shape of the encoder that a training configuration asks for.
pub(crate) fn encoder_config(resampler: &resampler::Config, config: &TrainConfig) -> FaceEncoderConfig {
    let adapter = &config.adapter;
    FaceEncoderConfig {
        resampler: resampler.clone(),
        kv_encoder: adapter.kv_branch.then(|| KvEncoderConfig {
            encoder_lora_rank: adapter.encoder_lora_rank,
            kv_lora_rank: adapter.kv_lora_rank,
            blocks: adapter.extended_layers.clone(),
        }),
    }
}

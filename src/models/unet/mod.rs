//! SDXL's denoising U-Net (diffusers' `UNet2DConditionModel` with `text_time` conditioning), whose forward pass takes
//! as arguments all that the method varies: LoRA sets with scales, reference keys and values for self-attention, image
//! tokens for cross-attention. One frozen base in memory serves as KV encoder ([`UNet::record`]), denoiser and preview
//! denoiser ([`UNet::forward`] with different [`Pass`]es).

mod config;
mod embeddings;
mod freeu;
mod pass;
mod resnet;
mod stage;
#[cfg(test)]
mod tests;
mod transformer;

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;

pub use config::Config;
pub use freeu::FreeU;
pub use pass::{ImageTokens, KeyValues, Pass, Recording};

use crate::autograd::{differentiates, on_pool, taped};
use crate::nn::{Conv2d, GroupNorm, Weights};
use crate::ops::{Activation, to_channels_first, to_channels_last};
use crate::{Error, Result};
use embeddings::Embeddings;
use stage::{Down, Mid, Run, Up};

/// What the text encoders and the picture's size say.
#[derive(Clone, Debug)]
pub struct Conditioning {
    /// Text embeddings, `(batch, tokens, cross_attention_dim)`.
    pub hidden_states: Tensor,
    /// Pooled text embeddings, `(batch, pooled_dim)`.
    pub pooled: Tensor,
    /// Original height and width, top and left of the crop, target height and width, in pixels, for each sample.
    pub time_ids: Vec<[f64; 6]>,
}

impl Conditioning {
    /// Conditioning for square pictures of this size that were not cropped.
    pub fn square(hidden_states: Tensor, pooled: Tensor, size: usize) -> Self {
        let (size, batch) = (size as f64, pooled.dims().first().copied().unwrap_or(0));
        Conditioning { hidden_states, pooled, time_ids: vec![[size, size, 0.0, 0.0, size, size]; batch] }
    }

    /// How many samples.
    pub fn batch(&self) -> usize {
        self.time_ids.len()
    }

    /// Several conditionings one after the other in the batch.
    ///
    /// # Errors
    /// [`Error::Candle`] where the text embeddings differ in length or width.
    pub fn cat(parts: &[&Conditioning]) -> Result<Self> {
        let hidden_states: Vec<&Tensor> = parts.iter().map(|part| &part.hidden_states).collect();
        let pooled: Vec<&Tensor> = parts.iter().map(|part| &part.pooled).collect();
        Ok(Conditioning {
            hidden_states: Tensor::cat(&hidden_states, 0)?,
            pooled: Tensor::cat(&pooled, 0)?,
            time_ids: parts.iter().flat_map(|part| part.time_ids.iter().copied()).collect(),
        })
    }

    /// The samples `start..start + length` of the batch.
    ///
    /// # Errors
    /// [`Error::Candle`] where the range leaves the batch.
    pub fn narrow(&self, start: usize, length: usize) -> Result<Self> {
        Ok(Conditioning {
            hidden_states: self.hidden_states.narrow(0, start, length)?,
            pooled: self.pooled.narrow(0, start, length)?,
            time_ids: self.time_ids.iter().skip(start).take(length).copied().collect(),
        })
    }

    /// "No text": all embeddings zero (diffusers: `force_zeros_for_empty_prompt`), the sizes kept.
    ///
    /// # Errors
    /// [`Error::Candle`] where memory is out.
    pub fn without_text(&self) -> Result<Self> {
        Ok(Conditioning {
            hidden_states: self.hidden_states.zeros_like()?,
            pooled: self.pooled.zeros_like()?,
            time_ids: self.time_ids.clone(),
        })
    }
}

/// The U-Net. Cheap to clone: clones share the weights.
#[derive(Clone, Debug)]
pub struct UNet {
    config: Config,
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    embeddings: Embeddings,
    conv_in: Conv2d,
    down: Vec<Down>,
    mid: Mid,
    up: Vec<Up>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet {
    /// Loads the U-Net from weights named as diffusers names them.
    ///
    /// # Errors
    /// [`Error::Config`] for a configuration that does not fit together, [`Error::Tensor`] for a missing or misshapen
    /// tensor.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        config.validate()?;
        let weights = &weights.as_root();
        let channels = &config.block_out_channels;
        let levels = channels.len();
        let first = channels[0];
        let down = (0..levels)
            .map(|level| Down::load(config, level, &weights.pp("down_blocks").pp(level)))
            .collect::<Result<_>>()?;
        let up = (0..levels)
            .map(|index| Up::load(config, index, &weights.pp("up_blocks").pp(index)))
            .collect::<Result<_>>()?;
        let inner = Inner {
            embeddings: Embeddings::load(config, weights)?,
            conv_in: Conv2d::load(config.in_channels, first, 3, 1, 1, true, &weights.pp("conv_in"))?,
            down,
            mid: Mid::load(config, &weights.pp("mid_block"))?,
            up,
            conv_norm_out: GroupNorm::load(
                config.norm_num_groups,
                first,
                config.norm_eps,
                &weights.pp("conv_norm_out"),
            )?,
            conv_out: Conv2d::load(first, config.out_channels, 3, 1, 1, true, &weights.pp("conv_out"))?,
        };
        Ok(UNet { config: config.clone(), inner: Arc::new(inner) })
    }

    /// Names and shapes of all tensors of a U-Net of this shape, as its checkpoint holds them. Takes no memory to
    /// speak of.
    ///
    /// # Errors
    /// [`Error::Config`] for a configuration that does not fit together.
    pub fn shapes(config: &Config) -> Result<BTreeMap<String, Vec<usize>>> {
        let weights = Weights::shapes_only();
        UNet::load(config, &weights)?;
        Ok(weights.shapes())
    }

    /// The shape of this U-Net.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The names of all transformer blocks, in the order in which a forward pass runs them.
    pub fn block_names(&self) -> Vec<String> {
        let Inner { down, mid, up, .. } = &*self.inner;
        let transformers = down.iter().flat_map(|stage| &stage.attentions);
        let transformers = transformers.chain(std::iter::once(&mid.attention));
        let transformers = transformers.chain(up.iter().flat_map(|stage| &stage.attentions));
        transformers.flat_map(|transformer| transformer.block_names()).map(str::to_string).collect()
    }

    /// How many tokens each transformer block has for latents of this height and width, in the order of
    /// [`UNet::block_names`].
    pub fn block_tokens(&self, height: usize, width: usize) -> Vec<(String, usize)> {
        let Inner { down, mid, up, .. } = &*self.inner;
        let last = down.len().saturating_sub(1);
        let down =
            down.iter().enumerate().flat_map(|(level, stage)| stage.attentions.iter().map(move |of| (level, of)));
        let up = up.iter().enumerate().flat_map(|(i, stage)| stage.attentions.iter().map(move |of| (last - i, of)));
        let all = down.chain(std::iter::once((last, &mid.attention))).chain(up);
        let tokens = |level: usize| (height >> level) * (width >> level);
        all.flat_map(|(level, transformer)| {
            transformer.block_names().map(move |name| (name.to_string(), tokens(level)))
        })
        .collect()
    }

    /// Predicts the noise.
    ///
    /// `latents`: `(batch, in_channels, height, width)`, height and width divisible by 2^(resolutions - 1);
    /// `timesteps`: one a sample, 0 to 999. Returns `(batch, out_channels, height, width)`.
    ///
    /// # Errors
    /// [`Error::Argument`] where batch sizes or shapes do not fit.
    pub fn forward(
        &self,
        latents: &Tensor,
        timesteps: &[usize],
        conditioning: &Conditioning,
        pass: &Pass,
    ) -> Result<Tensor> {
        let steps = timesteps.to_vec();
        let mut outputs = self.run_pass(latents, conditioning, pass, move |unet, latents, conditioning, pass| {
            Ok(vec![unet.predict(latents, &steps, conditioning, pass)?])
        })?;
        Ok(outputs.swap_remove(0))
    }

    fn predict(
        &self,
        latents: &Tensor,
        timesteps: &[usize],
        conditioning: &Conditioning,
        pass: &Pass,
    ) -> Result<Tensor> {
        let (x, time) = self.start("UNet::forward", latents, timesteps, conditioning, pass)?;
        let mut run = Run::new(&time, conditioning, pass, None, None);
        let hidden = self.run(x, &mut run, true)?;
        // Without a recording a pass runs to its end.
        let Some(hidden) = hidden else {
            return Err(Error::argument("UNet::forward", "pass", "one that runs to its end", "one that stopped early"));
        };
        let hidden = self.inner.conv_norm_out.forward_with(&hidden, Activation::Silu)?;
        let prediction = self.inner.conv_out.forward_adapted(&hidden, &pass.loras)?;
        to_channels_first(&prediction)
    }

    /// Runs the U-Net for the keys and values of its self-attention layers (paper, section 4.3: the KV encoder), and
    /// stops behind the last of them.
    ///
    /// Arguments as for [`UNet::forward`].
    ///
    /// # Errors
    /// [`Error::Argument`] where batch sizes or shapes do not fit, or no block is recorded.
    pub fn record(
        &self,
        latents: &Tensor,
        timesteps: &[usize],
        conditioning: &Conditioning,
        pass: &Pass,
        recording: &Recording,
    ) -> Result<KeyValues> {
        let names = self.block_names();
        let Some(last) = names.iter().rfind(|name| recording.includes(name)) else {
            let found = format!("{:?}, none of which begins a block's name", recording.blocks);
            return Err(Error::argument("UNet::record", "recording.blocks", format!("some of {names:?}"), found));
        };
        let (steps, last) = (timesteps.to_vec(), last.clone());
        let (recording, mut recorded_names) = (recording.clone(), Vec::new());
        recorded_names.extend(names.into_iter().filter(|name| recording.includes(name)));
        let order = recorded_names.clone();
        let recorded = self.run_pass(latents, conditioning, pass, move |unet, latents, conditioning, pass| {
            let (x, time) = unet.start("UNet::record", latents, &steps, conditioning, pass)?;
            let mut run = Run::new(&time, conditioning, pass, Some(&recording), Some(&last));
            unet.run(x, &mut run, false)?;
            let pairs = order.iter().filter_map(|name| run.recorded.get(name));
            Ok(pairs.flat_map(|(key, value)| [key.clone(), value.clone()]).collect())
        })?;
        let (mut key_values, mut recorded) = (KeyValues::default(), recorded.into_iter());
        for (name, (key, value)) in
            recorded_names.into_iter().zip(std::iter::from_fn(|| recorded.next().zip(recorded.next())))
        {
            key_values.insert(name, key, value);
        }
        Ok(key_values)
    }

    /// Runs a pass: on a tape, unless it is recomputed in a graph of candle's, where segments are taped one by one. What may
    /// need a gradient goes in through the tape's inputs.
    fn run_pass<F>(&self, latents: &Tensor, conditioning: &Conditioning, pass: &Pass, run: F) -> Result<Vec<Tensor>>
    where
        F: Fn(&UNet, &Tensor, &Conditioning, &Pass) -> Result<Vec<Tensor>> + Send + Sync + 'static,
    {
        if pass.freeu.is_some() || (pass.recompute && !differentiates()) {
            return on_pool(latents.device(), || run(self, latents, conditioning, pass));
        }
        let image = pass.image_tokens.as_ref().map(|tokens| &tokens.key_values);
        let key_values = pass.reference.iter().chain(image).flat_map(KeyValues::iter);
        let tensors: Vec<&Tensor> = [latents, &conditioning.hidden_states, &conditioning.pooled]
            .into_iter()
            .chain(key_values.flat_map(|(_, (key, value))| [key, value]))
            .collect();
        let (unet, conditioning, pass) = (self.clone(), conditioning.clone(), pass.clone());
        let segment = move |tensors: &[Tensor]| {
            let mut rest = tensors[3..].iter();
            let mut next =
                |key_values: &KeyValues| key_values.map(|_, tensor| Ok(rest.next().unwrap_or(tensor).clone()));
            let mut pass = pass.clone();
            pass.reference = pass.reference.as_ref().map(&mut next).transpose()?;
            if let Some(tokens) = &mut pass.image_tokens {
                tokens.key_values = next(&tokens.key_values)?;
            }
            let (hidden_states, pooled) = (tensors[1].clone(), tensors[2].clone());
            let conditioning = Conditioning { hidden_states, pooled, time_ids: conditioning.time_ids.clone() };
            run(&unet, &tensors[0], &conditioning, &pass)
        };
        on_pool(latents.device(), || taped(&tensors, segment))
    }

    /// Checks the arguments, and computes the first hidden states, channels-last, and the time embedding.
    fn start(
        &self,
        function: &'static str,
        latents: &Tensor,
        timesteps: &[usize],
        conditioning: &Conditioning,
        pass: &Pass,
    ) -> Result<(Tensor, Tensor)> {
        let (batch, channels, height, width) = latents.dims4()?;
        let multiple = 1 << (self.config.block_out_channels.len() - 1);
        if channels != self.config.in_channels || height % multiple != 0 || width % multiple != 0 {
            let expected = format!(
                "(batch, {}, height, width), height and width divisible by {multiple}",
                self.config.in_channels
            );
            return Err(Error::argument(function, "latents", expected, format!("{:?}", latents.dims())));
        }
        if timesteps.len() != batch || conditioning.batch() != batch {
            let found = format!("{} timesteps, {} conditionings", timesteps.len(), conditioning.batch());
            return Err(Error::argument(function, "timesteps", format!("{batch}, one a sample"), found));
        }
        let expected = (batch, self.config.cross_attention_dim, self.config.pooled_dim);
        let text = conditioning.hidden_states.dims3()?;
        let pooled = conditioning.pooled.dims2()?;
        if (text.0, text.2, pooled.1) != expected || pooled.0 != batch {
            return Err(Error::argument(
                function,
                "conditioning",
                format!("text ({}, tokens, {}) and pooled ({}, {})", expected.0, expected.1, expected.0, expected.2),
                format!("text {text:?} and pooled {pooled:?}"),
            ));
        }
        let x = self.inner.conv_in.forward_adapted(&to_channels_last(latents)?, &pass.loras)?;
        let time = self.inner.embeddings.forward(timesteps, conditioning, &pass.loras)?;
        Ok((x, time))
    }

    /// Down, middle, up; `None` where the run ended at the last recorded block.
    fn run(&self, x: Tensor, run: &mut Run<'_>, whole: bool) -> Result<Option<Tensor>> {
        let mut skips = vec![x.clone()];
        let mut x = x;
        for stage in &self.inner.down {
            match stage.forward(x, &mut skips, run)? {
                Some(hidden) => x = hidden,
                None => return Ok(None),
            }
        }
        match self.inner.mid.forward(x, run)? {
            Some(hidden) => x = hidden,
            None => return Ok(None),
        }
        for stage in &self.inner.up {
            match stage.forward(x, &mut skips, run)? {
                Some(hidden) => x = hidden,
                None => return Ok(None),
            }
        }
        Ok(whole.then_some(x))
    }
}

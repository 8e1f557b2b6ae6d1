//! Portraits as the denoiser sees them: encoded once, by the frozen networks.

use std::time::Instant;

use candle_core::{DType, Tensor};
use rand::Rng;

use super::files::load_stages;
use super::pool::Pool;
use super::training::{MicroBatch, Options};
use super::workers::Workers;
use crate::mini::MiniConfig;
use crate::models::clip_text::TextEmbeddings;
use crate::models::clip_vision::ClipVision;
use crate::models::roles::{ImageEncoder, TextEncoder, TokenizedClipText};
use crate::models::taesd::Taesd;
use crate::models::unet::Conditioning;
use crate::random::Address;
use crate::schedule::NoiseSchedule;
use crate::{Result, ops};

/// The networks that encode.
pub(super) struct Encoders {
    pub autoencoder: Taesd,
    pub text: TokenizedClipText,
    pub vision: ClipVision,
}

impl Encoders {
    /// From the stages' files in a folder.
    pub fn load(options: &Options) -> Result<Self> {
        let (weights, config) = (load_stages(options, &["autoencoder", "clip"])?, MiniConfig::mini());
        Ok(Encoders {
            autoencoder: config.load_autoencoder(&weights)?,
            text: config.load_text_encoder(&weights)?,
            vision: config.load_image_encoder(&weights)?,
        })
    }

    /// The conditioning of some prompts.
    pub fn conditioning(&self, prompts: &[String]) -> Result<Conditioning> {
        let text = self.text.encode(prompts)?;
        Ok(Conditioning::square(text.hidden_states.detach(), text.pooled.detach(), MiniConfig::mini().resolution))
    }
}

/// A pool of portraits with latents, text embeddings of both captions, and, where asked for, image features.
pub(super) struct Encoded {
    pub pool: Pool,
    /// `(portraits, 4, 32, 32)`, f32
    latents: Tensor,
    /// Of all compressed, then of all described captions.
    texts: TextEmbeddings,
    /// `(portraits, patches + 1, width)`
    features: Option<Tensor>,
}

/// Which captions a stage trains with.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Captions {
    Compressed,
    Both,
}

/// A noised micro-batch.
pub(super) struct Noised {
    pub portraits: Vec<usize>,
    pub noise: Tensor,
    pub timesteps: Vec<usize>,
    pub noisy: Tensor,
    pub conditioning: Conditioning,
}

impl Encoded {
    /// Draws or reads the pool, and encodes as much of it as a quarter of the time budget lets: the pool of a long run is
    /// too large for a stage that is given little time, or a device that others use too.
    pub fn new(workers: &Workers, options: &Options, encoders: &Encoders, features: bool) -> Result<Self> {
        let pool = Pool::of(options)?;
        let (began, most) = (Instant::now(), options.budget / 4);
        let piece = if options.device.is_cpu() { 8 } else { 256 };
        let encode = |captions: Vec<String>| -> Result<TextEmbeddings> {
            let text = encoders.text.encode(&captions)?;
            Ok(TextEmbeddings { hidden_states: text.hidden_states.detach(), pooled: text.pooled.detach() })
        };
        println!("{} portraits to encode", pool.len());
        let pieces = workers.map(pool.len(), piece, |range| {
            if range.start > 0 && options.start.elapsed() > most {
                return Ok(None);
            }
            let pictures = options.input(&pool.images(&range.clone().collect::<Vec<_>>())?)?;
            let portraits = &pool.portraits[range];
            Ok(Some((
                encoders.autoencoder.encode(&pictures)?.detach().to_dtype(DType::F32)?,
                encode(portraits.iter().map(|portrait| portrait.prompt()).collect())?,
                encode(portraits.iter().map(|portrait| portrait.described_prompt()).collect())?,
                if features { Some(encoders.vision.features(&pictures)?.detach()) } else { None },
            )))
        })?;
        // Pieces are begun in order: those that were encoded are the first ones, but for a last few.
        let pieces: Vec<_> = pieces.into_iter().map_while(|piece| piece).collect();
        let texts = || {
            pieces.iter().map(|(_, compressed, ..)| compressed).chain(pieces.iter().map(|(.., described, _)| described))
        };
        let texts = TextEmbeddings {
            hidden_states: Tensor::cat(&texts().map(|text| &text.hidden_states).collect::<Vec<_>>(), 0)?,
            pooled: Tensor::cat(&texts().map(|text| &text.pooled).collect::<Vec<_>>(), 0)?,
        };
        let latents = Tensor::cat(&pieces.iter().map(|(latents, ..)| latents).collect::<Vec<_>>(), 0)?;
        let all_features: Vec<&Tensor> = pieces.iter().filter_map(|(.., features)| features.as_ref()).collect();
        let features = if features { Some(Tensor::cat(&all_features, 0)?) } else { None };
        let pool = pool.first(latents.dim(0)?);
        println!("{} of them encoded in {:.1} s", pool.len(), began.elapsed().as_secs_f64());
        Ok(Encoded { latents, texts, features, pool })
    }

    /// The latents of some portraits.
    pub fn latents(&self, portraits: &[usize]) -> Result<Tensor> {
        select(&self.latents, portraits)
    }

    /// The image features of some portraits; `None` where the pool was drawn without.
    pub fn features(&self, portraits: &[usize]) -> Result<Option<Tensor>> {
        self.features.as_ref().map(|features| select(features, portraits)).transpose()
    }

    /// Random portraits with their captions, a tenth of them without text.
    pub fn batch(&self, micro: &MicroBatch, captions: Captions) -> Result<(Vec<usize>, Tensor, Conditioning)> {
        let count = self.pool.len();
        let portraits = micro.each("portrait", |address| address.rng().random_range(0..count));
        let described = micro.each("caption", |address| captions == Captions::Both && address.uniform() < 0.5);
        let keep = micro.each("text", |address| if address.uniform() < 0.1 { 0f32 } else { 1.0 });
        let texts: Vec<usize> = portraits
            .iter()
            .zip(described)
            .map(|(portrait, described)| portrait + usize::from(described) * count)
            .collect();
        let (hidden_states, pooled) = (select(&self.texts.hidden_states, &texts)?, select(&self.texts.pooled, &texts)?);
        let keep = Tensor::from_vec(keep, portraits.len(), pooled.device())?.to_dtype(pooled.dtype())?;
        let conditioning = Conditioning::square(
            hidden_states.broadcast_mul(&keep.reshape(((), 1, 1))?)?,
            pooled.broadcast_mul(&keep.reshape(((), 1))?)?,
            MiniConfig::mini().resolution,
        );
        Ok((portraits.clone(), self.latents(&portraits)?, conditioning))
    }

    /// Random portraits, noised to random timesteps.
    pub fn noised(&self, micro: &MicroBatch, schedule: &NoiseSchedule, captions: Captions) -> Result<Noised> {
        let (portraits, latents, conditioning) = self.batch(micro, captions)?;
        let count = schedule.timestep_count();
        let timesteps = micro.each("timestep", |address: Address| address.rng().random_range(0..count));
        let noise = micro.noise("noise", &latents.dims()[1..])?;
        let noisy = schedule.add_noise(&latents, &noise, &timesteps)?;
        Ok(Noised { portraits, noise, timesteps, noisy, conditioning })
    }
}

fn select(tensor: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
    let count = rows.len();
    Ok(tensor.index_select(&Tensor::from_vec(rows, count, tensor.device())?, 0)?)
}

/// The mean squared error of a noise prediction, each sample weighted by min(SNR, 5) / SNR (Hang et al. 2023), which
/// turns the effort to the timesteps that decide what the picture shows.
pub(super) fn noise_loss(prediction: &Tensor, batch: &Noised, schedule: &NoiseSchedule) -> Result<Tensor> {
    let errors = (ops::cast(prediction, DType::F32)? - &batch.noise)?.sqr()?.mean((1, 2, 3))?;
    let weights = batch.timesteps.iter().map(|t| {
        let snr = schedule.sigma(*t)?.powi(-2);
        Ok((snr.min(5.0) / snr) as f32)
    });
    let weights = Tensor::from_vec(weights.collect::<Result<Vec<f32>>>()?, batch.timesteps.len(), errors.device())?;
    Ok((errors * weights)?.mean_all()?)
}

//! The frozen networks from their files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};

use super::SdxlFiles;
use super::faces::{AnyTypeIdentity, AnyTypeLocator, face_dtype};
use crate::formats::diffusers::{
    Folder, JsonConfig, autoencoder_kl_config, clip_text_config, clip_vision_config, noise_schedule,
    tiny_autoencoder_config, unet_config,
};
use crate::formats::faces;
use crate::formats::lora::LoraFile;
use crate::lookahead::Base;
use crate::models::OnDemand;
use crate::models::autoencoder_kl::AutoencoderKl;
use crate::models::clip_text::ClipText;
use crate::models::clip_vision::ClipVision;
use crate::models::roles::{ImageEncoder, LatentEncoder, TextEncoder, TokenizedClipText};
use crate::models::sdxl_text::SdxlText;
use crate::models::taesd::Taesd;
use crate::models::tokenizer::PromptTokenizer;
use crate::models::unet::UNet;
use crate::nn::Weights;
use crate::schedule::NoiseSchedule;
use crate::{Error, Result};

/// Tokens after the end of a prompt, of the first and of the second text encoder.
const PADDING: [&str; 2] = ["<|endoftext|>", "!"];
/// Largest height and width of pictures that makes sense.
const MOST_PIXELS: usize = 1 << 13;

impl Base {
    /// SDXL and the networks around it from their published files, all in `dtype`, on `device`. The face networks are in
    /// f32 where the base is in half precision; they take pictures of any type.
    ///
    /// Each component's configuration is read, and its file compared with it tensor by tensor, before any weight is;
    /// weights are read one at a time. Small files come first, so that most of what can be wrong is found early.
    ///
    /// # Errors
    /// [`Error::Argument`] for a type in which the device cannot compute; [`Error::Config`] naming file and field where a
    /// configuration is not supported or components do not fit together; [`Error::Tensor`] where a file lacks a tensor,
    /// or has one too many or of another shape; [`Error::Format`] and [`Error::Io`] where a file cannot be read.
    pub fn sdxl(files: &SdxlFiles, dtype: DType, device: &Device) -> Result<Base> {
        Self::assemble(files, dtype, device, false)
    }

    /// The same with the encoders of text and images [on demand](OnDemand): opened from their files whenever they are
    /// used, and let go of afterwards. For drawing where memory is short: it takes 2.9 GB less in half precision, and
    /// some tenths of a second longer a call. Not for training, which uses them in every step.
    ///
    /// # Errors
    /// As [`Base::sdxl`]; those of files that change afterwards come when the encoders are used.
    pub fn sdxl_lean(files: &SdxlFiles, dtype: DType, device: &Device) -> Result<Base> {
        Self::assemble(files, dtype, device, true)
    }

    fn assemble(files: &SdxlFiles, dtype: DType, device: &Device, lean: bool) -> Result<Base> {
        let supported: &[DType] = match device {
            Device::Cpu => &[DType::F32, DType::F64],
            _ => &[DType::F32, DType::F64, DType::BF16, DType::F16],
        };
        if !supported.contains(&dtype) {
            let found = format!("{dtype:?}");
            return Err(Error::argument("Base::sdxl", "dtype", format!("one of {supported:?} on this device"), found));
        }
        let place = Place { dtype, device: device.clone() };
        let schedule = match &files.scheduler {
            Some(folder) => noise_schedule(&JsonConfig::read(folder.join("scheduler_config.json"))?)?,
            None => NoiseSchedule::sdxl(),
        };
        let faces_in = face_dtype(dtype);
        let identity_network = faces::identity_network(&files.identity_network, faces_in, device)?;
        let face_locator = faces::yunet(&files.face_locator, faces_in, device)?;
        let preview_decoder = place.component(&files.preview_decoder, tiny_autoencoder_config, Taesd::load)?;
        let autoencoder = Arc::new(place.component(&files.autoencoder, autoencoder_kl_config, AutoencoderKl::load)?);
        let text_encoder = place.text_encoder(files)?;
        // The LoRA fits or does not by the U-Net's configuration alone.
        let json = Folder::open(&files.unet, None)?.config()?;
        let config = unet_config(&json)?;
        let resolution = resolution(files, &json, autoencoder.factor())?;
        let fits = [
            ("cross_attention_dim", config.cross_attention_dim, text_width(&text_encoder), "the text encoders"),
            (
                "projection_class_embeddings_input_dim",
                config.pooled_dim,
                pooled_width(&text_encoder),
                "the second text encoder (its pooled embedding)",
            ),
            ("in_channels", config.in_channels, autoencoder.config().latent_channels, "the autoencoder"),
            ("in_channels", config.in_channels, preview_decoder.config().latent_channels, "the preview decoder"),
        ];
        for (field, asked, given, by) in fits {
            if asked != given {
                return Err(
                    json.fault(field, format!("a value that asks for what comes from {by}, {given} and not {asked}"))
                );
            }
        }
        if LatentEncoder::factor(&preview_decoder) != autoencoder.factor() {
            let found = LatentEncoder::factor(&preview_decoder).to_string();
            let expected = format!("one of the autoencoder's factor, {}", autoencoder.factor());
            return Err(Error::argument("Base::sdxl", "preview_decoder", expected, found));
        }
        let image_encoder: Arc<dyn ImageEncoder> = match lean {
            false => Arc::new(place.component(&files.image_encoder, clip_vision_config, ClipVision::load)?),
            true => {
                place.opened(&files.image_encoder, clip_vision_config, ClipVision::load)?;
                let (place, folder) = (place.clone(), files.image_encoder.clone());
                Arc::new(OnDemand::new(move || place.component(&folder, clip_vision_config, ClipVision::load)))
            }
        };
        let text_encoder: Arc<dyn TextEncoder> = match lean {
            false => Arc::new(text_encoder),
            true => {
                drop(text_encoder);
                let (place, files) = (place.clone(), files.clone());
                Arc::new(OnDemand::new(move || place.text_encoder(&files)))
            }
        };
        let lcm_lora = LoraFile::open(&files.lcm_lora, &config)?.to_set(dtype, device)?;
        Ok(Base {
            unet: place.component(&files.unet, unet_config, UNet::load)?,
            lcm_lora,
            schedule,
            encoder: autoencoder.clone(),
            decoder: autoencoder,
            preview_decoder: Arc::new(preview_decoder),
            text_encoder,
            image_encoder,
            identity_network: Arc::new(AnyTypeIdentity { network: identity_network, dtype: faces_in }),
            face_locator: Arc::new(AnyTypeLocator { locator: face_locator, dtype: faces_in }),
            resolution,
            dtype,
            device: device.clone(),
        })
    }
}

fn text_width(text: &SdxlText) -> usize {
    text.first.network.config().hidden_size + text.second.network.config().hidden_size
}

fn pooled_width(text: &SdxlText) -> usize {
    let config = text.second.network.config();
    config.projection_dim.unwrap_or(config.hidden_size)
}

/// What the user says, or what the U-Net was made for.
fn resolution(files: &SdxlFiles, unet: &JsonConfig, factor: usize) -> Result<usize> {
    let resolution = match files.resolution {
        Some(resolution) => resolution,
        None => unet.count_or("sample_size", 128)?.saturating_mul(factor),
    };
    let levels = unet.length("block_out_channels")?;
    // Every level but the first halves the latents.
    let multiple = factor << (levels - 1);
    if resolution == 0 || resolution > MOST_PIXELS || !resolution.is_multiple_of(multiple) {
        let expected = format!("a multiple of {multiple} up to {MOST_PIXELS}");
        return Err(Error::argument("Base::sdxl", "resolution", expected, resolution.to_string()));
    }
    Ok(resolution)
}

/// Where networks are to be, and in which type.
#[derive(Clone)]
struct Place {
    dtype: DType,
    device: Device,
}

impl Place {
    /// A network from its component's folder.
    fn component<C, N>(
        &self,
        folder: &Path,
        config: impl Fn(&JsonConfig) -> Result<C>,
        load: impl Fn(&C, &Weights) -> Result<N>,
    ) -> Result<N> {
        let (config, weights) = self.opened(folder, config, &load)?;
        load(&config, &weights)
    }

    /// The configuration of a network and its weights, which fit each other and of which none is read yet.
    fn opened<C, N>(
        &self,
        folder: &Path,
        config: impl Fn(&JsonConfig) -> Result<C>,
        load: impl Fn(&C, &Weights) -> Result<N>,
    ) -> Result<(C, Weights)> {
        let folder = Folder::open(folder, None)?;
        let config = config(&folder.config()?)?;
        let asked = Weights::shapes_only();
        load(&config, &asked)?;
        let weights = folder.weights(&asked.shapes(), self.dtype, &self.device)?;
        Ok((config, weights))
    }

    fn text_encoder(&self, files: &SdxlFiles) -> Result<SdxlText> {
        let one = |i: usize| -> Result<TokenizedClipText> {
            let network = self.component(&files.text_encoders[i], clip_text_config, ClipText::load)?;
            let tokenizer = tokenizer(&files.tokenizers[i], PADDING[i])?;
            let (words, room) = (tokenizer.vocabulary_size(), network.config().vocab_size);
            if words > room || tokenizer.length() > network.config().max_position_embeddings {
                let found = format!("{words} tokens in {}", files.tokenizers[i].display());
                let expected = format!("at most {room}, as {}", files.text_encoders[i].display());
                return Err(Error::argument("Base::sdxl", "tokenizers", expected, found));
            }
            Ok(TokenizedClipText { tokenizer, network })
        };
        Ok(SdxlText { first: one(0)?, second: one(1)? })
    }
}

/// A tokenizer in either of the forms in which it is published.
fn tokenizer(folder: &Path, padding: &str) -> Result<PromptTokenizer> {
    let [vocab, merges, json]: [PathBuf; 3] =
        ["vocab.json", "merges.txt", "tokenizer.json"].map(|name| folder.join(name));
    match !vocab.is_file() && json.is_file() {
        true => PromptTokenizer::clip_from_json(json, padding),
        false => PromptTokenizer::clip(vocab, merges, padding),
    }
}

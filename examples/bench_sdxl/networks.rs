//! All networks of the method at SDXL's size, with random weights.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use lcm_lookahead::face::Landmarks;
use lcm_lookahead::lookahead::{FaceEncoderConfig, KvEncoderConfig};
use lcm_lookahead::models::autoencoder_kl::{self, AutoencoderKl};
use lcm_lookahead::models::clip_text::{self, ClipText, TextEmbeddings};
use lcm_lookahead::models::clip_vision::{self, ClipVision};
use lcm_lookahead::models::face_locator::FaceLocator;
use lcm_lookahead::models::ir_resnet::{self, IrResnet};
use lcm_lookahead::models::resampler;
use lcm_lookahead::models::roles::TextEncoder;
use lcm_lookahead::models::taesd::{self, Taesd};
use lcm_lookahead::models::unet::Config;
use lcm_lookahead::nn::{Parameters, Weights};
use lcm_lookahead::{Base, FaceEncoder, LoraSet, NoiseSchedule, Result, UNet};

/// Rank of the published LCM-LoRA.
const LCM_RANK: usize = 64;
/// Pixels of the pictures.
pub const RESOLUTION: usize = 1024;

/// SDXL's U-Net.
pub fn unet(device: &Device) -> Result<UNet> {
    UNet::load(&Config::sdxl(), &Weights::random(DType::BF16, device))
}

/// Both text encoders on one sequence of token ids: random weights need no words.
pub struct RandomText {
    pub first: ClipText,
    pub second: ClipText,
}

impl TextEncoder for RandomText {
    fn encode(&self, prompts: &[String]) -> Result<TextEmbeddings> {
        let ids: Vec<u32> = (0..77).map(|i| if i < 12 { 320 + i } else { 49407 }).collect();
        let ids = Tensor::from_vec(ids.repeat(prompts.len()), (prompts.len(), 77), &Device::Cpu)?;
        let (first, second) = (self.first.forward(&ids)?, self.second.forward(&ids)?);
        Ok(TextEmbeddings {
            hidden_states: Tensor::cat(&[&first.hidden_states, &second.hidden_states], 2)?,
            pooled: second.pooled,
        })
    }

    // As SDXL's own encoders do.
    fn encode_batches(&self, batches: &[&[String]]) -> Result<Vec<TextEmbeddings>> {
        self.encode(&batches.concat())?.split(batches)
    }
}

/// A face in the middle of every picture: random pixels have none.
struct CentredFace;

impl FaceLocator for CentredFace {
    fn locate(&self, images: &Tensor) -> Result<Vec<Option<Landmarks>>> {
        let (batch, _, height, width) = images.dims4()?;
        let at = |x: f64, y: f64| [x * width as f64, y * height as f64];
        let face = [at(0.4, 0.42), at(0.6, 0.42), at(0.5, 0.52), at(0.42, 0.62), at(0.58, 0.62)];
        Ok(vec![Some(face); batch])
    }
}

/// The frozen networks around the U-Net.
pub struct Around {
    pub autoencoder: Arc<AutoencoderKl>,
    pub preview_decoder: Arc<Taesd>,
    pub text_encoder: Arc<dyn TextEncoder>,
    pub image_encoder: Arc<ClipVision>,
    pub identity_network: Arc<IrResnet>,
    pub face_locator: Arc<dyn FaceLocator>,
}

impl Around {
    /// All of them on the GPU in bf16.
    pub fn new(device: &Device) -> Result<Self> {
        let weights = Weights::random(DType::BF16, device);
        Ok(Around {
            autoencoder: Arc::new(AutoencoderKl::load(&autoencoder_kl::Config::sdxl(), &weights)?),
            preview_decoder: Arc::new(Taesd::load(&taesd::Config::taesdxl(), &weights)?),
            text_encoder: Arc::new(RandomText {
                first: ClipText::load(&clip_text::Config::clip_l(), &weights)?,
                second: ClipText::load(&clip_text::Config::open_clip_big_g(), &weights)?,
            }),
            image_encoder: Arc::new(ClipVision::load(&clip_vision::Config::vit_h_14(), &weights)?),
            identity_network: Arc::new(IrResnet::load(&ir_resnet::Config::ir_se_50(), &weights)?),
            face_locator: Arc::new(CentredFace),
        })
    }
}

/// The frozen networks of the official recipe, all on the GPU in bf16.
pub fn base(device: &Device) -> Result<Base> {
    let weights = Weights::random(DType::BF16, device);
    let unet = unet(device)?;
    let layers: BTreeMap<String, Vec<usize>> = UNet::shapes(unet.config())?
        .into_iter()
        .filter(|(name, shape)| name.contains("block") && shape.len() > 1)
        .filter_map(|(name, shape)| Some((name.strip_suffix(".weight")?.to_string(), shape)))
        .collect();
    let around = Around::new(device)?;
    Ok(Base {
        lcm_lora: LoraSet::load(&layers, LCM_RANK, &weights)?,
        unet,
        schedule: NoiseSchedule::sdxl(),
        encoder: around.autoencoder.clone(),
        decoder: around.autoencoder,
        preview_decoder: around.preview_decoder,
        text_encoder: around.text_encoder,
        image_encoder: around.image_encoder,
        identity_network: around.identity_network,
        face_locator: around.face_locator,
        resolution: RESOLUTION,
        dtype: DType::BF16,
        device: device.clone(),
    })
}

/// The shape of the official recipe's encoder.
pub fn encoder_config() -> FaceEncoderConfig {
    let resampler = resampler::Config::ip_adapter_plus_sdxl();
    FaceEncoderConfig { resampler, kv_encoder: Some(KvEncoderConfig::default()) }
}

/// The encoder in training, of f32 variables.
pub fn trainable_encoder(unet: &UNet, device: &Device) -> Result<(FaceEncoder, Parameters)> {
    let config = encoder_config();
    let shapes = Weights::shapes_only();
    FaceEncoder::load(&config, unet, &shapes, &shapes)?;
    let parameters = Parameters::new();
    for (name, shape) in shapes.shapes() {
        // Drawn on the GPU; small, but for nothing to be zero that a gradient has to pass.
        parameters.insert(&name, Var::from_tensor(&Tensor::randn(0f32, 0.02, shape, device)?)?);
    }
    let weights = Weights::trainable(&parameters, 0, DType::F32, device);
    Ok((FaceEncoder::load(&config, unet, &weights, &weights)?, parameters))
}

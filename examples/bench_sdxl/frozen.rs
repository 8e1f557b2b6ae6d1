//! The networks around the U-Net, each by itself.

use candle_core::{DType, Tensor, Var};
use lcm_lookahead::models::roles::{ImageEncoder, LatentDecoder, LatentEncoder};
use lcm_lookahead::random::Address;
use lcm_lookahead::{IdentityLoss, ImageLoss, Result, cuda};

use crate::measure::Report;
use crate::networks::{Around, RESOLUTION};

/// Floating-point operations for one picture of 1024 pixels: convolutions, and attention of the middle block.
const ENCODER: f64 = 4.88e12;
const DECODER: f64 = 10.47e12;
/// Operations of the preview decoder, forward.
const PREVIEW: f64 = 0.565e12;
/// Operations of the vision transformer for a picture, and of both text encoders for a prompt.
const VISION: f64 = 0.33e12;
const TEXT: f64 = 0.127e12;

/// Which network a profiler is to look at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Network {
    Encoder,
    Preview,
    Identity,
}

/// The networks, and what they are given.
struct Frozen {
    around: Around,
    pictures: Tensor,
    latents: Tensor,
}

impl Frozen {
    fn new(report: &Report, batch: usize) -> Result<Self> {
        let pictures = Tensor::rand(-1f32, 1.0, (batch, 3, RESOLUTION, RESOLUTION), &report.device)?;
        let side = RESOLUTION / 8;
        Ok(Frozen {
            around: Around::new(&report.device)?,
            pictures: pictures.to_dtype(DType::BF16)?,
            latents: Tensor::randn(0f32, 1.0, (batch, 4, side, side), &report.device)?.to_dtype(DType::BF16)?,
        })
    }

    fn encode(&self) -> Result<()> {
        self.around.autoencoder.encode(&self.pictures, Address::new(0, "posterior")).map(|_| ())
    }

    fn decode(&self) -> Result<()> {
        self.around.autoencoder.decode(&self.latents).map(|_| ())
    }

    fn preview(&self, gradient: bool) -> Result<()> {
        if !gradient {
            return self.around.preview_decoder.decode(&self.latents).map(|_| ());
        }
        let latents = Var::from_tensor(&self.latents)?;
        let images = self.around.preview_decoder.decode(latents.as_tensor())?;
        images.backward().map(|_| ()).map_err(Into::into)
    }

    fn identity(&self) -> Result<()> {
        let loss = IdentityLoss::new(self.around.identity_network.clone(), self.around.face_locator.clone());
        let previews = Var::from_tensor(&self.pictures)?;
        loss.loss(previews.as_tensor(), &self.pictures)?.loss.backward()?;
        Ok(())
    }
}

pub fn measure(report: &Report, batches: &[usize]) -> Result<()> {
    for &batch in batches {
        let frozen = Frozen::new(report, batch)?;
        let name = |what: &str| format!("{what} B{batch}");
        let count = batch as f64;
        report.line(&name("VAE encoder"), count * ENCODER, 5, || frozen.encode())?;
        report.line(&name("VAE decoder"), count * DECODER, 5, || frozen.decode())?;
        let images = || frozen.around.image_encoder.features(&frozen.pictures).map(|_| ());
        report.line(&name("image encoder"), count * VISION, 5, images)?;
        let prompts = vec![String::new(); batch];
        report.line(&name("text encoders"), count * TEXT, 5, || {
            frozen.around.text_encoder.encode(&prompts).map(|_| ())
        })?;
        report.line(&name("preview decoder, forward"), count * PREVIEW, 5, || frozen.preview(false))?;
        report
            .line(&name("preview decoder, forward and backward"), 3.0 * count * PREVIEW, 5, || frozen.preview(true))?;
        report.line(&name("identity loss, forward and backward"), 0.0, 5, || frozen.identity())?;
    }
    Ok(())
}

/// One pass of a network for a profiler that waits for `cudaProfilerStart`.
pub fn profile(report: &Report, network: Network, batch: usize) -> Result<()> {
    let frozen = Frozen::new(report, batch)?;
    let run = || match network {
        Network::Encoder => frozen.encode(),
        Network::Preview => frozen.preview(true),
        Network::Identity => frozen.identity(),
    };
    run()?;
    cuda::profiled(&report.device, run)
}

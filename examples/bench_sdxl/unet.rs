//! Forward passes of the full-size U-Net.

use candle_core::{DType, Device, Tensor};
use lcm_lookahead::{Conditioning, Pass, Result, cuda};

use crate::measure::Report;

/// Floating-point operations of one forward pass of one sample at 1024 pixels.
pub const FORWARD: f64 = 5.98e12;

/// Random latents, and conditioning, of a batch at 1024 pixels.
pub fn random_inputs(batch: usize, device: &Device) -> Result<(Tensor, Conditioning)> {
    let random =
        |shape: &[usize]| -> Result<Tensor> { Ok(Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(DType::BF16)?) };
    let conditioning = Conditioning::square(random(&[batch, 77, 2048])?, random(&[batch, 1280])?, 1024);
    Ok((random(&[batch, 4, 128, 128])?, conditioning))
}

/// One forward pass for a profiler that waits for `cudaProfilerStart` (`ncu --profile-from-start off`).
pub fn profile(report: &Report, batch: usize) -> Result<()> {
    let unet = crate::networks::unet(&report.device)?;
    let (latents, conditioning) = random_inputs(batch, &report.device)?;
    let timesteps = vec![500; batch];
    let run = || unet.forward(&latents, &timesteps, &conditioning, &Pass::default()).map(|_| ());
    run()?;
    cuda::profiled(&report.device, run)
}

pub fn measure(report: &mut Report) -> Result<()> {
    let unet = crate::networks::unet(&report.device)?;
    for batch in [1, 2, 4] {
        let (latents, conditioning) = random_inputs(batch, &report.device)?;
        let timesteps = vec![500; batch];
        let work = FORWARD * batch as f64;
        report.line(&format!("U-Net forward B{batch}"), work, 10, || {
            unet.forward(&latents, &timesteps, &conditioning, &Pass::default()).map(|_| ())
        })?;
    }
    Ok(())
}

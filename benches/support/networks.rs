//! The networks that the benchmarks run: the miniature on the CPU, SDXL with random weights on the GPU.

use candle_core::Device;
use lcm_lookahead::train::AdapterInit;
use lcm_lookahead::{Base, Result};

#[cfg(feature = "cuda")]
#[path = "../../examples/bench_sdxl/networks.rs"]
#[allow(dead_code, reason = "the benchmarks need not all of it")]
mod sdxl;

/// Height and width of the pictures.
#[cfg(feature = "cuda")]
pub const RESOLUTION: usize = sdxl::RESOLUTION;
/// Height and width of the pictures.
#[cfg(not(feature = "cuda"))]
pub const RESOLUTION: usize = lcm_lookahead::mini::RESOLUTION;

/// The frozen networks.
pub fn base(device: &Device) -> Result<Base> {
    #[cfg(feature = "cuda")]
    return sdxl::base(device);
    #[cfg(not(feature = "cuda"))]
    lcm_lookahead::mini::base(super::DTYPE, device)
}

/// The IP-Adapter that training starts from.
#[cfg(feature = "cuda")]
pub fn adapter(base: &Base) -> Result<AdapterInit> {
    let (_, parameters) = sdxl::trainable_encoder(&base.unet, &base.device)?;
    let adapter = parameters.filter(lcm_lookahead::FaceEncoder::is_adapter_parameter);
    let tensors = adapter.all().iter().map(|(name, variable)| (name.clone(), variable.as_detached_tensor())).collect();
    Ok(AdapterInit { resampler: sdxl::encoder_config().resampler, tensors })
}

/// The IP-Adapter that training starts from.
#[cfg(not(feature = "cuda"))]
pub fn adapter(_: &Base) -> Result<AdapterInit> {
    use lcm_lookahead::mini;
    Ok(AdapterInit { resampler: mini::face_encoder_config().resampler, tensors: mini::adapter_tensors()? })
}

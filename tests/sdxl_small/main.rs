//! SDXL from files in the layout in which they are published, at tiny sizes: what a user with the published files runs.

#[path = "../common/mod.rs"]
mod common;
mod drawing;
mod encoders;
mod examples;
mod finding;
mod layout;
mod server;

use anyhow::Result;
use candle_core::{DType, Device};
use layout::Layout;
use lcm_lookahead::Base;
use lcm_lookahead::sdxl::SdxlFiles;

/// The tiny SDXL and its files.
fn base(layout: &Layout, dtype: DType) -> Result<(Base, SdxlFiles)> {
    let files = SdxlFiles::find(&layout.hub()?, &layout.choice())?;
    Ok((Base::sdxl(&files, dtype, &Device::Cpu)?, files))
}

/// `||a - b|| / ||b||`.
fn relative_error(a: &candle_core::Tensor, b: &candle_core::Tensor) -> Result<f64> {
    let norm = |x: &candle_core::Tensor| -> Result<f64> { Ok(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
    Ok(norm(&(a - &b)?)? / norm(&b)?)
}

//! Drawing one picture of a person, start to end.

use std::path::Path;

use candle_core::{DType, Tensor};
use lcm_lookahead::nn::Weights;
use lcm_lookahead::personalize::Options;
use lcm_lookahead::{Base, FaceEncoder, Personalizer, Result};

use crate::measure::Report;
use crate::networks::{RESOLUTION, base, encoder_config};
use crate::opening::lean;

/// With all networks on the GPU.
pub fn measure(report: &Report) -> Result<()> {
    draw(report, base(&report.device)?, "")
}

/// With the encoders of text and images on demand, from files in a folder.
pub fn measure_lean(report: &Report, folder: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in(folder)?;
    Ok(draw(report, lean(&report.device, folder.path())?, ", encoders on demand")?)
}

fn draw(report: &Report, base: Base, how: &str) -> Result<()> {
    let device = report.device.clone();
    let weights = Weights::random(DType::BF16, &device);
    let encoder = FaceEncoder::load(&encoder_config(), &base.unet, &weights, &weights)?;
    let personalizer = Personalizer::new(base, encoder);
    let photograph = Tensor::rand(-1f32, 1.0, (1, 3, RESOLUTION, RESOLUTION), &device)?.to_dtype(DType::BF16)?;
    report.line(&format!("encode the photograph{how}"), 0.0, 3, || {
        personalizer.reference_from_tensor(&photograph).map(|_| ())
    })?;
    let reference = personalizer.reference_from_tensor(&photograph)?;
    let prompts = ["an oil painting of a face".to_string()];
    for (what, options, repeats) in [
        ("personalise one picture, 50 steps, three-term guidance", Options::default(), 1),
        ("personalise one picture, 4 steps of LCM", Options::lcm(), 3),
    ] {
        let what = format!("{what}{how}");
        report
            .line(&what, 0.0, repeats, || personalizer.generate_tensor(&reference, &prompts, &options).map(|_| ()))?;
    }
    Ok(())
}

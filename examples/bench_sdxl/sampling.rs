//! Drawing one picture of a person, start to end.

use candle_core::{DType, Tensor};
use lcm_lookahead::nn::Weights;
use lcm_lookahead::personalize::Options;
use lcm_lookahead::{FaceEncoder, Personalizer, Result};

use crate::measure::Report;
use crate::networks::{RESOLUTION, base, encoder_config};

pub fn measure(report: &mut Report) -> Result<()> {
    let device = report.device.clone();
    let base = base(&device)?;
    let weights = Weights::random(DType::BF16, &device);
    let encoder = FaceEncoder::load(&encoder_config(), &base.unet, &weights, &weights)?;
    let personalizer = Personalizer::new(base, encoder);
    let photograph = Tensor::rand(-1f32, 1.0, (1, 3, RESOLUTION, RESOLUTION), &device)?.to_dtype(DType::BF16)?;
    let reference = personalizer.reference_from_tensor(&photograph)?;
    let prompts = ["an oil painting of a face".to_string()];
    for (what, options, repeats) in [
        ("personalise one picture, 50 steps, three-term guidance", Options::default(), 1),
        ("personalise one picture, 4 steps of LCM", Options::lcm(), 3),
    ] {
        report.line(what, 0.0, repeats, || personalizer.generate_tensor(&reference, &prompts, &options).map(|_| ()))?;
    }
    Ok(())
}

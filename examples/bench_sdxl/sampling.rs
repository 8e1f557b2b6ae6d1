//! Drawing one picture of a person, start to end.

use std::path::Path;

use candle_core::{DType, Tensor};
use lcm_lookahead::nn::Weights;
use lcm_lookahead::personalize::Options;
use lcm_lookahead::{Base, FaceEncoder, Personalizer, Result};

use crate::measure::Report;
use crate::networks::{RESOLUTION, base, encoder_config};
use crate::opening::lean;

/// The values of `Options::reference_steps` and `Options::reference_interval` that are measured.
pub struct References {
    pub steps: Vec<usize>,
    pub intervals: Vec<usize>,
}

/// With all networks on the GPU.
pub fn measure(report: &Report, references: &References) -> Result<()> {
    draw(report, base(&report.device)?, "", references)
}

/// With the encoders of text and images on demand, from files in a folder.
pub fn measure_lean(report: &Report, folder: &Path, references: &References) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in(folder)?;
    Ok(draw(report, lean(&report.device, folder.path())?, ", encoders on demand", references)?)
}

fn draw(report: &Report, base: Base, how: &str, references: &References) -> Result<()> {
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
        let (steps, intervals) = (&references.steps, &references.intervals);
        for (reference_steps, reference_interval) in
            intervals.iter().flat_map(|interval| steps.iter().map(|steps| (*steps, *interval)))
        {
            let what = format!("{what}{how}, reference steps {reference_steps}, interval {reference_interval}");
            let options = Options { reference_steps, reference_interval, ..options.clone() };
            let draw = || personalizer.generate_tensor(&reference, &prompts, &options).map(|_| ());
            report.line(&what, 0.0, repeats, draw)?;
        }
    }
    Ok(())
}

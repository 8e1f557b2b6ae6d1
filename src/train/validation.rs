//! Validation pictures: what the encoder makes of a few references, as a contact sheet.

use candle_core::{Device, Tensor};
use image::RgbImage;

use super::config::ValidationConfig;
use super::{ContactSheet, TrainConfig};
use crate::Result;
use crate::data::{Crop, FaceDataset, from_tensor, load_image, resize_and_crop, to_tensor};
use crate::personalize::Personalizer;

/// The timesteps whose one-step previews are shown.
const PREVIEW_TIMESTEPS: [usize; 3] = [799, 599, 299];

/// The references and prompts of a run's validation, chosen once.
pub(super) struct Validation {
    references: Vec<RgbImage>,
    prompts: Vec<String>,
    steps: usize,
    seed: u64,
}

impl Validation {
    /// Loads the references: the files of the configuration, or the first pictures of the data set.
    ///
    /// # Errors
    /// [`crate::Error::Image`] or [`crate::Error::Io`] naming a file that cannot be read.
    pub fn new(config: &ValidationConfig, dataset: &FaceDataset, seed: u64, resolution: usize) -> Result<Self> {
        let mut references = Vec::new();
        if config.every_n_steps > 0 {
            let size = u32::try_from(resolution).unwrap_or(u32::MAX);
            match config.images.is_empty() {
                false => {
                    for path in &config.images {
                        references.push(resize_and_crop(&load_image(path)?, size, Crop::Center));
                    }
                }
                true => {
                    let batch = dataset.batch(seed, 0, 0, 1, config.num_images, &Device::Cpu)?;
                    for i in 0..config.num_images {
                        references.push(from_tensor(&batch.encoder_pixel_values.get(i)?)?);
                    }
                }
            }
        }
        Ok(Validation { references, prompts: config.prompts.clone(), steps: config.num_inference_steps, seed })
    }

    /// One row for each reference and prompt: reference, previews at three timesteps, sample.
    ///
    /// # Errors
    /// Those of the networks.
    pub fn sheet(&self, personalizer: &Personalizer, config: &TrainConfig) -> Result<RgbImage> {
        let size = u32::try_from(personalizer.base().resolution).unwrap_or(u32::MAX);
        let mut sheet = ContactSheet::new(size, size);
        let options = crate::personalize::Options {
            seed: self.seed,
            steps: self.steps,
            adapter_scale: config.adapter.adapter_attention_scale,
            ..personalizer.default_options()
        };
        for picture in &self.references {
            let image = to_tensor(picture, &personalizer.base().device)?.unsqueeze(0)?;
            let reference = personalizer.reference_from_tensor(&image)?;
            let samples = personalizer.generate_tensor(&reference, &self.prompts, &options)?;
            for (i, prompt) in self.prompts.iter().enumerate() {
                let sample: Tensor = samples.narrow(0, i, 1)?;
                let mut row = vec![("reference".to_string(), picture.clone())];
                for timestep in PREVIEW_TIMESTEPS {
                    let preview = personalizer.preview(&reference, prompt, &sample, timestep, &options)?;
                    row.push((format!("preview t={timestep}"), from_tensor(&preview)?));
                }
                row.push((prompt.clone(), from_tensor(&sample)?));
                sheet.add_row(row)?;
            }
        }
        Ok(sheet.render())
    }
}

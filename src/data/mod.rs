//! Data sets on disk: pictures, prompts, pairs of one identity, and the generator of the miniature's own set.

mod dataset;
mod generate;
mod image;
mod metadata;
mod prompt;
mod sampling;
#[cfg(test)]
mod tests;

pub use dataset::{Batch, DatasetConfig, FaceDataset, Report, Sample, Source};
pub use generate::{GenerateConfig, Summary, generate_dataset};
pub use image::{Crop, MAX_PIXELS, from_tensor, load_image, resize_and_crop, save_png, to_tensor};
pub use prompt::{DEFAULT_PLACEHOLDER, compress_prompt, file_stem_from_prompt, prompt_from_path};

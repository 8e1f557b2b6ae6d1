//! Faces in pictures: landmarks, alignment, and the differentiable aligned crop.

mod crop;
mod landmarks;
mod similarity;

pub use crop::{CropOptions, aligned_crop, aligned_crop_with};
pub use landmarks::{ARCFACE_SIZE, ARCFACE_TEMPLATE, Landmarks, Template};
pub use similarity::Similarity;

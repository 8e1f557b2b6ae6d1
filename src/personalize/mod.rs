//! Inference: one photograph and a prompt in, a picture of that person out.

mod guidance;
mod latent_guidance;
mod options;
mod personalizer;
mod reference;
mod reference_key_values;
mod text_to_image;

pub use guidance::Guidance;
pub use latent_guidance::{GuidedPictures, LatentGuidance, Through};
pub use options::Options;
pub use personalizer::Personalizer;
pub(crate) use personalizer::encoder_config;
pub use reference::Reference;
pub use text_to_image::{TextToImage, TextToImageOptions};

//! Inference: one photograph and a prompt in, a picture of that person out.

mod guidance;
mod latent_guidance;
mod personalizer;
mod reference;
mod text_to_image;

pub use guidance::Guidance;
pub use latent_guidance::{GuidedPictures, LatentGuidance, Through};
pub(crate) use personalizer::encoder_config;
pub use personalizer::{Options, Personalizer};
pub use reference::Reference;
pub use text_to_image::{TextToImage, TextToImageOptions};

//! The miniature: a small but complete instance of the method, and the procedural portraits it is trained on.
//!
//! All its networks are pretrained ([`pretrain`]) and lie in one file that is part of the crate, so everything can be
//! tried, on a laptop and without a download: [`base`] gives the frozen networks, [`adapter_tensors`] the pretrained
//! IP-Adapter that training starts from.
//!
//! ```
//! use candle_core::{DType, Device};
//! use lcm_lookahead::mini;
//!
//! let base = mini::base(DType::F32, &Device::Cpu)?;
//! let conditioning = base.conditioning(&["a photo of a face in a forest".to_string()])?;
//! assert_eq!(conditioning.batch(), 1);
//! # Ok::<(), lcm_lookahead::Error>(())
//! ```

mod config;
pub mod portrait;
pub mod pretrain;
mod weights;

pub use config::MiniConfig;
pub use weights::{
    adapter_tensors, base, base_from, face_encoder_config, random_base, random_weights, tiny_base, weights,
};

/// Height and width of the miniature's pictures, in pixels.
pub const RESOLUTION: usize = 128;

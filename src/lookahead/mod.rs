//! The paper, and nothing else: *LCM-Lookahead for Encoder-based Text-to-Image Personalization* (Gal et al. 2024).
//!
//! | paper | here |
//! |---|---|
//! | eq. 2, the encoder E(I_c) with its two branches (figure 3, left) | [`FaceEncoder`] |
//! | section 4.1, eq. 3: the one-step preview | [`preview()`] |
//! | section 4.1, eq. 4: an image loss on the preview | [`ImageLoss`], [`IdentityLoss`], [`LpipsLoss`], [`ClipImageLoss`], [`FeatureLoss`] |
//! | section 4.2: random re-scaling of the LCM-LoRA | [`LoraScale`] |
//! | section 4.2: the alternatives, score distillation and a consistency loss | [`score_distillation`], [`consistency_loss`] |
//! | section 4.2: annealed timestep sampling | [`crate::schedule::AnnealedTimestepSampler`] |
//! | section 4.3: keys and values of the reference image | [`KvEncoder`] |
//! | section 5.1: guiding the latents through the preview | [`LatentGuidance`](crate::personalize::LatentGuidance) |
//! | dropping of conditions while training | [`dropout`] |

mod alignment;
mod base;
pub mod dropout;
mod face_encoder;
mod feature_loss;
mod identity_loss;
mod kv_encoder;
mod loss;
mod lpips_loss;
mod preview;

pub use alignment::{
    LoraScale, consistency_function, consistency_loss, ddim_step, earlier_timesteps, score_distillation,
};
pub use base::Base;
pub use face_encoder::{AdapterTokens, FaceEncoder, FaceEncoderConfig};
pub use feature_loss::{ClipImageLoss, FeatureLoss};
pub use identity_loss::IdentityLoss;
pub use kv_encoder::{KvEncoder, KvEncoderConfig};
pub use loss::{ImageLoss, LossValue};
pub use lpips_loss::LpipsLoss;
pub use preview::{PreviewForm, PreviewPath, preview};

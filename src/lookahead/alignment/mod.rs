//! Keeping the preview aligned with the model (paper, section 4.2).
//!
//! "Over time, this loss causes the LCM pathway to focus solely on the loss-metric at the expense of its prior output,
//! breaking the alignment with the baseline model." Against that the paper uses [`LoraScale`], and names two
//! alternatives that it compares in its supplementary, which is not published: score distillation of the preview by the
//! model ([`score_distillation`]), and the loss of consistency models on the LCM path ([`consistency_loss`]). The
//! functions here are the losses alone; what predicts noise for them, and under which conditions, is their caller's
//! ([`TrainConfig`](crate::train::TrainConfig), table `lookahead.alignment`).

mod consistency;
mod lora_scale;
mod score_distillation;

pub use consistency::{consistency_function, consistency_loss, ddim_step, earlier_timesteps};
pub use lora_scale::LoraScale;
pub use score_distillation::score_distillation;

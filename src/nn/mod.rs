//! Layers made of [`crate::ops`], and where their weights come from.

mod channelwise;
mod layers;
mod lora;
mod lora_layers;
mod parameters;
mod weights;

pub use channelwise::{BatchNorm, DepthwiseConv2d, PRelu};
pub use layers::{Conv2d, Embedding, GroupNorm, LayerNorm, Linear};
pub use lora::{LoraLayer, LoraSet, Loras};
pub use lora_layers::LoraTensors;
pub use parameters::Parameters;
pub use weights::{Init, Weights};

//! Networks, one file or folder each, with weights named as their published checkpoints name them.

pub mod ip_adapter;
pub mod unet;

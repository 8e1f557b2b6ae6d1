//! Differentiable operations that candle lacks, or whose gradient it cuts: one folder an operation.
//!
//! All take and return channels-last tensors: images `(batch, height, width, channels)`, tokens
//! `(batch, tokens, channels)`, so an image is a token matrix and back by a reshape. All work in f32 and f64 on the CPU, and
//! in f32, bf16 and f16 on a GPU (feature `cuda`). They compute exact gradients, and only for the arguments that are part
//! of a graph: a weight that is a plain tensor is frozen, is captured by the operation and costs neither gradient nor
//! time in the backward pass.

mod activation;
mod add_low_rank;
mod addends;
mod attention;
mod channel_affine;
mod channels;
mod composed;
mod conv2d;
mod depthwise_conv2d;
mod elementwise;
mod gated_sum;
mod geglu;
mod group_norm;
mod layer_norm;
mod linear;
mod linear_geglu;
#[cfg(feature = "cuda")]
pub(crate) mod low_rank;
mod max_pool2d;
mod prelu;
mod rectified_block;
pub(crate) mod resize_bicubic;
mod resize_bilinear;
mod samples;
mod select_tokens;
mod support;
mod upsample_nearest_2x;
mod vector;
mod warp_affine;

pub use activation::{Activation, activation};
pub(crate) use add_low_rank::add_low_rank;
pub use addends::Addends;
pub(crate) use attention::attention_packed_masked;
pub use attention::{Mask, attention, attention_packed, attention_where, cross_attention, cross_attention_packed};
pub use channel_affine::channel_affine;
pub(crate) use composed::{affine, unit_vectors};
pub use conv2d::{conv2d, conv2d_padded, conv2d_with};
pub use depthwise_conv2d::depthwise_conv2d;
pub use elementwise::{
    add, add_per_sample, add_scaled, cast, concat_channels, narrow, reshape, scale, split, to_channels_first,
    to_channels_last,
};
pub(crate) use elementwise::{sum, wide_dtype, widen};
pub use gated_sum::{gated_sum, mean_pixels};
pub use geglu::geglu;
pub use group_norm::group_norm;
pub use layer_norm::{add_layer_norm, layer_norm};
#[cfg(feature = "cuda")]
pub(crate) use linear::cuda::products as linear_products;
pub use linear::{linear, linear_with};
pub use linear_geglu::linear_geglu;

pub use max_pool2d::max_pool2d;
pub use prelu::prelu;
pub(crate) use rectified_block::is_lean;
pub use rectified_block::rectified_block;
pub use resize_bicubic::resize_bicubic;
pub use resize_bilinear::resize_bilinear;
pub(crate) use samples::{join_samples, repeat_sample, select_samples, split_samples};
pub use select_tokens::{TokenSelection, select_tokens};
pub use upsample_nearest_2x::upsample_nearest_2x;
pub use warp_affine::warp_affine;

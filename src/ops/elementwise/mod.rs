//! The small operations between the large ones: sums, scaling, casts, concatenation, views.
//!
//! They do what candle's own do, and can be noted on a [`tape`](crate::autograd::tape), which candle's cannot; none of
//! them makes a tape hold on to its arguments. All work in every floating-point dtype, on the CPU and on the GPU.

mod add;
mod cast;
mod concat;
mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod layout;
mod per_sample;
mod scale;
mod storage;
#[cfg(test)]
mod tests;
mod views;

pub(crate) use add::sum;
pub use add::{add, add_scaled};
pub use cast::cast;
pub(crate) use cast::{wide_dtype, widen};
pub use concat::concat_channels;
pub use layout::{to_channels_first, to_channels_last};
pub use per_sample::add_per_sample;
pub use scale::scale;
pub use views::{narrow, reshape, split};

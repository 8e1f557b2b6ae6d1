//! Train and run face personalisation for SDXL with the LCM-Lookahead method, in pure Rust on candle.
#![warn(missing_docs)]

pub mod autograd;
pub mod data;
mod error;
pub mod face;
pub mod lookahead;
pub mod mini;
pub mod models;
pub mod nn;
pub mod ops;
pub mod personalize;
pub mod random;
pub mod schedule;
pub mod train;

pub use error::{Error, Result};

//! Every published network against the implementation it comes from, at small random sizes. `tests/fixtures/<module>.py`
//! writes the fixture of each module. `cargo test --test networks -- --nocapture` prints the errors measured, which are
//! those of docs/networks.md.

mod autoencoder_kl;
mod clip;
mod faces;
mod perception;
mod pipeline;
mod support;

use candle_core::DType;

/// What the networks compute in, and the largest relative error allowed against the fixtures, which are in f64.
const KINDS: [(DType, f64); 2] = [(DType::F64, 1e-10), (DType::F32, 1e-4)];

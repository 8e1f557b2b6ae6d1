//! Every published network against the implementation it comes from, at small random sizes. `tests/fixtures/<module>.py`
//! writes the fixture of each module. `cargo test --test networks -- --nocapture` prints the errors measured, which are
//! those of docs/networks.md.

mod autoencoder_kl;
mod clip;
mod faces;
mod perception;
mod pipeline;
mod support;

/// Where both sides compute in f64.
const F64: f64 = 1e-10;

//! How the miniature's networks are trained, from nothing but procedural portraits.
//!
//! One function a stage; each writes `<out>/<stage>.safetensors` and can be interrupted and gone on with. The order:
//! [`autoencoder`], [`clip`], [`identity`] and [`face_locator`] need nothing, [`denoiser`] needs the first two,
//! [`lcm`] and [`adapter`] need the denoiser, and [`decoder`], which is optional, the autoencoder. [`bundle`] makes one file of all, [`init`] makes files of random weights.
//! A [`Pool`] of portraits in a file saves drawing them anew in every stage. All stages run on the CPU, where workers
//! share each batch, and on a GPU. `examples/pretrain_mini.rs` is the command line.
//!
//! Training sees only identities of [`TRAINING_IDENTITIES`]; those from [`HELD_OUT_FROM`] on are for evaluation.

mod adapter;
mod autoencoder;
mod bundle;
mod clip;
mod denoiser;
mod encoded;
mod face_locator;
mod files;
mod identity;
mod lcm;
mod pool;
mod sampling;
mod training;
mod workers;

pub use adapter::adapter;
pub use autoencoder::{autoencoder, decoder};
pub use bundle::{bundle, init};
pub use clip::clip;
pub use denoiser::denoiser;
pub use face_locator::face_locator;
pub use identity::{held_out_identity, identity};
pub use lcm::lcm;
pub use pool::{HELD_OUT_FROM, Pool, TRAINING_IDENTITIES, held_out_combination};
pub use training::{Losses, MicroBatch, Options, Recipe, train};
pub use workers::Workers;

//! Training: configuration, optimizer, checkpoints, and what a run writes while it goes on.
//!
//! Each part is usable alone:
//!
//! - [`TrainConfig`]: every hyperparameter, with presets ([`TrainConfig::paper`], [`TrainConfig::official`],
//!   [`TrainConfig::mini`]) and a TOML form whose mistakes are reported by name.
//! - [`Gradients`], [`AdamW`], [`LrSchedule`], [`Ema`]: one update of the trainable parameters.
//! - [`Checkpoint`]: complete state of a run, written atomically.
//! - [`MetricsWriter`], [`tensorboard::EventWriter`], [`Progress`], [`ContactSheet`]: what a person sees of the run.

mod alignment;
pub mod checkpoint;
pub mod config;
mod contact_sheet;
mod ema;
mod files;
mod gradients;
mod lr_schedule;
mod metrics;
mod optimizer;
mod pixel_font;
mod progress;
mod report;
mod step;
pub mod tensorboard;
mod trainer;
mod validation;

pub use checkpoint::Checkpoint;
pub use config::TrainConfig;
pub use contact_sheet::ContactSheet;
pub use ema::Ema;
pub use gradients::Gradients;
pub use lr_schedule::LrSchedule;
pub use metrics::MetricsWriter;
pub use optimizer::{AdamW, AdamWConfig, ParameterGroup};
pub use pixel_font::{GLYPH_HEIGHT, GLYPH_WIDTH, draw_text, text_width};
pub use progress::Progress;
pub use report::{LossReport, PendingReport, StepReport};
pub use step::{Prepared, StepLosses};
pub use trainer::{AdapterInit, Trainer};

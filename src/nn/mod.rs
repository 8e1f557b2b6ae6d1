//! Layers made of [`crate::ops`], and where their weights come from.

mod parameters;

pub use parameters::Parameters;

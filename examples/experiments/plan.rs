//! What an experiment consists of.

use crate::outcome::{Outcome, Outcomes};
use crate::setting::Setting;

/// A row of an experiment's table: something that is measured once for each seed.
#[derive(Clone, Copy)]
pub struct Row {
    /// Short name: of the row's files, and for `--only`. Rows of the same name in several experiments are the same.
    pub name: &'static str,
    /// What the table calls it.
    pub title: &'static str,
    /// Measures it.
    pub run: fn(&Setting, Unit) -> anyhow::Result<Outcome>,
}

/// One row with one seed.
#[derive(Clone, Copy)]
pub struct Unit {
    pub row: &'static str,
    pub seed: u64,
}

impl Unit {
    /// The name of its files.
    pub fn name(&self) -> String {
        format!("{}-{}", self.row, self.seed)
    }
}

/// An experiment.
#[derive(Clone, Copy)]
pub struct Plan {
    /// Short name, of its files.
    pub name: &'static str,
    /// What it shows.
    pub title: &'static str,
    pub rows: &'static [Row],
    /// Its results as Markdown.
    pub table: fn(&Plan, &Outcomes) -> String,
    /// Which finished pictures make its contact sheet, where it has one.
    pub sheet: fn(&Plan, &Outcomes) -> anyhow::Result<Option<image::RgbImage>>,
}

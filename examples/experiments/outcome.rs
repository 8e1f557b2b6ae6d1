//! What was measured, and its file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::arguments::Arguments;
use crate::plan::{Row, Unit};
use crate::setting::{Size, fingerprint};
use crate::statistics::Estimate;

/// What one row with one seed came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The row's name.
    pub row: String,
    pub seed: u64,
    /// Size, hyperparameters and weights it was measured with.
    pub fingerprint: String,
    /// Numbers by name.
    pub metrics: BTreeMap<String, f64>,
    /// The same of parts, a prompt for instance: by the part's name, then by the number's.
    pub parts: BTreeMap<String, BTreeMap<String, f64>>,
    /// Seconds of wall time by what they were spent on, and iterations a second.
    pub speed: BTreeMap<String, f64>,
}

impl Outcome {
    /// The file of a unit.
    pub fn path(out: &Path, unit: Unit) -> PathBuf {
        out.join("units").join(format!("{}.json", unit.name()))
    }

    /// The outcome of a unit, where there is one.
    ///
    /// One that was measured in another setting is refused: it must not stand in the same table.
    pub fn load(out: &Path, unit: Unit, fingerprint: &str) -> anyhow::Result<Option<Self>> {
        let path = Self::path(out, unit);
        if !path.is_file() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let outcome: Outcome =
            serde_json::from_str(&text).with_context(|| format!("{}: not an outcome", path.display()))?;
        if outcome.fingerprint != fingerprint {
            bail!(
                "{}: measured in another setting ({}; now: {fingerprint}); give the options it was measured with, choose \
                 another folder with --out, or delete it",
                path.display(),
                outcome.fingerprint
            );
        }
        Ok(Some(outcome))
    }

    /// Writes the unit's file, whole or not at all.
    pub fn save(&self, out: &Path, unit: Unit) -> anyhow::Result<()> {
        let path = Self::path(out, unit);
        let partial = path.with_extension(format!("{}.partial", std::process::id()));
        fs::create_dir_all(out.join("units"))
            .and_then(|()| fs::write(&partial, serde_json::to_string_pretty(self).unwrap_or_default()))
            .and_then(|()| fs::rename(&partial, &path))
            .with_context(|| format!("{}: cannot be written", path.display()))
    }
}

/// All outcomes of an experiment that are there.
pub struct Outcomes {
    /// The folder they lie in.
    pub out: PathBuf,
    pub size: Size,
    pub all: Vec<Outcome>,
}

impl Outcomes {
    /// Reads those of some rows that the arguments ask for.
    pub fn load(arguments: &Arguments, rows: &[Row]) -> anyhow::Result<Self> {
        let (out, seeds, fingerprint) = (arguments.out(), arguments.seeds(), fingerprint(arguments)?);
        let units = rows.iter().flat_map(|row| seeds.iter().map(|seed| Unit { row: row.name, seed: *seed }));
        let loaded = units.map(|unit| Outcome::load(&out, unit, &fingerprint));
        let all = loaded.collect::<anyhow::Result<Vec<_>>>()?.into_iter().flatten().collect();
        Ok(Outcomes { size: Size::of(arguments), out, all })
    }

    /// Those of a row, one for each seed.
    pub fn of<'a>(&'a self, row: &'a str) -> impl Iterator<Item = &'a Outcome> {
        self.all.iter().filter(move |outcome| outcome.row == row)
    }

    /// A number of a row over its seeds.
    pub fn estimate(&self, row: &str, metric: &str) -> Option<Estimate> {
        Estimate::of(self.of(row).filter_map(|outcome| outcome.metrics.get(metric).copied()))
    }

    /// A number of a part of a row over its seeds.
    pub fn part(&self, row: &str, part: &str, metric: &str) -> Option<Estimate> {
        Estimate::of(self.of(row).filter_map(|outcome| outcome.parts.get(part)?.get(metric).copied()))
    }

    /// A number of a row as text with so many decimals; a dash where it was not measured.
    pub fn cell(&self, row: &str, metric: &str, decimals: usize) -> String {
        self.estimate(row, metric).map_or("–".into(), |estimate| estimate.text(decimals))
    }
}

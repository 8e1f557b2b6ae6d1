//! Measuring what is missing.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::arguments::Arguments;
use crate::outcome::Outcome;
use crate::plan::{Plan, Row, Unit};
use crate::setting::{Setting, fingerprint};

/// Measures this program's share of the rows and seeds that have no outcome yet.
pub fn run(arguments: &Arguments, plans: &[Plan]) -> anyhow::Result<()> {
    let (out, fingerprint, rows) = (arguments.out(), fingerprint(arguments)?, arguments.rows(plans)?);
    let seeds = arguments.seeds();
    // Tables end with what takes longest; begun last, it would be waited for.
    let of_all_seeds =
        |row: &Row| seeds.iter().map(|seed| (*row, Unit { row: row.name, seed: *seed })).collect::<Vec<_>>();
    let units: Vec<(Row, Unit)> = rows.iter().rev().flat_map(of_all_seeds).collect();
    let mut missing = Vec::new();
    for place in arguments.part.of(0..units.len()) {
        if Outcome::load(&out, units[place].1, &fingerprint)?.is_none() {
            missing.push(units[place]);
        }
    }
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let worker = || -> anyhow::Result<()> {
        let mut setting = None;
        while let Some((row, unit)) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
            let setting = match &setting {
                Some(setting) => setting,
                None => setting.insert(Setting::load(arguments)?),
            };
            let start = Instant::now();
            let outcome = (row.run)(setting, *unit)?;
            outcome.save(&out, *unit)?;
            let speed: Vec<String> = outcome.speed.iter().map(|(name, value)| format!("{name} {value:.1}")).collect();
            println!("{}: {:.1} s ({})", unit.name(), start.elapsed().as_secs_f64(), speed.join(", "));
        }
        Ok(())
    };
    std::thread::scope(|scope| -> std::io::Result<()> {
        for _ in 0..arguments.jobs.clamp(1, missing.len().max(1)) {
            // candle walks a graph by recursion: room for a deep one (of address space).
            std::thread::Builder::new().stack_size(512 << 20).spawn_scoped(scope, || {
                if let Err(error) = worker() {
                    // The others finish what they are at.
                    next.store(missing.len(), Ordering::Relaxed);
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            })?;
        }
        Ok(())
    })?;
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

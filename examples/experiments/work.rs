//! Measuring what is missing.

use std::process::{Child, Command};
use std::time::Instant;

use anyhow::{Context, bail};

use crate::arguments::Arguments;
use crate::outcome::Outcome;
use crate::plan::{Plan, Row, Unit};
use crate::setting::{Setting, fingerprint};

/// Measures this program's share of the rows and seeds that have no outcome yet.
pub fn run(arguments: &Arguments, plans: &[Plan]) -> anyhow::Result<()> {
    if arguments.jobs > 1 {
        return side_by_side(arguments);
    }
    // candle walks a graph by recursion: room for a deep one (of address space).
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(512 << 20);
        let thread = thread.spawn_scoped(scope, || one_by_one(arguments, plans))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn one_by_one(arguments: &Arguments, plans: &[Plan]) -> anyhow::Result<()> {
    let (out, fingerprint, rows) = (arguments.out(), fingerprint(arguments)?, arguments.rows(plans)?);
    let seeds = arguments.seeds();
    // Tables end with what takes longest; begun last, it would be waited for.
    let of_all_seeds =
        |row: &Row| seeds.iter().map(|seed| (*row, Unit { row: row.name, seed: *seed })).collect::<Vec<_>>();
    let units: Vec<(Row, Unit)> = rows.iter().rev().flat_map(of_all_seeds).collect();
    let mut setting = None;
    for place in arguments.part.of(0..units.len()) {
        let (row, unit) = units[place];
        if Outcome::load(&out, unit, &fingerprint)?.is_some() {
            continue;
        }
        let setting = match &setting {
            Some(setting) => setting,
            None => setting.insert(Setting::load(arguments)?),
        };
        let start = Instant::now();
        let outcome = (row.run)(setting, unit)?;
        outcome.save(&out, unit)?;
        let speed: Vec<String> = outcome.speed.iter().map(|(name, value)| format!("{name} {value:.1}")).collect();
        println!("{}: {:.1} s ({})", unit.name(), start.elapsed().as_secs_f64(), speed.join(", "));
    }
    Ok(())
}

/// Starts this program several times, each for a part, and waits for all.
fn side_by_side(arguments: &Arguments) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("this program's own file")?;
    let start = |job: usize| -> anyhow::Result<Child> {
        let part = arguments.part.share(job, arguments.jobs).to_string();
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).args(["--jobs", "1", "--no-table", "--part", &part]);
        command.spawn().with_context(|| format!("{}: cannot be started", program.display()))
    };
    let children = (0..arguments.jobs).map(start).collect::<anyhow::Result<Vec<_>>>()?;
    let mut failed = 0;
    for mut child in children {
        failed += usize::from(!child.wait()?.success());
    }
    if failed > 0 {
        bail!(
            "{failed} of {} programs failed; what they said stands above, what others measured is kept",
            arguments.jobs
        );
    }
    Ok(())
}

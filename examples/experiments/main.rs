//! Repeats the paper's experiments on the miniature.

mod ablation;
mod alignment;
mod annealing;
mod arguments;
mod branches;
mod encoders;
mod evaluation;
mod guidance;
mod judge;
mod keeping;
mod outcome;
mod people;
mod personal_lora;
mod plan;
mod report;
mod setting;
mod statistics;
mod updates;
mod work;

#[path = "../support/mod.rs"]
mod support;

use std::process::ExitCode;

use arguments::Arguments;

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let plans = arguments.plans();
    people::draw_training_set(&arguments)?;
    if arguments.prepare {
        return Ok(());
    }
    if !arguments.collect {
        work::run(&arguments, &plans)?;
    }
    if arguments.no_table {
        return Ok(());
    }
    plans.iter().try_for_each(|plan| report::print(&arguments, plan))
}

fn main() -> ExitCode {
    support::main(run)
}

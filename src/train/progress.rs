//! How far a run is.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shows iterations done, losses, iterations per second and time left, on stderr: as a bar where it is a terminal, else
/// as a plain line every few iterations.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    first_step: u64,
    plain_every: u64,
    start: Instant,
}

impl Progress {
    /// For a run from iteration `first_step` to `total`. Without a terminal a line is written every `plain_every`
    /// iterations (0: only the last).
    pub fn new(first_step: u64, total: u64, plain_every: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            if let Ok(style) =
                ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  {per_sec:>9}  {eta_precise} left")
            {
                bar.set_style(style);
            }
            bar.set_position(first_step);
            // What an earlier run did says nothing about this one's speed.
            bar.reset_eta();
            bar
        });
        Progress { bar, total, first_step, plain_every, start: Instant::now() }
    }

    /// Tells that `done` iterations are done, and the losses of the last one.
    pub fn update(&self, done: u64, loss: f64, identity_loss: Option<f64>) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(losses(loss, identity_loss));
                bar.set_position(done);
            }
            None if is_due(done, self.total, self.plain_every) => {
                eprintln!("{}", self.line(done, loss, identity_loss, self.start.elapsed()));
            }
            None => {}
        }
    }

    /// Writes a line of text without tearing the bar.
    pub fn message(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Leaves the bar as it is and ends its line.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }

    fn line(&self, done: u64, loss: f64, identity_loss: Option<f64>, elapsed: Duration) -> String {
        let rate = done.saturating_sub(self.first_step) as f64 / elapsed.as_secs_f64().max(1e-9);
        let left = if rate > 0.0 { clock(self.total.saturating_sub(done) as f64 / rate) } else { "?".into() };
        format!("step {done}/{}  {}  {rate:.2} it/s  {left} left", self.total, losses(loss, identity_loss))
    }
}

fn is_due(done: u64, total: u64, every: u64) -> bool {
    done == total || (every > 0 && done.is_multiple_of(every))
}

fn losses(loss: f64, identity_loss: Option<f64>) -> String {
    let identity = identity_loss.map(|identity| format!("  identity loss {identity:.4}")).unwrap_or_default();
    format!("loss {loss:.4}{identity}")
}

/// Seconds as hours, minutes and seconds.
fn clock(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_line_tells_losses_speed_and_time_left() {
        let progress = Progress::new(10, 110, 5);
        let line = progress.line(60, 0.125, Some(0.5), Duration::from_secs(25));
        assert_eq!(line, "step 60/110  loss 0.1250  identity loss 0.5000  2.00 it/s  00:00:25 left");
        let first = progress.line(10, 1.0, None, Duration::from_secs(1));
        assert_eq!(first, "step 10/110  loss 1.0000  0.00 it/s  ? left");
    }

    #[test]
    fn plain_lines_come_every_few_steps_and_at_the_end() {
        let due = |every| (1..=7).filter(|done| is_due(*done, 7, every)).collect::<Vec<_>>();
        assert_eq!(due(3), [3, 6, 7]);
        assert_eq!(due(0), [7]);
    }

    #[test]
    fn the_clock_counts_hours() {
        assert_eq!(clock(3.0 * 3600.0 + 61.4), "03:01:01");
    }
}

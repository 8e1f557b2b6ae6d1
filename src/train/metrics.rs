//! Numbers of a run, as a JSON-lines file and TensorBoard events.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serializer;
use serde_json::Value;

use super::files;
use super::tensorboard::EventWriter;
use crate::{Error, Result};

/// Appends numbers to `metrics.jsonl` and, by choice, to a TensorBoard event file in the same folder.
///
/// Each line of the file is one JSON object: `step`, `seconds` since the run began (resumed runs go on counting), and
/// each number by its name. What is not finite is `null` there, for JSON has no such numbers.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    start: Instant,
    seconds_before: f64,
    events: Option<EventWriter>,
}

impl MetricsWriter {
    /// Opens the files in `directory`, for a run that begins at `first_step` (0 where it is new).
    ///
    /// A resumed run's lines of step `first_step` and later, and a torn last line, are dropped, so that the log is that of
    /// one run. A new run sets the log of an earlier one aside as `metrics.<n>.jsonl`.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder or a file cannot be written; [`Error::Format`] where the log, its last line apart,
    /// is not one.
    pub fn open(directory: impl AsRef<Path>, first_step: u64, tensorboard: bool) -> Result<Self> {
        let directory = directory.as_ref();
        files::create_folder(directory)?;
        let path = directory.join("metrics.jsonl");
        let seconds_before = match (path.exists(), first_step) {
            (false, _) => 0.0,
            (true, 0) => set_aside(directory, &path)?,
            (true, _) => truncate(&path, first_step)?,
        };
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
        let events = tensorboard.then(|| EventWriter::create(directory, first_step)).transpose()?;
        Ok(MetricsWriter { path, file, start: Instant::now(), seconds_before, events })
    }

    /// Seconds since the run began, those of the runs it resumes included.
    pub fn seconds(&self) -> f64 {
        self.seconds_before + self.start.elapsed().as_secs_f64()
    }

    /// Appends the numbers of one step. They are with the operating system when this returns.
    ///
    /// # Errors
    /// [`Error::Io`] where a file cannot be written; [`Error::Argument`] for a name `step` or `seconds`.
    pub fn write(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let seconds = (self.seconds() * 1000.0).round() / 1000.0;
        let mut fields = vec![("step", Value::from(step)), ("seconds", Value::from(seconds))];
        for (name, value) in values {
            if fields.iter().any(|(taken, _)| taken == name) {
                let expected = "names that differ from each other, `step` and `seconds`";
                return Err(Error::argument("MetricsWriter::write", "values", expected, format!("`{name}` again")));
            }
            fields.push((name, Value::from(*value)));
        }
        // A list of fields rather than a map, so that they stand in the line in this order.
        let mut line = Vec::new();
        serde_json::Serializer::new(&mut line)
            .collect_map(fields)
            .map_err(|error| Error::Format { path: self.path.clone(), reason: error.to_string() })?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io("write", &self.path))?;
        if let Some(events) = &mut self.events {
            events.scalars(step, values)?;
        }
        Ok(())
    }

    /// Records a picture under a tag in the TensorBoard file, where there is one.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be written; [`Error::Image`] where the picture cannot be encoded.
    pub fn image(&mut self, step: u64, tag: &str, picture: &image::RgbImage) -> Result<()> {
        match &mut self.events {
            Some(events) => events.image(step, tag, picture),
            None => Ok(()),
        }
    }
}

/// Renames the log of an earlier run to a free name. Returns the seconds a new run has behind it: none.
fn set_aside(directory: &Path, path: &Path) -> Result<f64> {
    let names = (1u32..).map(|n| directory.join(format!("metrics.{n}.jsonl")));
    for free in names.filter(|name| !name.exists()).take(1) {
        files::rename(path, &free)?;
    }
    Ok(0.0)
}

/// Drops the lines of `first_step` and later. Returns the seconds of the last line that stays.
fn truncate(path: &Path, first_step: u64) -> Result<f64> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    let mut kept = Vec::with_capacity(text.len());
    let mut seconds = 0.0;
    for (index, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
        if !line.ends_with(b"\n") {
            break; // torn when the run was stopped
        }
        let value: Option<Value> = serde_json::from_slice(line).ok();
        let step = value.as_ref().and_then(|value| value.get("step")).and_then(Value::as_u64);
        let Some(step) = step else {
            let reason = format!("line {}: expected a JSON object with a `step`", index + 1);
            return Err(Error::Format { path: path.to_path_buf(), reason });
        };
        if step < first_step {
            kept.extend_from_slice(line);
            seconds = value.as_ref().and_then(|value| value.get("seconds")).and_then(Value::as_f64).unwrap_or(seconds);
        }
    }
    if kept.len() != text.len() {
        let partial = path.with_extension("jsonl.partial");
        files::write_synced(&partial, &kept)?;
        files::rename(&partial, path)?;
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn lines(directory: &TempDir) -> Vec<Value> {
        let text = std::fs::read_to_string(directory.path().join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn steps(directory: &TempDir) -> Vec<u64> {
        lines(directory).iter().map(|line| line["step"].as_u64().unwrap()).collect()
    }

    fn write(directory: &TempDir, range: std::ops::Range<u64>) {
        let mut metrics = MetricsWriter::open(directory.path(), range.start, false).unwrap();
        for step in range {
            metrics.write(step, &[("loss", 0.5), ("identity_loss", f64::NAN)]).unwrap();
        }
    }

    #[test]
    fn a_line_holds_step_seconds_and_every_number_by_name() {
        let directory = TempDir::new().unwrap();
        write(&directory, 0..1);
        let line = &lines(&directory)[0];
        assert_eq!((&line["step"], &line["loss"], &line["identity_loss"]), (&0.into(), &0.5.into(), &Value::Null));
        assert!(line["seconds"].as_f64().unwrap() >= 0.0);
    }

    #[test]
    fn fields_stand_in_the_order_given_after_step_and_seconds() {
        let directory = TempDir::new().unwrap();
        let mut metrics = MetricsWriter::open(directory.path(), 0, false).unwrap();
        metrics.write(7, &[("loss", 0.5), ("grad_norm", 2.0)]).unwrap();
        let text = std::fs::read_to_string(directory.path().join("metrics.jsonl")).unwrap();
        assert!(text.starts_with("{\"step\":7,\"seconds\":0.0"), "{text}");
        assert!(text.ends_with(",\"loss\":0.5,\"grad_norm\":2.0}\n"), "{text}");
    }

    #[test]
    fn a_resumed_run_continues_one_log() {
        let directory = TempDir::new().unwrap();
        write(&directory, 0..5);
        write(&directory, 3..7);
        assert_eq!(steps(&directory), [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn seconds_go_on_over_a_resume() {
        let directory = TempDir::new().unwrap();
        std::fs::write(directory.path().join("metrics.jsonl"), "{\"step\":0,\"seconds\":100.0}\n").unwrap();
        let metrics = MetricsWriter::open(directory.path(), 1, false).unwrap();
        assert!((100.0..110.0).contains(&metrics.seconds()));
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_a_torn_middle_is_named() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("metrics.jsonl");
        write(&directory, 0..3);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{whole}{{\"step\":3,\"lo")).unwrap();
        write(&directory, 4..5);
        assert_eq!(steps(&directory), [0, 1, 2, 4]);
        std::fs::write(&path, format!("{{\"st\n{whole}")).unwrap();
        let error = MetricsWriter::open(directory.path(), 1, false).unwrap_err().to_string();
        assert_eq!(error, format!("{}: line 1: expected a JSON object with a `step`", path.display()));
    }

    #[test]
    fn a_new_run_loses_no_earlier_log() {
        let directory = TempDir::new().unwrap();
        write(&directory, 0..2);
        write(&directory, 0..1);
        write(&directory, 0..4);
        assert_eq!(steps(&directory).len(), 4);
        assert!(directory.path().join("metrics.1.jsonl").exists() && directory.path().join("metrics.2.jsonl").exists());
    }

    #[test]
    fn reserved_names_are_refused() {
        let directory = TempDir::new().unwrap();
        let mut metrics = MetricsWriter::open(directory.path(), 0, true).unwrap();
        assert!(metrics.write(0, &[("step", 1.0)]).is_err());
        assert!(metrics.write(0, &[("loss", 1.0), ("loss", 2.0)]).is_err());
    }
}

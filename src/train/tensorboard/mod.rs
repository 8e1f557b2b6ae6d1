//! TensorBoard event files, written without TensorFlow or protobuf.

mod event;
mod record;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::files;
use crate::{Error, Result};
use event::{Event, SummaryValue, What};

/// Appends scalars and pictures to an event file that TensorBoard shows.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Creates a new event file `events.out.tfevents.<time>...` in `directory`, for a run that begins at `first_step`.
    /// TensorBoard then hides what earlier files in the folder say of `first_step` and later.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder or file cannot be written.
    pub fn create(directory: impl AsRef<Path>, first_step: u64) -> Result<Self> {
        let directory = directory.as_ref();
        files::create_folder(directory)?;
        // TensorBoard reads the files of a folder in the order of their names, so names begin with the time.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.{}.lcm-lookahead",
            now.as_secs(),
            now.subsec_nanos(),
            std::process::id()
        );
        let path = directory.join(name);
        let file = File::create_new(&path).map_err(Error::io("create the file", &path))?;
        let mut writer = EventWriter { path, file };
        writer.append(0, What::FileVersion)?;
        if first_step > 0 {
            writer.append(first_step, What::SessionStart)?;
        }
        Ok(writer)
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends numbers by their tags (`"train/loss"`).
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let values = values.iter().map(|(tag, value)| SummaryValue::Scalar { tag, value: *value as f32 });
        self.append(step, What::Summary(values.collect()))
    }

    /// Appends a picture.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be written; [`Error::Image`] where the picture cannot be encoded as PNG.
    pub fn image(&mut self, step: u64, tag: &str, picture: &image::RgbImage) -> Result<()> {
        let mut png = Vec::new();
        picture
            .write_to(&mut Cursor::new(&mut png), image::ImageFormat::Png)
            .map_err(|error| Error::Image { path: self.path.clone(), reason: format!("`{tag}`: {error}") })?;
        let (width, height) = picture.dimensions();
        self.append(step, What::Summary(vec![SummaryValue::Image { tag, width, height, png: &png }]))
    }

    fn append(&mut self, step: u64, what: What<'_>) -> Result<()> {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let record = record::frame(&Event { wall_time, step, what }.encode());
        self.file.write_all(&record).map_err(Error::io("write", &self.path))
    }
}

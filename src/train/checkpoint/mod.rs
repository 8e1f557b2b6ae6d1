//! Complete checkpoints, written atomically.
//!
//! A checkpoint is a folder `checkpoint-<step>`:
//!
//! | File | What |
//! |---|---|
//! | `parameters.safetensors` | the trainable parameters |
//! | `optimizer.safetensors` | moments and counts of the optimizer |
//! | `ema.safetensors` | moving average of the parameters, where one is kept |
//! | `config.toml` | the configuration, complete |
//! | `state.json` | step, format version, and length and CRC-32 of the other files |
//!
//! It is written as `.checkpoint-<step>.partial` in the same folder, brought to disk, and renamed. So a folder under the
//! final name is complete, and whatever stops a run leaves the earlier checkpoints as they were.

mod folder;
mod manifest;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use super::config::TrainConfig;
use super::ema::Ema;
use super::files;
use super::optimizer::AdamW;
use crate::nn::Parameters;
use crate::{Error, Result};
use manifest::Manifest;

pub use folder::{latest, list};

const PARAMETERS: &str = "parameters.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const EMA: &str = "ema.safetensors";
const CONFIG: &str = "config.toml";

/// The whole state of a run after `step` iterations.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Iterations that were done; training goes on with the iteration of this number (they count from 0).
    pub step: u64,
    /// The trainable parameters, by name.
    pub parameters: HashMap<String, Tensor>,
    /// The optimizer's [`state`](AdamW::state).
    pub optimizer: HashMap<String, Tensor>,
    /// The moving average's [`state`](Ema::state), where one is kept.
    pub ema: Option<HashMap<String, Tensor>>,
    /// The run's configuration.
    pub config: TrainConfig,
    /// The folder it was loaded from, which errors name; empty where it was not.
    pub folder: PathBuf,
}

impl Checkpoint {
    /// The present state of a run.
    ///
    /// # Errors
    /// Where memory does not suffice.
    pub fn capture(
        step: u64,
        parameters: &Parameters,
        optimizer: &AdamW,
        ema: Option<&Ema>,
        config: &TrainConfig,
    ) -> Result<Self> {
        let values = parameters.all().into_iter().map(|(name, variable)| (name, variable.as_detached_tensor()));
        Ok(Checkpoint {
            step,
            parameters: values.collect(),
            optimizer: optimizer.state()?,
            ema: ema.map(Ema::state).transpose()?,
            config: config.clone(),
            folder: PathBuf::new(),
        })
    }

    /// Writes the checkpoint into `directory` as `checkpoint-<step>`, then removes all but the `keep_last` newest
    /// checkpoints (0 keeps all), and returns its folder. Only folders of that form are ever removed.
    ///
    /// # Errors
    /// [`Error::Io`] naming the folder or file that cannot be written; the earlier checkpoints are then as they were.
    pub fn save(&self, directory: impl AsRef<Path>, keep_last: usize) -> Result<PathBuf> {
        let directory = directory.as_ref();
        files::create_folder(directory)?;
        folder::clean_up(directory)?;
        let partial = folder::partial(directory, self.step);
        files::create_folder(&partial)?;

        let mut manifest = Manifest::new(self.step);
        save_tensors(&partial.join(PARAMETERS), &self.parameters)?;
        manifest.add(&partial, PARAMETERS)?;
        save_tensors(&partial.join(OPTIMIZER), &self.optimizer)?;
        manifest.add(&partial, OPTIMIZER)?;
        if let Some(ema) = &self.ema {
            save_tensors(&partial.join(EMA), ema)?;
            manifest.add(&partial, EMA)?;
        }
        files::write_synced(&partial.join(CONFIG), self.config.to_toml()?.as_bytes())?;
        manifest.add(&partial, CONFIG)?;
        manifest.write(&partial)?;

        let place = folder::put_in_place(directory, self.step)?;
        folder::keep_newest(directory, keep_last, self.step)?;
        Ok(place)
    }

    /// Loads a checkpoint from its own folder (`.../checkpoint-<step>`); tensors are on the CPU.
    ///
    /// # Errors
    /// [`Error::Io`] where a file is missing or cannot be read; [`Error::Format`] naming the file where it is cut off or
    /// damaged, or the format is of another version; [`Error::Config`] where the configuration is not valid.
    pub fn load(folder: impl AsRef<Path>) -> Result<Checkpoint> {
        let folder = folder.as_ref();
        let manifest = Manifest::read(folder)?;
        let tensors = |name: &str| load_tensors(&folder.join(name), &manifest.read_file(folder, name)?);
        let config_path = folder.join(CONFIG);
        let config = String::from_utf8(manifest.read_file(folder, CONFIG)?)
            .map_err(|_| Error::Format { path: config_path.clone(), reason: "not UTF-8 text".into() })?;
        Ok(Checkpoint {
            step: manifest.step,
            parameters: tensors(PARAMETERS)?,
            optimizer: tensors(OPTIMIZER)?,
            ema: manifest.has(EMA).then(|| tensors(EMA)).transpose()?,
            config: TrainConfig::from_toml_str(&config_path.display().to_string(), &config)?,
            folder: folder.to_path_buf(),
        })
    }

    /// Puts the state back into a run's parts. An `ema` that the checkpoint has nothing for starts at the loaded
    /// parameters.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming file and tensor where one is missing or has another shape.
    pub fn restore(&self, parameters: &Parameters, optimizer: &mut AdamW, ema: Option<&mut Ema>) -> Result<()> {
        let source = |file: &str| self.folder.join(file).display().to_string();
        optimizer.load_state(&source(OPTIMIZER), &self.optimizer)?;
        self.restore_parameters(parameters)?;
        match (ema, &self.ema) {
            (Some(ema), Some(state)) => ema.load_state(&source(EMA), state),
            (Some(ema), None) => ema.restart(),
            (None, _) => Ok(()),
        }
    }

    /// Puts the parameters back, without optimizer or average.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming file and tensor where one is missing or has another shape; then nothing was changed.
    pub fn restore_parameters(&self, parameters: &Parameters) -> Result<()> {
        parameters.assign(&self.folder.join(PARAMETERS).display().to_string(), &self.parameters)
    }

    /// Puts the moving average into the parameters where the checkpoint has one, else the parameters themselves: what
    /// personalisation should use.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming file and tensor where one is missing or has another shape; then nothing was changed.
    pub fn restore_averaged_parameters(&self, parameters: &Parameters) -> Result<()> {
        match &self.ema {
            Some(averages) => parameters.assign(&self.folder.join(EMA).display().to_string(), averages),
            None => self.restore_parameters(parameters),
        }
    }
}

fn save_tensors(path: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
    safetensors::serialize_to_file(tensors, None, path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => {
            Error::Io { action: "write", path: path.to_path_buf(), source }
        }
        other => Error::Format { path: path.to_path_buf(), reason: format!("cannot be written: {other}") },
    })
}

fn load_tensors(path: &Path, content: &[u8]) -> Result<HashMap<String, Tensor>> {
    candle_core::safetensors::load_buffer(content, &candle_core::Device::Cpu)
        .map_err(|error| Error::Format { path: path.to_path_buf(), reason: format!("not a safetensors file: {error}") })
}

//! The folder that checkpoints lie in.

use std::path::{Path, PathBuf};

use super::super::files;
use super::manifest::STATE;
use crate::{Error, Result};

/// What follows the hidden name of a checkpoint that is being written.
const PARTIAL: &str = ".partial";
/// ... that is being replaced by another of the same step.
const REPLACED: &str = ".replaced";
/// ... that is being removed.
const REMOVED: &str = ".removed";

fn place(directory: &Path, step: u64) -> PathBuf {
    directory.join(format!("checkpoint-{step}"))
}

fn hidden(directory: &Path, step: u64, suffix: &str) -> PathBuf {
    directory.join(format!(".checkpoint-{step}{suffix}"))
}

/// Where the checkpoint of this step is written before it is complete.
pub(super) fn partial(directory: &Path, step: u64) -> PathBuf {
    hidden(directory, step, PARTIAL)
}

/// The step of a name `<prefix><step><suffix>`, if it has that form, without leading zeros or signs.
fn step_of(name: &str, prefix: &str, suffix: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
    let step: u64 = digits.parse().ok()?;
    (step.to_string() == digits).then_some(step)
}

/// The folders in a directory whose names have this form, by step.
fn folders(directory: &Path, prefix: &str, suffix: &str) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io("list the folder", directory))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("list the folder", directory))?;
        let step = entry.file_name().to_str().and_then(|name| step_of(name, prefix, suffix));
        // `file_type` does not follow links: what a link points at is not ours to remove.
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if let (Some(step), true) = (step, is_folder) {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// The checkpoints in a directory, by step. Folders that only bear such a name, without a `state.json`, are left out, and
/// a directory that does not exist has none.
///
/// # Errors
/// [`Error::Io`] where the directory cannot be listed.
pub fn list(directory: impl AsRef<Path>) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = folders(directory.as_ref(), "checkpoint-", "")?;
    found.retain(|(_, path)| path.join(STATE).is_file());
    Ok(found)
}

/// The folder of the newest checkpoint in a directory, if there is one.
///
/// # Errors
/// [`Error::Io`] where the directory cannot be listed.
pub fn latest(directory: impl AsRef<Path>) -> Result<Option<PathBuf>> {
    restore_replaced(directory.as_ref())?;
    Ok(list(directory)?.pop().map(|(_, path)| path))
}

/// Gives a checkpoint its name back that a crash caught between its old and its new version.
fn restore_replaced(directory: &Path) -> Result<()> {
    for (step, path) in folders(directory, ".checkpoint-", REPLACED)? {
        let place = place(directory, step);
        if !place.exists() {
            files::rename(&path, &place)?;
        }
    }
    Ok(())
}

/// Removes what an earlier run left behind when it was stopped in the middle of writing or removing.
pub(super) fn clean_up(directory: &Path) -> Result<()> {
    restore_replaced(directory)?;
    for suffix in [PARTIAL, REPLACED, REMOVED] {
        for (_, path) in folders(directory, ".checkpoint-", suffix)? {
            files::remove_folder(&path)?;
        }
    }
    Ok(())
}

/// Gives the complete partial checkpoint its final name, in place of an older one of the same step.
pub(super) fn put_in_place(directory: &Path, step: u64) -> Result<PathBuf> {
    let place = place(directory, step);
    let replaced = hidden(directory, step, REPLACED);
    let replaces = place.exists();
    if replaces {
        files::rename(&place, &replaced)?;
    }
    files::rename(&partial(directory, step), &place)?;
    files::sync_folder(directory)?;
    if replaces {
        files::remove_folder(&replaced)?;
    }
    Ok(place)
}

/// Removes all but the newest checkpoints, never the one of step `written`.
pub(super) fn keep_newest(directory: &Path, keep_last: usize, written: u64) -> Result<()> {
    let mut found = list(directory)?;
    if keep_last == 0 || found.len() <= keep_last {
        return Ok(());
    }
    found.truncate(found.len() - keep_last);
    for (step, path) in found.into_iter().filter(|(step, _)| *step != written) {
        // Under its name a checkpoint is whole, so it loses the name before it loses its files.
        let removed = hidden(directory, step, REMOVED);
        files::rename(&path, &removed)?;
        files::remove_folder(&removed)?;
    }
    Ok(())
}

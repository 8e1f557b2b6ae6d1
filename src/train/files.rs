//! Files that are whole or absent, whatever happens while they are written.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::{Error, Result};

/// Creates a folder with its parents; no error where it exists.
pub(super) fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create the folder", path))
}

/// Writes a file and waits until it is on the disk.
pub(super) fn write_synced(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io("create the file", path))?;
    file.write_all(content).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("write to disk", path))
}

/// Renames a file or folder. Where both names lie in one folder, a crash leaves the one or the other.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io("rename to its final name", from))
}

/// Waits until the entries of a folder (what it contains under which name) are on the disk.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    // Only Unix lets a folder be opened and synced; elsewhere the file system orders renames by itself.
    if cfg!(unix) {
        let folder = File::open(path).map_err(Error::io("open the folder", path))?;
        folder.sync_all().map_err(Error::io("write to disk", path))?;
    }
    Ok(())
}

/// Removes a folder with all it holds.
pub(super) fn remove_folder(path: &Path) -> Result<()> {
    fs::remove_dir_all(path).map_err(Error::io("remove the folder", path))
}

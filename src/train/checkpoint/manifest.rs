//! `state.json`: what a checkpoint consists of.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::super::files;
use crate::{Error, Result};

/// The name of the manifest's file.
pub(super) const STATE: &str = "state.json";
const FORMAT_VERSION: u32 = 1;

/// Step, format version, and the files with their lengths and checksums.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    format_version: u32,
    /// Iterations that were done.
    pub(super) step: u64,
    files: BTreeMap<String, FileRecord>,
}

#[derive(Debug, Serialize, Deserialize)]
struct FileRecord {
    bytes: u64,
    crc32: u32,
}

impl Manifest {
    pub(super) fn new(step: u64) -> Self {
        Manifest { format_version: FORMAT_VERSION, step, files: BTreeMap::new() }
    }

    /// Brings a file of the folder to disk and records it.
    pub(super) fn add(&mut self, folder: &Path, name: &str) -> Result<()> {
        let path = folder.join(name);
        let mut file = File::open(&path).map_err(Error::io("open", &path))?;
        let mut hasher = crc32fast::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        let mut bytes = 0;
        loop {
            let count = file.read(&mut buffer).map_err(Error::io("read", &path))?;
            if count == 0 {
                break;
            }
            hasher.update(&buffer[..count]);
            bytes += count as u64;
        }
        file.sync_all().map_err(Error::io("write to disk", &path))?;
        self.files.insert(name.to_string(), FileRecord { bytes, crc32: hasher.finalize() });
        Ok(())
    }

    /// Whether the checkpoint has a file of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(STATE);
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::Format { path: path.clone(), reason: error.to_string() })?;
        files::write_synced(&path, text.as_bytes())?;
        files::sync_folder(folder)
    }

    pub(super) fn read(folder: &Path) -> Result<Manifest> {
        let path = folder.join(STATE);
        let format = |reason: String| Error::Format { path: path.clone(), reason };
        let text = std::fs::read(&path).map_err(Error::io("read the checkpoint's state", &path))?;
        // The version first: what another version's fields look like is not known.
        let json: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| format(format!("not the state of a checkpoint, or cut off: {error}")))?;
        match json.get("format_version").and_then(serde_json::Value::as_u64) {
            Some(version) if version == u64::from(FORMAT_VERSION) => {}
            Some(version) => {
                return Err(format(format!("checkpoint format version {version}, expected {FORMAT_VERSION}")));
            }
            None => return Err(format("not the state of a checkpoint: no `format_version`".into())),
        }
        serde_json::from_value(json).map_err(|error| format(format!("not the state of a checkpoint: {error}")))
    }

    /// The content of a file of the folder, of recorded length and checksum.
    pub(super) fn read_file(&self, folder: &Path, name: &str) -> Result<Vec<u8>> {
        let path = folder.join(name);
        let format = |reason: String| Error::Format { path: path.clone(), reason };
        let record = self
            .files
            .get(name)
            .ok_or_else(|| format(format!("expected in the checkpoint, not listed in `{STATE}`")))?;
        let content = std::fs::read(&path).map_err(Error::io("read", &path))?;
        if content.len() as u64 != record.bytes {
            let kind = if (content.len() as u64) < record.bytes { "cut off" } else { "changed" };
            return Err(format(format!("{kind}: expected {} bytes, found {}", record.bytes, content.len())));
        }
        let crc32 = crc32fast::hash(&content);
        if crc32 != record.crc32 {
            return Err(format(format!("damaged: expected checksum {:08x}, found {crc32:08x}", record.crc32)));
        }
        Ok(content)
    }
}

//! Which pictures a data set holds and whom they show: from `metadata.json`, or from the folders.

use std::{
    collections::BTreeMap,
    fs,
    path::{Component, Path, PathBuf},
};

use crate::{Error, Result};

/// A picture of the set before it has been opened.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// Path relative to the root, with `/`.
    pub relative: String,
    /// Where the file is.
    pub path: PathBuf,
    /// Whom it shows.
    pub label: String,
}

fn unusable(path: &Path, reason: impl Into<String>) -> Error {
    Error::Dataset { path: path.to_path_buf(), reason: reason.into() }
}

/// Reads a flat JSON object from relative paths to labels (strings, numbers or booleans). Also returns the relative
/// paths whose files are missing.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] for the file; [`Error::Dataset`] for a path that leaves the root.
pub(super) fn read(root: &Path, metadata: &Path) -> Result<(Vec<Entry>, Vec<PathBuf>)> {
    let format = |reason: String| Error::Format { path: metadata.to_path_buf(), reason };
    let text = fs::read_to_string(metadata).map_err(Error::io("read", metadata))?;
    let map: BTreeMap<String, serde_json::Value> = serde_json::from_str(&text)
        .map_err(|error| format(format!("expected a JSON object of relative paths and labels: {error}")))?;
    let real_root = fs::canonicalize(root).map_err(Error::io("read", root))?;
    let (mut entries, mut missing) = (Vec::new(), Vec::new());
    for (relative, label) in map {
        let label = match label {
            serde_json::Value::String(label) => label,
            label @ (serde_json::Value::Number(_) | serde_json::Value::Bool(_)) => label.to_string(),
            other => return Err(format(format!("`{relative}`: expected a label (text or number), found {other}"))),
        };
        let outside = || unusable(metadata, format!("the path `{relative}` leaves the folder of the data set"));
        // Windows' separators and drives are refused on every system, so a set means the same everywhere.
        let plain = Path::new(&relative).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if !plain || relative.contains('\\') || relative.contains(':') || relative.contains('\0') || relative.is_empty() {
            return Err(outside());
        }
        let path = root.join(&relative);
        // The real path also shows where symbolic links lead.
        match fs::canonicalize(&path) {
            Ok(real) if !real.starts_with(&real_root) => return Err(outside()),
            Ok(real) if real.is_file() => entries.push(Entry { relative, path, label }),
            _ => missing.push(path),
        }
    }
    Ok((entries, missing))
}

/// Finds every picture under the root. The label is the first folder of the path; a picture that lies directly in the
/// root is an identity of its own.
///
/// Symbolic links are not followed.
pub(super) fn scan(root: &Path) -> Result<Vec<Entry>> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(&folder).map_err(Error::io("list the folder", &folder))? {
            let item = item.map_err(Error::io("list the folder", &folder))?;
            let kind = item.file_type().map_err(Error::io("read", item.path()))?;
            let path = item.path();
            if item.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() && is_picture(&path) {
                files.push(path);
            }
        }
    }
    let mut entries: Vec<Entry> = files
        .into_iter()
        .filter_map(|path| {
            let parts: Vec<String> =
                path.strip_prefix(root).ok()?.iter().map(|part| part.to_string_lossy().into_owned()).collect();
            let relative = parts.join("/");
            let label = if parts.len() > 1 { parts[0].clone() } else { relative.clone() };
            Some(Entry { relative, path, label })
        })
        .collect();
    entries.sort_by(|a, b| a.relative.cmp(&b.relative));
    Ok(entries)
}

fn is_picture(path: &Path) -> bool {
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    matches!(extension.as_deref(), Some("png" | "jpg" | "jpeg"))
}

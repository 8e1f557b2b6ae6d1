//! The cache on disk, in the layout of `huggingface_hub`:
//! `models--owner--name/{blobs/<etag>, refs/<revision>, snapshots/<commit>/<file>}`, where a file of a snapshot is a link
//! to its blob.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A repository's part of the cache.
pub(super) struct Cache {
    root: PathBuf,
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create the folder", path))
}

impl Cache {
    pub fn of(cache: &Path, repository: &str) -> Self {
        Cache { root: cache.join(format!("models--{}", repository.replace('/', "--"))) }
    }

    pub fn path(&self) -> &Path {
        &self.root
    }

    fn snapshot(&self, commit: &str, file: &str) -> PathBuf {
        self.root.join("snapshots").join(commit).join(file)
    }

    /// A file of the cache. `revision` is a branch or tag, of which the cache knows the commit, or a commit.
    pub fn find(&self, revision: &str, file: &str) -> Option<PathBuf> {
        let known = fs::read_to_string(self.root.join("refs").join(revision)).ok();
        let commit = known.as_deref().map_or(revision, str::trim);
        Some(self.snapshot(commit, file)).filter(|path| path.is_file())
    }

    /// The place of a blob's bytes.
    pub fn blob(&self, etag: &str) -> Result<PathBuf> {
        let blobs = self.root.join("blobs");
        create_folder(&blobs)?;
        Ok(blobs.join(etag))
    }

    /// Makes a blob a file of a snapshot, and the snapshot that of a revision.
    pub fn put(&self, revision: &str, commit: &str, file: &str, etag: &str) -> Result<PathBuf> {
        let place = self.snapshot(commit, file);
        create_folder(parent(&place))?;
        if !place.is_file() {
            // Another process may have made the link in the meantime: renaming replaces it by an equal one.
            let fresh = place.with_file_name(format!(".{}.{}", etag, std::process::id()));
            self.link(file, etag, &fresh)?;
            fs::rename(&fresh, &place).map_err(Error::io("rename to its final name", &fresh))?;
        }
        if revision != commit {
            let reference = self.root.join("refs").join(revision);
            create_folder(parent(&reference))?;
            let fresh = reference.with_extension(format!("{}.partial", std::process::id()));
            fs::write(&fresh, commit).map_err(Error::io("write", &fresh))?;
            fs::rename(&fresh, &reference).map_err(Error::io("rename to its final name", &fresh))?;
        }
        Ok(place)
    }

    #[cfg(unix)]
    fn link(&self, file: &str, etag: &str, place: &Path) -> Result<()> {
        // Relative, so that the cache can be moved: up from the file's folder, the commit and `snapshots`.
        let up = "../".repeat(file.split('/').count() + 1);
        std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), place).map_err(Error::io("link", place))
    }

    #[cfg(not(unix))]
    fn link(&self, _file: &str, etag: &str, place: &Path) -> Result<()> {
        // Links need a privilege on Windows; a second name for the same bytes does not.
        let blob = self.blob(etag)?;
        fs::hard_link(&blob, place).or_else(|_| fs::copy(&blob, place).map(drop)).map_err(Error::io("link", place))
    }
}

//! Published weights: which there are, where they come from, and getting them.
//!
//! [`REPOSITORIES`] names every repository and file this crate knows what to do with, with size and licence. [`Hub`]
//! finds a file in a folder of yours, in the cache, or on the hub, in this order:
//!
//! 1. the folder given as [`Hub::with_weights_folder`] (`--weights DIR` in the examples): `DIR/<owner>/<name>/<file>` or
//!    `DIR/<name>/<file>`;
//! 2. the cache, in the layout of `huggingface_hub`, so that files are shared with Python. What is there is not asked
//!    for again, so a second run needs no network;
//! 3. the hub: with a progress bar, resumed where a transfer broke off (also in an earlier run), and checked against
//!    the size and SHA-256 that the hub gives before the file gets its name.
//!
//! | variable | meaning |
//! |---|---|
//! | `HF_HOME` | where the cache is: `$HF_HOME/hub` (default `~/.cache/huggingface`) |
//! | `HF_HUB_CACHE` | the cache itself |
//! | `HF_ENDPOINT` | another hub (default `https://huggingface.co`) |
//! | `HF_HUB_OFFLINE` | `1`: never use the network |
//! | `HF_TOKEN` | an access token; else that of `hf auth login`, from `$HF_HOME/token` |
//!
//! A client of its own, because the `hf-hub` crate (1.0) brings an asynchronous runtime and the Xet protocol along, and
//! does not compare what it downloaded with its checksum.

mod cache;
mod download;
mod repositories;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, Result};
use cache::Cache;

pub use repositories::{REPOSITORIES, Repository, WeightFile, repository};

const ENDPOINT: &str = "https://huggingface.co";

/// Where weights come from. See the [module's documentation](self).
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    folder: Option<PathBuf>,
    attempts: u32,
    pause: Duration,
}

/// Without the token.
impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Hub { endpoint, cache, offline, folder, .. } = self;
        f.debug_struct("Hub")
            .field("endpoint", endpoint)
            .field("cache", cache)
            .field("offline", offline)
            .field("folder", folder)
            .finish_non_exhaustive()
    }
}

impl Hub {
    /// The hub as the environment describes it.
    ///
    /// # Errors
    /// [`Error::Config`] where a variable has a value that cannot be used, or no home folder is known.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// The hub as variables describe it that `variable` looks up.
    ///
    /// # Errors
    /// Those of [`Hub::from_env`].
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let fault = |field: &str, reason: &str| Error::Config {
            source_name: "environment".into(),
            field: field.into(),
            reason: reason.into(),
        };
        let user_cache = || {
            let home = || variable("HOME").or_else(|| variable("USERPROFILE"));
            let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
            cache.or_else(|| Some(PathBuf::from(home()?).join(".cache"))).map(|cache| cache.join("huggingface"))
        };
        let home = variable("HF_HOME").map(PathBuf::from).or_else(user_cache);
        let cache = variable("HF_HUB_CACHE").map(PathBuf::from);
        let cache = cache.or_else(|| home.as_ref().map(|home| home.join("hub")));
        let cache = cache.ok_or_else(|| fault("HF_HOME", "neither it nor HOME is set: no place for the cache"))?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(fault("HF_ENDPOINT", &format!("expected an address with https://, found `{endpoint}`")));
        }
        let on =
            |name| variable(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&&*value.to_lowercase()));
        let token_file = variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home?.join("token")));
        let saved = || std::fs::read_to_string(token_file?).ok();
        let token = variable("HF_TOKEN").or_else(saved).map(|token| token.trim().to_string());
        Ok(Hub {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache,
            token: token.filter(|token| !token.is_empty()),
            offline: on("HF_HUB_OFFLINE"),
            folder: None,
            attempts: 5,
            pause: Duration::from_secs(1),
        })
    }

    /// Looks into this folder first.
    pub fn with_weights_folder(self, folder: Option<PathBuf>) -> Self {
        Hub { folder, ..self }
    }

    /// How often a transfer is begun before it is given up, and how long to wait after the first failure (twice as
    /// long after each further one). The default is 5 times and a second.
    pub fn with_attempts(self, attempts: u32, pause: Duration) -> Self {
        Hub { attempts: attempts.max(1), pause, ..self }
    }

    /// The path of a file on this machine, fetched where it is not here yet. `repository` is `owner/name`; `file` its
    /// path there.
    ///
    /// # Errors
    /// [`Error::Hub`] where it is neither here nor to be had, saying what was tried and what would help, or where what
    /// arrives is not what the hub announced; [`Error::Io`] where the cache cannot be written.
    pub fn file(&self, repository: &str, file: &str) -> Result<PathBuf> {
        self.file_at(repository, "main", file)
    }

    /// [`Hub::file`] at a branch, tag or commit.
    ///
    /// # Errors
    /// Those of [`Hub::file`].
    pub fn file_at(&self, repository: &str, revision: &str, file: &str) -> Result<PathBuf> {
        let fault = |reason: String| Error::Hub { repository: repository.into(), file: file.into(), reason };
        let safe = |name: &str| {
            let parts: Vec<&str> = name.split('/').collect();
            let plain = |part: &&str| {
                !part.is_empty()
                    && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-+ ".contains(c))
                    && !part.chars().all(|c| c == '.')
            };
            parts.iter().all(plain).then_some(parts.len())
        };
        if safe(repository) != Some(2) || safe(file).is_none() || safe(revision).is_none() {
            return Err(fault("expected a repository as `owner/name` and the path of a file in it".into()));
        }
        let mut looked = Vec::new();
        for place in self.places(repository, file).into_iter().flatten() {
            if place.is_file() {
                return Ok(place);
            }
            looked.push(place.display().to_string());
        }
        let cache = Cache::of(&self.cache, repository);
        if let Some(path) = cache.find(revision, file) {
            return Ok(path);
        }
        looked.push(cache.path().display().to_string());
        let looked = looked.join(", ");
        if self.offline {
            return Err(fault(format!(
                "not on this machine (looked in {looked}), and HF_HUB_OFFLINE is set; unset it, or put the file into \
                 a folder `<owner>/<name>/` below the one given as --weights"
            )));
        }
        download::fetch(self, &cache, repository, revision, file).map_err(|reason| match reason {
            download::Failure::Local(error) => error,
            download::Failure::Unreachable(reason) => fault(format!(
                "not on this machine (looked in {looked}), and {reason}; get it on another machine and give its \
                 folder as --weights, or set HF_ENDPOINT to a mirror"
            )),
            download::Failure::Refused(reason) => fault(reason),
        })
    }

    /// Where a file may lie in the folder that the user named.
    fn places(&self, repository: &str, file: &str) -> Option<[PathBuf; 2]> {
        let folder = self.folder.as_ref()?;
        let name = repository.split_once('/').map_or(repository, |(_, name)| name);
        Some([repository, name].map(|name| match file {
            "" => folder.join(name),
            file => folder.join(name).join(file),
        }))
    }

    /// A file or folder of a repository (the repository's own folder for an empty name) in the folder given as
    /// [`Hub::with_weights_folder`].
    pub fn in_weights_folder(&self, repository: &str, path: &str) -> Option<PathBuf> {
        self.places(repository, path)?.into_iter().find(|place| place.exists())
    }

    /// The path of a file, where it is on this machine.
    pub fn find(&self, repository: &str, file: &str) -> Option<PathBuf> {
        let own = self.in_weights_folder(repository, file).filter(|path| path.is_file());
        own.or_else(|| Cache::of(&self.cache, repository).find("main", file))
    }

    /// Several files of one repository, all in the folder that is returned.
    ///
    /// # Errors
    /// Those of [`Hub::file`]; [`Error::Hub`] where the files are spread over several places.
    pub fn folder(&self, repository: &str, files: &[&str]) -> Result<PathBuf> {
        let mut found: Option<(PathBuf, &str)> = None;
        for file in files {
            let mut root: &Path = &self.file(repository, file)?;
            for _ in file.split('/') {
                root = root.parent().unwrap_or(root);
            }
            match &found {
                Some((other, first)) if other != root => {
                    return Err(Error::Hub {
                        repository: repository.into(),
                        file: file.to_string(),
                        reason: format!(
                            "lies in {}, but `{first}` in {}: expected both in one folder",
                            root.display(),
                            other.display()
                        ),
                    });
                }
                Some(_) => {}
                None => found = Some((root.to_path_buf(), file)),
            }
        }
        found.map(|(root, _)| root).ok_or_else(|| Error::argument("Hub::folder", "files", "at least one", "none"))
    }
}

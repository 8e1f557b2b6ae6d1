//! The one error type of the crate.
//!
//! Every variant names what a person needs to find the fault: the file, the tensor or field, what was expected and
//! what was found. Library code never panics on input.

use std::path::{Path, PathBuf};

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of candle failed (shape mismatch, out of memory, unsupported dtype ...).
    #[error(transparent)]
    Candle(#[from] candle_core::Error),

    /// A file or folder could not be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was being done, as a verb phrase: `"read"`, `"create the folder"`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },

    /// A file is not a picture that can be used.
    #[error("{}: not a usable picture: {reason}", path.display())]
    Image {
        /// The picture's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A data set on disk cannot be used.
    #[error("{}: not a usable data set: {reason}", path.display())]
    Dataset {
        /// The data set's folder or metadata file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A file (safetensors, JSON, TOML) is cut off, corrupt or of another kind than expected.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        reason: String,
    },

    /// A named tensor is missing from a file, or has the wrong shape or dtype.
    #[error("{file}: tensor `{tensor}`: expected {expected}, found {found}")]
    Tensor {
        /// The file that should hold the tensor, or a description of the in-memory source.
        file: String,
        /// The tensor's full name.
        tensor: String,
        /// Expected shape or dtype.
        expected: String,
        /// What was found (`"nothing"` when it is missing).
        found: String,
    },

    /// An argument of a function has the wrong shape, dtype or range.
    #[error("{function}: `{argument}`: expected {expected}, found {found}")]
    Argument {
        /// The function or operation.
        function: &'static str,
        /// The argument.
        argument: &'static str,
        /// Expected shape, dtype or range.
        expected: String,
        /// What was given.
        found: String,
    },

    /// A configuration field has a wrong type or value, or is unknown.
    #[error("{source_name}: `{field}`: {reason}")]
    Config {
        /// The file, or the name of the preset or structure.
        source_name: String,
        /// The field's full name (`"optimizer.adapter_lr"`).
        field: String,
        /// What is wrong, and what would be right.
        reason: String,
    },

    /// A file of the hub is not on this machine and could not be had, or is not what the hub announced.
    #[error("{repository}: `{file}`: {reason}")]
    Hub {
        /// Owner and name of the repository.
        repository: String,
        /// The file's path in it.
        file: String,
        /// What was tried, what went wrong, and what would help.
        reason: String,
    },

    /// Training reached a state from which it must not go on (a loss that is not finite, no usable sample left ...).
    #[error("training stopped at step {step}: {reason}")]
    Training {
        /// The step (counted in iterations, from 0).
        step: u64,
        /// What happened.
        reason: String,
    },
}

impl Error {
    /// An [`Error::Io`] with its path, for use in `map_err`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// An [`Error::Argument`].
    pub fn argument(
        function: &'static str,
        argument: &'static str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::Argument { function, argument, expected: expected.into(), found: found.into() }
    }
}

/// Lets an [`Error`] pass through candle's traits (custom operations, `Module`).
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}

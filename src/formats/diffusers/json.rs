//! A `config.json`, whose fields are read one by one, each with the bounds of what makes sense.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::super::tensor_file::{format_error, read_text};
use crate::{Error, Result};

/// Published configurations have a few KB.
const MOST_BYTES: u64 = 1 << 20;
/// No size in any published network comes near this; what claims more is damaged or hostile.
const MOST: usize = 1 << 17;

/// A component's configuration.
#[derive(Clone, Debug)]
pub struct JsonConfig {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl JsonConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, [`Error::Format`] where it is no JSON object.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(path, &read_text(path, MOST_BYTES)?)
    }

    /// Parses a configuration; `path` is what errors name.
    ///
    /// # Errors
    /// [`Error::Format`] where it is no JSON object.
    pub fn parse(path: impl AsRef<Path>, text: &str) -> Result<Self> {
        let path = path.as_ref();
        let fields = serde_json::from_str(text)
            .map_err(|error| format_error(path, format!("not a JSON object (is it cut off?): {error}")))?;
        Ok(JsonConfig { path: path.to_path_buf(), fields })
    }

    /// An [`Error::Config`] about a field.
    pub fn fault(&self, field: &str, expected: impl std::fmt::Display) -> Error {
        let found = self.fields.get(field).map_or("nothing".to_string(), |value| {
            let text = value.to_string();
            if text.chars().count() > 80 { format!("{}...", text.chars().take(80).collect::<String>()) } else { text }
        });
        Error::Config {
            source_name: self.path.display().to_string(),
            field: field.to_string(),
            reason: format!("expected {expected}, found {found}"),
        }
    }

    /// The field's value; `None` where it is missing or null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    fn bounded(&self, field: &str, value: &Value) -> Result<usize> {
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok()).filter(|number| *number <= MOST);
        number.ok_or_else(|| self.fault(field, format!("whole numbers up to {MOST}")))
    }

    /// A size or count of at least 1.
    ///
    /// # Errors
    /// [`Error::Config`] where it is missing, no such number, or absurd.
    pub fn count(&self, field: &str) -> Result<usize> {
        let value = self.get(field).ok_or_else(|| self.fault(field, "a whole number"))?;
        match self.bounded(field, value)? {
            0 => Err(self.fault(field, "at least 1")),
            number => Ok(number),
        }
    }

    /// A size or count, with the value it has where it is missing.
    ///
    /// # Errors
    /// [`Error::Config`] where it is no such number, or absurd.
    pub fn count_or(&self, field: &str, default: usize) -> Result<usize> {
        if self.get(field).is_some() { self.count(field) } else { Ok(default) }
    }

    /// A list of `length` sizes or counts; a single number stands for a list of equal ones.
    ///
    /// # Errors
    /// [`Error::Config`] where it is missing, of another length, or absurd.
    pub fn counts(&self, field: &str, length: usize) -> Result<Vec<usize>> {
        match self.get(field) {
            Some(Value::Array(values)) if values.len() == length => {
                values.iter().map(|value| self.bounded(field, value)).collect()
            }
            Some(value @ Value::Number(_)) => Ok(vec![self.bounded(field, value)?; length]),
            _ => Err(self.fault(field, format!("a list of {length} whole numbers"))),
        }
    }

    /// How long a list is.
    ///
    /// # Errors
    /// [`Error::Config`] where the field is no list of 1 to 16 members.
    pub fn length(&self, field: &str) -> Result<usize> {
        match self.get(field) {
            Some(Value::Array(values)) if (1..=16).contains(&values.len()) => Ok(values.len()),
            _ => Err(self.fault(field, "a list of 1 to 16 members")),
        }
    }

    /// A list of texts.
    ///
    /// # Errors
    /// [`Error::Config`] where it is none.
    pub fn texts(&self, field: &str) -> Result<Vec<&str>> {
        let wrong = || self.fault(field, "a list of names");
        let values = self.get(field).and_then(Value::as_array).ok_or_else(wrong)?;
        values.iter().map(|value| value.as_str().ok_or_else(wrong)).collect()
    }

    /// A number, with the value it has where it is missing.
    ///
    /// # Errors
    /// [`Error::Config`] where it is no finite number.
    pub fn number_or(&self, field: &str, default: f64) -> Result<f64> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.fault(field, "a number")),
        }
    }

    /// A text, with the value it has where it is missing.
    ///
    /// # Errors
    /// [`Error::Config`] where it is no text.
    pub fn text_or<'a>(&'a self, field: &str, default: &'a str) -> Result<&'a str> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_str().ok_or_else(|| self.fault(field, "a text")),
        }
    }

    /// Makes sure that a field has the one value that is supported, or is missing where that means the same.
    ///
    /// # Errors
    /// [`Error::Config`] where it has another.
    pub fn only(&self, field: &str, supported: &Value, missing_is_supported: bool) -> Result<()> {
        match self.get(field) {
            None if missing_is_supported || supported.is_null() => Ok(()),
            Some(value) if value == supported => Ok(()),
            _ => Err(self.fault(field, format!("{supported}, the only value supported"))),
        }
    }
}

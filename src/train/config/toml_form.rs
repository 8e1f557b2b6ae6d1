//! The configuration as TOML.
//!
//! A preset is written as a table, the user's table is laid over it key by key, and the result is read back. So whatever
//! is wrong is known by its full name, and a file need only say what differs from its preset.

use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use super::TrainConfig;
use crate::{Error, Result};

impl TrainConfig {
    /// Reads a configuration from a TOML file; see [`from_toml_str`](Self::from_toml_str).
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be read, and those of `from_toml_str`.
    pub fn from_toml(path: impl AsRef<Path>) -> Result<TrainConfig> {
        Self::from_toml_over(path, Self::paper())
    }

    /// Reads a configuration from a TOML file; what it does not say is taken from `otherwise`, unless its key `preset`
    /// names a preset.
    ///
    /// # Errors
    /// As [`from_toml`](Self::from_toml).
    pub fn from_toml_over(path: impl AsRef<Path>, otherwise: TrainConfig) -> Result<TrainConfig> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(Error::io("read the configuration", path))?;
        Self::read_over(&path.display().to_string(), &text, otherwise)
    }

    /// Reads a configuration from TOML text. What the text does not say is taken from the preset named by its top-level
    /// key `preset`, `"paper"` where it has none.
    ///
    /// # Errors
    /// [`Error::Format`] where the text is not TOML; [`Error::Config`] for an unknown key, naming the nearest valid one,
    /// for a value of a wrong type, naming the expected and the found one, and for a value out of range.
    pub fn from_toml_str(source_name: &str, text: &str) -> Result<TrainConfig> {
        Self::read_over(source_name, text, Self::paper())
    }

    fn read_over(source_name: &str, text: &str, otherwise: TrainConfig) -> Result<TrainConfig> {
        let mut user: Table = text.parse().map_err(|error: toml::de::Error| Error::Format {
            path: source_name.into(),
            reason: format!("not valid TOML: {}", error.to_string().trim_end()),
        })?;
        let preset = match user.remove("preset") {
            None => otherwise,
            Some(value) => preset_named(source_name, &value)?,
        };
        let mut overlay = Overlay { source_name, table: preset.to_table()? };
        overlay.lay(&mut Vec::new(), &user)?;
        let config = overlay.read().map_err(|reason| overlay.error("preset", reason))?;
        config.validate_from(source_name)?;
        Ok(config)
    }

    /// The whole configuration as TOML, which [`from_toml_str`](Self::from_toml_str) reads back to an equal one.
    ///
    /// # Errors
    /// [`Error::Config`] where a field has no TOML form (a seed above `2^63-1`).
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(not_serializable)
    }

    fn to_table(&self) -> Result<Table> {
        Table::try_from(self).map_err(not_serializable)
    }
}

fn not_serializable(error: toml::ser::Error) -> Error {
    Error::Config { source_name: "configuration".into(), field: "seed".into(), reason: error.to_string() }
}

fn preset_named(source_name: &str, value: &Value) -> Result<TrainConfig> {
    let error = |reason| Error::Config { source_name: source_name.into(), field: "preset".into(), reason };
    let known = TrainConfig::PRESETS.map(|name| format!("\"{name}\"")).join(", ");
    let name = value.as_str().ok_or_else(|| error(format!("expected one of {known}, found {}", describe(value))))?;
    TrainConfig::preset(name).ok_or_else(|| error(format!("expected one of {known}, found \"{name}\"")))
}

/// A complete configuration over which a user's table is laid.
struct Overlay<'a> {
    source_name: &'a str,
    table: Table,
}

impl Overlay<'_> {
    fn read(&self) -> std::result::Result<TrainConfig, String> {
        TrainConfig::deserialize(Value::Table(self.table.clone()))
            .map_err(|error| error.message().trim_end().to_string())
    }

    fn error(&self, field: &str, reason: String) -> Error {
        Error::Config { source_name: self.source_name.to_string(), field: field.to_string(), reason }
    }

    /// The place of the table at `path`. Every step of the path was checked to be a table when it was entered.
    fn table_at(&mut self, path: &[String]) -> Option<&mut Table> {
        path.iter().try_fold(&mut self.table, |table, key| table.get_mut(key)?.as_table_mut())
    }

    fn lay(&mut self, path: &mut Vec<String>, user: &Table) -> Result<()> {
        for (key, value) in user {
            path.push(key.clone());
            let field = path.join(".");
            let parent = &path[..path.len() - 1];
            let current = self.table_at(parent).and_then(|table| table.get(key)).cloned();
            match (current, value) {
                (None, _) => return Err(self.error(&field, self.unknown_key(parent, key))),
                (Some(Value::Table(_)), Value::Table(inner)) => self.lay(path, inner)?,
                (Some(current), value) => {
                    let value = convert(&current, value).map_err(|reason| self.error(&field, reason))?;
                    let parent = parent.to_vec();
                    if let Some(table) = self.table_at(&parent) {
                        table.insert(key.clone(), value);
                    }
                    // Whatever serde objects to now (a variant of an enum, a negative count) is this field's fault.
                    self.read().map_err(|reason| self.error(&field, reason))?;
                }
            }
            path.pop();
        }
        Ok(())
    }

    /// Names the nearest valid key: of the same table if that is near, else of any table by its full name.
    fn unknown_key(&self, parent: &[String], key: &str) -> String {
        let mut valid = Vec::new();
        collect_keys(&self.table, &mut Vec::new(), &mut valid);
        if parent.is_empty() {
            valid.push(vec!["preset".to_string()]);
        }
        // A sibling is the likelier meaning: a misspelling, where a key of another table is a misplacing.
        let likeness = |candidate: &Vec<String>| {
            let name = candidate.last().map_or("", String::as_str);
            let sibling = candidate[..candidate.len() - 1] == *parent;
            strsim::normalized_damerau_levenshtein(name, key) + if sibling { 0.15 } else { 0.0 }
        };
        let nearest = valid.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
        match nearest {
            Some(path) if path[..path.len() - 1] == *parent => {
                format!("unknown key; did you mean `{}`?", path[path.len() - 1])
            }
            Some(path) => format!("unknown key; did you mean `{}`?", path.join(".")),
            None => "unknown key".to_string(),
        }
    }
}

/// The paths of all keys of a table, those of inner tables included.
fn collect_keys(table: &Table, path: &mut Vec<String>, out: &mut Vec<Vec<String>>) {
    for (key, value) in table {
        path.push(key.clone());
        out.push(path.clone());
        if let Value::Table(inner) = value {
            collect_keys(inner, path, out);
        }
        path.pop();
    }
}

/// The user's value as a value of the type that stands there, or what is wrong with it.
fn convert(current: &Value, value: &Value) -> std::result::Result<Value, String> {
    match (current, value) {
        (Value::Float(_), Value::Integer(whole)) => Ok(Value::Float(*whole as f64)),
        (Value::Integer(_), Value::Integer(whole)) if *whole < 0 => {
            Err(format!("expected a whole number, not negative, found {whole}"))
        }
        (Value::Array(_), Value::Array(items)) => match items.iter().find(|item| !item.is_str()) {
            // All lists of the configuration are lists of strings; an empty one cannot show that.
            Some(item) => Err(format!("expected a list of strings, found {} in it", describe(item))),
            None => Ok(value.clone()),
        },
        _ if current.same_type(value) => Ok(value.clone()),
        _ => Err(format!("expected {}, found {}", expected_kind(current), describe(value))),
    }
}

/// What kind of value stands here, in words.
fn expected_kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list of strings",
        Value::Table(_) => "a table",
    }
}

/// A found value in words: its kind, and itself where it is short.
fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the string \"{text}\""),
        Value::Integer(number) => format!("the whole number {number}"),
        Value::Float(number) => format!("the number {number}"),
        Value::Boolean(boolean) => format!("{boolean}"),
        Value::Datetime(date) => format!("the date {date}"),
        Value::Array(_) => "a list".to_string(),
        Value::Table(_) => "a table".to_string(),
    }
}

//! PyTorch's format before version 1.6, in which older face networks are published: five pickles (a magic number, a
//! version, facts about the machine, the tensors, the order of the storages), then each storage as its length and its
//! numbers.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::super::info::StoredDtype;
use super::super::tensor_file::{Contents, format_error};
use super::pickle::{self, Value, Values};
use super::{entries, unpickle};
use crate::Result;

/// The first two pickles: the magic number, and version 1001.
pub(in crate::formats) const MAGIC: &[u8] =
    b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.";

pub(in crate::formats) fn contents(path: &Path, bytes: &[u8]) -> Result<Contents> {
    let wrong = |reason: String| format_error(path, format!("not a whole PyTorch file: {reason}"));
    let mut at = MAGIC.len();
    let mut next = |what: &str| -> Result<Values> {
        let rest = bytes.get(at..).unwrap_or_default();
        let (values, length) = pickle::read(&rest[..rest.len().min(super::MOST_PICKLE)])
            .map_err(|reason| wrong(format!("{what}: {reason}")))?;
        at += length;
        Ok(values)
    };
    if next("the machine's description")?.entry("little_endian") == Some(&Value::Bool(false)) {
        return Err(wrong("saved on a big-endian machine, which is not supported".into()));
    }
    let tensors = next("the tensors' description")?;
    let order = next("the order of the storages")?;
    let records = unpickle::tensors(&tensors).map_err(wrong)?;
    let dtypes: BTreeMap<&str, StoredDtype> =
        records.values().map(|record| (record.storage.key.as_str(), record.storage.dtype)).collect();
    let mut spans: BTreeMap<String, Range<usize>> = BTreeMap::new();
    for key in order.texts().ok_or_else(|| wrong("the order of the storages is no list of names".into()))? {
        let dtype = dtypes.get(key).ok_or_else(|| wrong(format!("storage `{key}` belongs to no tensor")))?;
        let span = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()).and_then(|length| {
            let count = usize::try_from(u64::from_le_bytes(*length)).ok()?;
            let end = (at + 8).checked_add(count.checked_mul(dtype.size())?)?;
            (end <= bytes.len()).then_some(at + 8..end)
        });
        let span = span.ok_or_else(|| wrong(format!("cut off in storage `{key}`")))?;
        at = span.end;
        spans.insert(key.to_string(), span);
    }
    entries(path, records, |storage| {
        spans.get(&storage.key).cloned().ok_or_else(|| wrong(format!("storage `{}` is missing", storage.key)))
    })
}

impl Values {
    /// The value of a key of the dictionary that a pickle is.
    fn entry(&self, key: &str) -> Option<&Value> {
        let Value::Dict(entries) = &self.table[self.result] else { return None };
        let found = entries.iter().find(|(name, _)| matches!(&self.table[*name], Value::Text(text) if text == key));
        found.map(|(_, value)| &self.table[*value])
    }

    /// The members of the list of texts that a pickle is.
    fn texts(&self) -> Option<Vec<&str>> {
        let Value::List(members) = &self.table[self.result] else { return None };
        let text = |id: &usize| match &self.table[*id] {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        };
        members.iter().map(text).collect()
    }
}

//! From the plain data of a pickle to its tensors, named by their paths in nested dictionaries.

use std::collections::BTreeMap;

use super::super::info::TensorInfo;
use super::pickle::{Id, Name, Value, Values};
use super::storage::{StorageRecord, TensorRecord, storage_dtype};

/// A few entries that refer to one another can stand for any number of names; real files hold some thousands.
const MOST_VISITS: usize = 1 << 20;
const MOST_DEPTH: usize = 16;
const MOST_NAME: usize = 1024;

/// All tensors; what is no tensor (numbers, texts) is left out.
pub(super) fn tensors(values: &Values) -> Result<BTreeMap<String, TensorRecord>, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![(values.result, String::new(), 0)];
    let mut visits = 0;
    while let Some((id, path, depth)) = open.pop() {
        visits += 1;
        if visits > MOST_VISITS || depth > MOST_DEPTH || path.len() > MOST_NAME {
            return Err("too many or too deeply nested entries for a file of tensors".into());
        }
        let child = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
        match &values.table[id] {
            Value::Dict(entries) => {
                for (key, value) in entries {
                    let key = match &values.table[*key] {
                        Value::Text(text) => text.clone(),
                        Value::Int(number) => number.to_string(),
                        _ => return Err(format!("in `{path}`: a key that is neither a text nor a number")),
                    };
                    open.push((*value, child(&key), depth + 1));
                }
            }
            Value::List(members) | Value::Tuple(members) => {
                for (i, value) in members.iter().enumerate() {
                    open.push((*value, child(&i.to_string()), depth + 1));
                }
            }
            Value::Call(Name::RebuildParameter, arguments) => {
                let data = values.tuple(*arguments).and_then(|arguments| arguments.first().copied());
                open.push((data.ok_or_else(|| format!("`{path}`: a parameter without data"))?, path, depth + 1));
            }
            Value::Call(Name::RebuildTensor, arguments) => {
                let record = values.tensor(*arguments).map_err(|reason| format!("tensor `{path}`: {reason}"))?;
                if found.insert(path.clone(), record).is_some() {
                    return Err(format!("two tensors of the name `{path}`"));
                }
            }
            Value::Call(name, _) if !matches!(name, Name::Size | Name::Device) => {
                return Err(format!("`{path}`: a call of {name:?} that tensors do not take"));
            }
            _ => {}
        }
    }
    if found.is_empty() { Err("no tensors".into()) } else { Ok(found) }
}

impl Values {
    fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.table.get(id)? {
            Value::Tuple(members) => Some(members),
            // torch.Size((2, 3))
            Value::Call(Name::Size, arguments) => match self.table.get(*arguments)? {
                Value::Tuple(outer) => match self.table.get(*outer.first()?)? {
                    Value::Tuple(members) => Some(members),
                    _ => None,
                },
                _ => None,
            },
            _ => None,
        }
    }

    fn count(&self, id: Id) -> Option<usize> {
        match self.table.get(id)? {
            Value::Int(number) => usize::try_from(*number).ok(),
            _ => None,
        }
    }

    fn counts(&self, id: Id) -> Option<Vec<usize>> {
        self.tuple(id)?.iter().map(|id| self.count(*id)).collect()
    }

    /// `_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`.
    fn tensor(&self, arguments: Id) -> Result<TensorRecord, String> {
        let arguments = self.tuple(arguments).filter(|arguments| arguments.len() >= 4);
        let arguments = arguments.ok_or("expected storage, offset, shape and strides")?;
        let Some(Value::Persistent(storage)) = self.table.get(arguments[0]) else {
            return Err("its storage is no storage".into());
        };
        let storage = self.storage(*storage)?;
        let offset = self.count(arguments[1]).ok_or("its offset is no number of numbers")?;
        let shape = self.counts(arguments[2]).ok_or("its shape is none")?;
        let strides = self.counts(arguments[3]).ok_or("its strides are none")?;
        if strides.len() != shape.len() || shape.len() > 16 {
            return Err(format!("shape {shape:?} with strides {strides:?}"));
        }
        let info = TensorInfo { shape, dtype: storage.dtype };
        Ok(TensorRecord { storage, offset, info, strides })
    }

    /// `('storage', torch.FloatStorage, key, device, count)`.
    fn storage(&self, id: Id) -> Result<StorageRecord, String> {
        let members: Vec<&Value> =
            self.tuple(id).unwrap_or_default().iter().filter_map(|id| self.table.get(*id)).collect();
        // Before version 1.6 a sixth member follows, for views of storages that no version since 0.4 has written.
        let members = if let [five @ .., Value::None] = &members[..] { five } else { &members[..] };
        match members[..] {
            [Value::Text(kind), Value::Name(Name::Storage(class)), Value::Text(key), _, Value::Int(count)]
                if kind == "storage" =>
            {
                let dtype = storage_dtype(class).ok_or_else(|| format!("a storage of class {class}"))?;
                let elements = usize::try_from(*count).map_err(|_| format!("a storage of {count} numbers"))?;
                Ok(StorageRecord { key: key.clone(), dtype, elements })
            }
            _ => Err("its storage is not described as PyTorch describes one".into()),
        }
    }
}

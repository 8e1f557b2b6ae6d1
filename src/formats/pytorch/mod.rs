//! PyTorch's files (`.bin`, `.pt`, `.pth`): a pickle that says which tensors there are, and their numbers. Since version
//! 1.6 they are zip files, each storage a member; before, pickles and storages follow one another.
//!
//! A pickle is a program. This reader is no interpreter of such programs: it knows the few instructions and the few
//! names that tensors in nested dictionaries take, makes plain data of them, and refuses everything else by name.
//! Nothing of a file is ever called or executed.

mod legacy;
mod pickle;
mod storage;
mod unpickle;
mod writer;
mod zip;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::tensor_file::{Contents, Entry, Place, format_error};
use crate::{Error, Result};
use storage::{StorageRecord, TensorRecord};
use zip::Archive;

pub(super) use legacy::{MAGIC as LEGACY_MAGIC, contents as legacy_contents};
pub use writer::{Node, write};

/// A description of tensors should not be longer than this: the released checkpoint's takes a MB.
const MOST_PICKLE: usize = 64 << 20;

pub(super) fn contents(path: &Path, bytes: &[u8]) -> Result<Contents> {
    let wrong = |reason: String| format_error(path, reason);
    let archive = Archive::read(bytes).map_err(|reason| wrong(format!("not a whole zip file: {reason}")))?;
    // All members lie in one folder, whose name is that of the file when it was saved.
    let Some(root) = archive.names().find_map(|name| name.strip_suffix("data.pkl")) else {
        return Err(wrong("a zip file without `data.pkl`, so not one of PyTorch's".into()));
    };
    let member = |name: &str| {
        let name = format!("{root}{name}");
        archive.member(&name).map_err(|reason| wrong(format!("member `{name}`: {reason}")))
    };
    if let Ok(order) = member("byteorder")
        && bytes.get(order) != Some(b"little")
    {
        return Err(wrong("saved on a big-endian machine, which is not supported".into()));
    }
    let program = member("data.pkl")?;
    if program.len() > MOST_PICKLE {
        return Err(wrong(format!("`data.pkl` of {} bytes, expected at most {MOST_PICKLE}", program.len())));
    }
    let (values, _) = pickle::read(&bytes[program]).map_err(|reason| wrong(format!("`data.pkl`: {reason}")))?;
    let records = unpickle::tensors(&values).map_err(|reason| wrong(format!("`data.pkl`: {reason}")))?;
    entries(path, records, |storage| member(&format!("data/{}", storage.key)))
}

/// The tensors, where their storages have the size that the pickle says and they lie in them.
fn entries(
    path: &Path,
    records: BTreeMap<String, TensorRecord>,
    span: impl Fn(&StorageRecord) -> Result<Range<usize>>,
) -> Result<Contents> {
    let mut entries = BTreeMap::new();
    for (name, record) in records {
        let fault = |expected: String, found: String| Error::Tensor {
            file: path.display().to_string(),
            tensor: name.clone(),
            expected,
            found,
        };
        let TensorRecord { storage, offset, info, strides } = record;
        let span = span(&storage)?;
        let size = info.dtype.size();
        if storage.elements.checked_mul(size) != Some(span.len()) {
            let expected = format!("a storage of {} numbers of {size} bytes", storage.elements);
            return Err(fault(expected, format!("{} bytes (is the file cut off?)", span.len())));
        }
        let count = info.elements().filter(|count| *count <= storage.elements);
        let Some(count) = count else {
            let expected = format!("at most the {} numbers of its storage", storage.elements);
            return Err(fault(expected, format!("shape {:?}", info.shape)));
        };
        let reach = storage::reach(&info.shape, &strides).and_then(|reach| reach.checked_add(offset));
        if count > 0 && reach.is_none_or(|last| last >= storage.elements) {
            let expected = format!("numbers inside its storage of {}", storage.elements);
            return Err(fault(expected, format!("offset {offset} with strides {strides:?}")));
        }
        let start = if count == 0 { span.start } else { span.start + offset * size };
        let place = match storage::is_contiguous(&info.shape, &strides) {
            true => Place::At(start),
            false => Place::Strided { start, strides },
        };
        entries.insert(name, Entry { info, place });
    }
    Ok(Contents { entries, metadata: BTreeMap::new() })
}

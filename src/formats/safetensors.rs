//! The safetensors format: the length of the header, the header as JSON, the numbers.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use candle_core::Tensor;
use serde::Deserialize;

use super::info::{StoredDtype, TensorInfo};
use super::tensor_file::{Contents, Entry, Place, format_error};
use crate::{Error, Result};

/// SDXL's U-Net has a header of 200 KB. The reference implementation allows 100 MB, which would take some GB to parse.
const MOST_HEADER: u64 = 32 << 20;

#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__", default)]
    metadata: BTreeMap<String, String>,
    #[serde(flatten)]
    tensors: BTreeMap<String, HeaderEntry>,
}

#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

fn dtype(name: &str) -> StoredDtype {
    match name {
        "BOOL" => StoredDtype::Bool,
        "U8" => StoredDtype::U8,
        "I8" => StoredDtype::I8,
        "I16" => StoredDtype::I16,
        "I32" => StoredDtype::I32,
        "I64" => StoredDtype::I64,
        "F16" => StoredDtype::F16,
        "BF16" => StoredDtype::BF16,
        "F32" => StoredDtype::F32,
        "F64" => StoredDtype::F64,
        "U16" => StoredDtype::Other(2),
        "U32" => StoredDtype::Other(4),
        "U64" | "C64" => StoredDtype::Other(8),
        _ => StoredDtype::Other(1),
    }
}

pub(super) fn contents(path: &Path, bytes: &[u8]) -> Result<Contents> {
    let wrong = |reason: String| format_error(path, format!("not a whole safetensors file: {reason}"));
    let Some(length) = bytes.first_chunk::<8>().map(|length| u64::from_le_bytes(*length)) else {
        return Err(wrong(format!("{} bytes", bytes.len())));
    };
    if length > MOST_HEADER {
        return Err(wrong(format!("a header of {length} bytes, expected at most {MOST_HEADER}")));
    }
    let start = 8 + length as usize;
    let Some(header) = bytes.get(8..start) else {
        return Err(wrong(format!("cut off in the header: expected {start} bytes, found {}", bytes.len())));
    };
    let header: Header = serde_json::from_slice(header).map_err(|error| wrong(format!("header: {error}")))?;
    let data = bytes.len() - start;
    let mut entries = BTreeMap::new();
    let mut spans = Vec::with_capacity(header.tensors.len());
    for (name, HeaderEntry { dtype: stored, shape, data_offsets: [begin, end] }) in header.tensors {
        let fault = |expected: String, found: String| Error::Tensor {
            file: path.display().to_string(),
            tensor: name.clone(),
            expected,
            found,
        };
        let info = TensorInfo { shape, dtype: dtype(&stored) };
        let size = info.elements().and_then(|count| count.checked_mul(info.dtype.size()));
        if begin > end || end > data {
            let expected = format!("bytes inside the file's {data} bytes of numbers (is it cut off?)");
            return Err(fault(expected, format!("bytes {begin} to {end}")));
        }
        // Types this crate does not know may be packed more tightly than a byte a number: they are listed as they are.
        if size != Some(end - begin) && !matches!(info.dtype, StoredDtype::Other(_)) {
            return Err(fault(
                format!("as many bytes as {stored} of shape {:?} takes", info.shape),
                format!("{} bytes", end - begin),
            ));
        }
        spans.push((begin, end, name.clone()));
        entries.insert(name, Entry { info, place: Place::At(start + begin) });
    }
    spans.sort();
    let mut before = 0;
    for (begin, end, name) in &spans {
        if *begin != before {
            return Err(wrong(format!("tensor `{name}` begins at byte {begin}, expected {before}")));
        }
        before = *end;
    }
    if before != data {
        return Err(wrong(format!("{data} bytes of numbers, of which tensors fill {before}")));
    }
    Ok(Contents { entries, metadata: header.metadata })
}

/// Writes tensors as a safetensors file, one after the other, so that beside those given no memory is taken. The file is
/// written under a hidden name and renamed, so it is whole or absent.
///
/// # Errors
/// [`Error::Io`] where the file cannot be written; [`Error::Tensor`] for a type that has no stored form.
pub fn write(
    path: impl AsRef<Path>,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let mut header = serde_json::Map::new();
    let mut metadata = metadata.clone();
    // What transformers and diffusers ask of a file before they load it.
    metadata.entry("format".into()).or_insert("pt".into());
    header.insert("__metadata__".into(), serde_json::json!(metadata));
    let mut end = 0usize;
    for (name, tensor) in tensors {
        let stored = stored_dtype(path, name, tensor)?;
        let begin = end;
        end += tensor.elem_count() * stored.size();
        header.insert(
            name.clone(),
            serde_json::json!({"dtype": stored.name(), "shape": tensor.dims(), "data_offsets": [begin, end]}),
        );
    }
    let mut header = serde_json::Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    write_whole(path, |file| {
        let written = Error::io("write", path);
        let mut put = || -> std::io::Result<Result<()>> {
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(header.as_bytes())?;
            for tensor in tensors.values() {
                match bytes_of(tensor) {
                    Ok(bytes) => file.write_all(&bytes)?,
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(Ok(()))
        };
        put().map_err(written)?
    })
}

/// The stored form of a tensor's type.
pub(super) fn stored_dtype(path: &Path, name: &str, tensor: &Tensor) -> Result<StoredDtype> {
    StoredDtype::of(tensor.dtype()).ok_or_else(|| Error::Tensor {
        file: path.display().to_string(),
        tensor: name.to_string(),
        expected: "a type that files can store".into(),
        found: format!("{:?}", tensor.dtype()),
    })
}

/// A tensor's numbers as little-endian bytes, in order.
pub(super) fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    use candle_core::DType;
    macro_rules! bytes {
        ($kind:ty) => {{
            let numbers = tensor.flatten_all()?.to_vec1::<$kind>()?;
            let mut bytes = Vec::with_capacity(numbers.len() * size_of::<$kind>());
            numbers.iter().for_each(|number| bytes.extend_from_slice(&number.to_le_bytes()));
            bytes
        }};
    }
    Ok(match tensor.dtype() {
        DType::U8 => tensor.flatten_all()?.to_vec1::<u8>()?,
        DType::I16 => bytes!(i16),
        DType::I32 => bytes!(i32),
        DType::I64 => bytes!(i64),
        DType::F16 => bytes!(half::f16),
        DType::BF16 => bytes!(half::bf16),
        DType::F32 => bytes!(f32),
        DType::F64 => bytes!(f64),
        other => return Err(Error::argument("write", "tensors", "a type that files can store", format!("{other:?}"))),
    })
}

/// Writes a file under a hidden name beside its place, brings it to disk, and renames it.
pub(super) fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut std::io::BufWriter<std::fs::File>) -> Result<()>,
) -> Result<()> {
    let Some(name) = path.file_name() else {
        return Err(format_error(path, "expected the name of a file to write"));
    };
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(Error::io("create the folder", folder))?;
    }
    let partial = path.with_file_name(format!(".{}.partial", name.to_string_lossy()));
    let result = (|| {
        let file = std::fs::File::create(&partial).map_err(Error::io("create the file", &partial))?;
        let mut buffered = std::io::BufWriter::with_capacity(1 << 20, file);
        write(&mut buffered)?;
        let file = buffered.into_inner().map_err(|error| error.into_error()).map_err(Error::io("write", &partial))?;
        file.sync_all().map_err(Error::io("write to disk", &partial))?;
        std::fs::rename(&partial, path).map_err(Error::io("rename to its final name", &partial))
    })();
    if result.is_err() {
        // What matters is the first error; a partial file that cannot be removed is found by its name.
        let _ = std::fs::remove_file(&partial);
    }
    result
}

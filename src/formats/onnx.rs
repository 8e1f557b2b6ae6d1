//! The initialisers of an ONNX model: `ModelProto.graph.initializer`, as much of protobuf as that takes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::info::{StoredDtype, TensorInfo};
use super::tensor_file::{Contents, Entry, Place, format_error};
use crate::{Error, Result};

// Field numbers of onnx.proto.
const MODEL_GRAPH: u64 = 7;
const GRAPH_INITIALIZER: u64 = 5;
const TENSOR_DIMS: u64 = 1;
const TENSOR_DATA_TYPE: u64 = 2;
const TENSOR_FLOAT_DATA: u64 = 4;
const TENSOR_INT32_DATA: u64 = 5;
const TENSOR_INT64_DATA: u64 = 7;
const TENSOR_NAME: u64 = 8;
const TENSOR_RAW_DATA: u64 = 9;
const TENSOR_DOUBLE_DATA: u64 = 10;
const TENSOR_DATA_LOCATION: u64 = 14;

/// Whole numbers that are not in `raw_data` are shapes and indices: few.
const MOST_DECODED: usize = 64 << 20;

/// A field of a message: its number, and a number or the place of its bytes.
enum Field {
    Number(u64, u64),
    Bytes(u64, usize, usize),
}

/// A message: a range of the file.
#[derive(Clone, Copy)]
struct Message<'a> {
    bytes: &'a [u8],
    at: usize,
    end: usize,
}

fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut number = 0u64;
    for i in 0..10 {
        let byte = *bytes.get(*at)?;
        *at += 1;
        number |= u64::from(byte & 0x7f).checked_shl(7 * i)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

impl Message<'_> {
    /// The next field; `Some(None)` at the end of the message, `None` where it is damaged.
    fn next(&mut self) -> Option<Option<Field>> {
        if self.at == self.end {
            return Some(None);
        }
        let bytes = self.bytes.get(..self.end)?;
        let key = varint(bytes, &mut self.at)?;
        let number = key >> 3;
        let fixed = |this: &mut Self, length: usize| {
            let start = this.at;
            this.at = start.checked_add(length).filter(|end| *end <= this.end)?;
            Some(Some(Field::Bytes(number, start, this.at)))
        };
        match key & 7 {
            0 => Some(Some(Field::Number(number, varint(bytes, &mut self.at)?))),
            1 => fixed(self, 8),
            2 => {
                let length = usize::try_from(varint(bytes, &mut self.at)?).ok()?;
                fixed(self, length)
            }
            5 => fixed(self, 4),
            _ => None,
        }
    }

    fn part(&self, at: usize, end: usize) -> Self {
        Message { bytes: self.bytes, at, end }
    }
}

pub(super) fn contents(path: &Path, bytes: &[u8]) -> Result<Contents> {
    let damaged = || format_error(path, "not a whole ONNX model (is the file cut off?)");
    let mut entries = BTreeMap::new();
    let (mut model, mut graphs) = (Message { bytes, at: 0, end: bytes.len() }, 0);
    while let Some(field) = model.next().ok_or_else(damaged)? {
        let Field::Bytes(MODEL_GRAPH, at, end) = field else { continue };
        graphs += 1;
        let mut graph = model.part(at, end);
        while let Some(field) = graph.next().ok_or_else(damaged)? {
            let Field::Bytes(GRAPH_INITIALIZER, at, end) = field else { continue };
            let (name, entry) = tensor(path, graph.part(at, end))?;
            if entries.insert(name.clone(), entry).is_some() {
                return Err(format_error(path, format!("two initialisers of the name `{name}`")));
            }
        }
    }
    if graphs != 1 {
        return Err(format_error(path, format!("not an ONNX model: {graphs} graphs, expected 1")));
    }
    Ok(Contents { entries, metadata: BTreeMap::new() })
}

/// The numbers of a tensor, as found.
#[derive(Default)]
struct Data {
    /// Little-endian numbers in the file.
    raw: Option<(usize, usize)>,
    /// Numbers that had to be decoded, or collected from several fields.
    decoded: Vec<u8>,
}

fn tensor(path: &Path, mut message: Message<'_>) -> Result<(String, Entry)> {
    let bytes = message.bytes;
    let damaged = || format_error(path, "a damaged initialiser (is the file cut off?)");
    let (mut name, mut shape, mut kind, mut external) = (String::new(), Vec::new(), 0, false);
    let mut data = Data::default();
    let count = |number: u64| usize::try_from(number).ok();
    while let Some(field) = message.next().ok_or_else(damaged)? {
        match field {
            Field::Number(TENSOR_DIMS, number) => shape.push(count(number).ok_or_else(damaged)?),
            Field::Bytes(TENSOR_DIMS, mut at, end) => {
                while at < end {
                    shape.push(varint(&bytes[..end], &mut at).and_then(count).ok_or_else(damaged)?);
                }
            }
            Field::Number(TENSOR_DATA_TYPE, number) => kind = number,
            Field::Number(TENSOR_DATA_LOCATION, number) => external = number != 0,
            Field::Bytes(TENSOR_NAME, at, end) => {
                name = std::str::from_utf8(&bytes[at..end]).map_err(|_| damaged())?.to_string();
            }
            Field::Bytes(TENSOR_RAW_DATA, at, end) => data.raw = Some((at, end)),
            // Packed, one field holds all, as it would lie in `raw_data`; unpacked, each number is a field.
            Field::Bytes(TENSOR_FLOAT_DATA | TENSOR_DOUBLE_DATA, at, end) => {
                if data.raw.is_none() && data.decoded.is_empty() {
                    data.raw = Some((at, end));
                } else {
                    if let Some((at, end)) = data.raw.take() {
                        data.decoded.extend_from_slice(&bytes[at..end]);
                    }
                    data.decoded.extend_from_slice(&bytes[at..end]);
                }
            }
            Field::Number(TENSOR_INT64_DATA, number) => data.decoded.extend(number.to_le_bytes()),
            Field::Bytes(TENSOR_INT64_DATA, mut at, end) => {
                while at < end {
                    let number = varint(&bytes[..end], &mut at).ok_or_else(damaged)?;
                    data.decoded.extend(number.to_le_bytes());
                }
            }
            Field::Bytes(TENSOR_INT32_DATA, mut at, end) => {
                // Also the bits of f16, and u8: the width is known once the type is, so all are kept as 32 bits first.
                while at < end {
                    let number = varint(&bytes[..end], &mut at).ok_or_else(damaged)?;
                    data.decoded.extend((number as u32).to_le_bytes());
                }
            }
            Field::Number(TENSOR_INT32_DATA, number) => data.decoded.extend((number as u32).to_le_bytes()),
            _ => {}
        }
        // Numbers of variable length are longer decoded than stored.
        if data.decoded.len() > MOST_DECODED {
            return Err(format_error(path, format!("more than {MOST_DECODED} bytes outside of `raw_data`")));
        }
    }
    let dtype = match kind {
        1 => StoredDtype::F32,
        2 => StoredDtype::U8,
        3 => StoredDtype::I8,
        5 => StoredDtype::I16,
        6 => StoredDtype::I32,
        7 => StoredDtype::I64,
        9 => StoredDtype::Bool,
        10 => StoredDtype::F16,
        11 => StoredDtype::F64,
        16 => StoredDtype::BF16,
        4 => StoredDtype::Other(2),
        12 => StoredDtype::Other(4),
        13 | 14 => StoredDtype::Other(8),
        _ => StoredDtype::Other(1),
    };
    let info = TensorInfo { shape, dtype };
    let fault = |expected: &str, found: String| Error::Tensor {
        file: path.display().to_string(),
        tensor: name.clone(),
        expected: expected.into(),
        found,
    };
    if external {
        return Err(fault("numbers in the file itself", "numbers in another file (external data)".into()));
    }
    let size = info.elements().and_then(|count| count.checked_mul(dtype.size()));
    let size = size.ok_or_else(|| fault("a possible size", format!("shape {:?}", info.shape)))?;
    let place = match data.raw {
        Some((at, end)) if end - at == size => Place::At(at),
        Some((at, end)) => return Err(fault(&format!("{size} bytes"), format!("{} bytes", end - at))),
        None => {
            let wide = matches!(dtype, StoredDtype::F16 | StoredDtype::BF16 | StoredDtype::I16);
            let narrow = matches!(dtype, StoredDtype::U8 | StoredDtype::I8 | StoredDtype::Bool);
            let decoded = match (wide, narrow) {
                (true, _) => data.decoded.chunks_exact(4).flat_map(|number| [number[0], number[1]]).collect(),
                (_, true) => data.decoded.chunks_exact(4).map(|number| number[0]).collect(),
                _ => data.decoded,
            };
            if decoded.len() != size && !matches!(dtype, StoredDtype::Other(_)) {
                return Err(fault(&format!("{size} bytes"), format!("{} bytes", decoded.len())));
            }
            Place::Inline(Arc::new(decoded))
        }
    };
    Ok((name, Entry { info, place }))
}

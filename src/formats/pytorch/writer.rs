//! Writing PyTorch's zip format, so that `torch.load` (also with `weights_only=True`) reads it.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use candle_core::Tensor;

use super::super::info::{StoredDtype, TensorInfo};
use super::super::safetensors::{bytes_of, write_whole};
use super::super::tensor_file::format_error;
use super::storage::{contiguous_strides, storage_class};
use crate::{Error, Result};

/// What a PyTorch file holds: tensors in nested dictionaries.
#[derive(Clone, Debug)]
pub enum Node {
    /// A dictionary, in this order.
    Dict(Vec<(String, Node)>),
    /// A tensor of this shape and type, whose numbers are those of the storage of this name. Tensors that name the same
    /// storage share it, as aliases in a state dictionary do.
    Tensor(TensorInfo, String),
}

/// Writes a file in PyTorch's zip format. `load` is asked once for each storage, one after the other, so that memory
/// holds one tensor at a time.
///
/// # Errors
/// [`Error::Io`] where the file cannot be written; [`Error::Tensor`] where a loaded tensor is not as its node says;
/// those of `load`.
pub fn write(path: impl AsRef<Path>, root: &Node, mut load: impl FnMut(&str) -> Result<Tensor>) -> Result<()> {
    let path = path.as_ref();
    let mut pickle = Pickle { bytes: vec![0x80, 2], keys: HashMap::new(), storages: Vec::new() };
    pickle.node(path, root)?;
    pickle.bytes.push(b'.');
    write_whole(path, |file| {
        let mut archive = Archive { file, path, at: 0, entries: Vec::new() };
        archive.member("archive/data.pkl", &pickle.bytes)?;
        archive.member("archive/byteorder", b"little")?;
        for (key, (storage, info)) in pickle.storages.iter().enumerate() {
            let tensor = load(storage)?;
            if tensor.dims() != info.shape || StoredDtype::of(tensor.dtype()) != Some(info.dtype) {
                return Err(Error::Tensor {
                    file: path.display().to_string(),
                    tensor: storage.clone(),
                    expected: format!("{} {:?}", info.dtype.name(), info.shape),
                    found: format!("{:?} {:?}", tensor.dtype(), tensor.dims()),
                });
            }
            archive.member(&format!("archive/data/{key}"), &bytes_of(&tensor)?)?;
        }
        archive.member("archive/version", b"3\n")?;
        archive.finish()
    })
}

/// The pickle that describes the tensors.
struct Pickle<'a> {
    bytes: Vec<u8>,
    keys: HashMap<&'a str, usize>,
    storages: Vec<(String, &'a TensorInfo)>,
}

impl<'a> Pickle<'a> {
    fn text(&mut self, text: &str) {
        self.bytes.push(b'X');
        self.bytes.extend((text.len() as u32).to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }

    fn number(&mut self, number: usize) {
        match i32::try_from(number) {
            Ok(number) => {
                self.bytes.push(b'J');
                self.bytes.extend(number.to_le_bytes());
            }
            Err(_) => {
                self.bytes.extend([0x8a, 8]);
                self.bytes.extend((number as i64).to_le_bytes());
            }
        }
    }

    fn numbers(&mut self, numbers: &[usize]) {
        self.bytes.push(b'(');
        numbers.iter().for_each(|number| self.number(*number));
        self.bytes.push(b't');
    }

    fn node(&mut self, path: &Path, node: &'a Node) -> Result<()> {
        match node {
            Node::Dict(entries) => {
                self.bytes.extend(b"}(");
                for (key, value) in entries {
                    self.text(key);
                    self.node(path, value)?;
                }
                self.bytes.push(b'u');
            }
            Node::Tensor(info, storage) => {
                let next = self.storages.len();
                let key = *self.keys.entry(storage).or_insert(next);
                if key == next {
                    self.storages.push((storage.clone(), info));
                }
                let class = storage_class(info.dtype);
                let class = class.ok_or_else(|| format_error(path, format!("{storage}: {}", info.dtype.name())))?;
                let elements = info.elements().unwrap_or(0);
                self.bytes.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
                self.text("storage");
                self.bytes.extend(format!("ctorch\n{class}\n").as_bytes());
                self.text(&key.to_string());
                self.text("cpu");
                self.number(elements);
                self.bytes.extend(b"tQ");
                self.number(0);
                self.numbers(&info.shape);
                self.numbers(&contiguous_strides(&info.shape));
                self.bytes.extend(b"\x89ccollections\nOrderedDict\n)RtR");
            }
        }
        Ok(())
    }
}

struct ArchiveEntry {
    name: String,
    crc: u32,
    size: u32,
    at: u64,
}

/// A zip file of stored members, with the 64-bit extension where it is longer than 4 GB.
struct Archive<'a, W: Write> {
    file: &'a mut W,
    path: &'a Path,
    at: u64,
    entries: Vec<ArchiveEntry>,
}

/// What a field holds whose value is in the 64-bit extension.
const SEE_64: u32 = u32::MAX;

impl<W: Write> Archive<'_, W> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", self.path))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn member(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let size = u32::try_from(bytes.len()).ok().filter(|size| *size != SEE_64);
        let size = size.ok_or_else(|| format_error(self.path, format!("`{name}`: more than 4 GB in one tensor")))?;
        let entry = ArchiveEntry { name: name.to_string(), crc: crc32fast::hash(bytes), size, at: self.at };
        // Numbers begin at multiples of 64 bytes, as PyTorch's reader maps them.
        let unpadded = self.at + 30 + name.len() as u64 + 4;
        let padding = (64 - unpadded % 64) % 64;
        let mut header = b"PK\x03\x04".to_vec();
        header.extend(common_fields(&entry));
        header.extend((name.len() as u16).to_le_bytes());
        header.extend((4 + padding as u16).to_le_bytes());
        header.extend(name.as_bytes());
        header.extend(b"FB");
        header.extend((padding as u16).to_le_bytes());
        header.extend(std::iter::repeat_n(b'Z', padding as usize));
        self.put(&header)?;
        self.entries.push(entry);
        self.put(bytes)
    }

    fn finish(mut self) -> Result<()> {
        let start = self.at;
        for entry in std::mem::take(&mut self.entries) {
            let at = u32::try_from(entry.at).unwrap_or(SEE_64);
            let mut extra = Vec::new();
            if at == SEE_64 {
                extra.extend([1, 0, 8, 0]);
                extra.extend(entry.at.to_le_bytes());
            }
            let mut record = b"PK\x01\x02\x2d\x00".to_vec();
            record.extend(common_fields(&entry));
            record.extend((entry.name.len() as u16).to_le_bytes());
            record.extend((extra.len() as u16).to_le_bytes());
            // No comment; disk 0; no attributes.
            record.extend([0; 10]);
            record.extend(at.to_le_bytes());
            record.extend(entry.name.as_bytes());
            record.extend(extra);
            self.put(&record)?;
            self.entries.push(entry);
        }
        let (count, size, end_64) = (self.entries.len() as u64, self.at - start, self.at);
        // The 64-bit end record is always there, as in PyTorch's own files.
        let mut end = b"PK\x06\x06".to_vec();
        end.extend(44u64.to_le_bytes());
        end.extend([0x2d, 0, 0x2d, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for field in [count, count, size, start] {
            end.extend(field.to_le_bytes());
        }
        end.extend(b"PK\x06\x07\0\0\0\0");
        end.extend(end_64.to_le_bytes());
        end.extend(1u32.to_le_bytes());
        end.extend(b"PK\x05\x06\0\0\0\0");
        let short = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        end.extend(short);
        end.extend(short);
        for field in [size, start] {
            end.extend(u32::try_from(field).unwrap_or(SEE_64).to_le_bytes());
        }
        end.extend([0, 0]);
        self.put(&end)
    }
}

/// Version, flags, method, time, date, checksum and sizes: alike in both kinds of header.
fn common_fields(entry: &ArchiveEntry) -> Vec<u8> {
    let mut fields = Vec::new();
    // Version 4.5; names are UTF-8; stored; 1 January 1980.
    for field in [0x2du16, 0x800, 0, 0, 0x21] {
        fields.extend(field.to_le_bytes());
    }
    for field in [entry.crc, entry.size, entry.size] {
        fields.extend(field.to_le_bytes());
    }
    fields
}

//! A file, or a set of files, of named tensors.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use memmap2::Mmap;

use super::info::{StoredDtype, TensorInfo};
use super::{onnx, pytorch, safetensors};
use crate::{Error, Result};

/// Where a tensor's numbers lie.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// In the mapped file, one after the other, from this byte.
    At(usize),
    /// In the mapped file, from this byte, with these strides in numbers.
    Strided { start: usize, strides: Vec<usize> },
    /// Decoded while the file was opened.
    Inline(Arc<Vec<u8>>),
}

/// A tensor of one file, as a format's reader finds it. Readers make sure that it lies inside the file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub info: TensorInfo,
    pub place: Place,
}

/// What a format's reader makes of the bytes of a file.
#[derive(Default)]
pub(super) struct Contents {
    pub entries: BTreeMap<String, Entry>,
    pub metadata: BTreeMap<String, String>,
}

/// A mapped file.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    map: Mmap,
    #[cfg(all(feature = "cuda", unix))]
    file: File,
}

impl Part {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let about = file.metadata().map_err(Error::io("read", path))?;
        if !about.is_file() {
            return Err(format_error(path, "expected a file of tensors, found a folder or a device"));
        }
        if about.len() == 0 {
            return Err(format_error(path, "the file is empty"));
        }
        // SAFETY: the map is only read. The file must not be changed while it is open, as every program that maps
        // checkpoints assumes; this crate itself replaces files by renaming and never writes into them.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map into memory", path))?;
        Ok(Part {
            path: path.to_path_buf(),
            map,
            #[cfg(all(feature = "cuda", unix))]
            file,
        })
    }

    fn contents(&self) -> Result<Contents> {
        let (path, bytes) = (&self.path, &self.map[..]);
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        match bytes {
            [b'P', b'K', 3 | 5, ..] => pytorch::contents(path, bytes),
            _ if bytes.starts_with(pytorch::LEGACY_MAGIC) => pytorch::legacy_contents(path, bytes),
            [0x80, 2..=5, ..] => Err(format_error(path, "a bare pickle, which is no file of tensors")),
            _ if extension.eq_ignore_ascii_case("onnx") => onnx::contents(path, bytes),
            [_, _, _, _, _, _, _, _, b'{', ..] => safetensors::contents(path, bytes),
            _ if extension.eq_ignore_ascii_case("safetensors") => safetensors::contents(path, bytes),
            [b'v', b'e', b'r', b's', b'i', b'o', b'n', b' ', ..] if bytes.len() < 1024 => {
                Err(format_error(path, "a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`"))
            }
            _ => Err(format_error(path, "neither a safetensors file, nor a PyTorch zip file, nor (by its name) ONNX")),
        }
    }

    /// Lets go of the pages a tensor was copied from, so that reading a file tensor by tensor holds one of them twice
    /// and not the whole file.
    fn forget(&self, start: usize, length: usize) {
        #[cfg(unix)]
        {
            // A page fault maps its neighbours too, up to the largest block of the page cache: whole blocks go, not
            // just the tensor.
            const WINDOW: usize = 2 << 20;
            let from = start & !(WINDOW - 1);
            let to = (start + length).next_multiple_of(WINDOW).min(self.map.len());
            // SAFETY: the map is a read-only map of a file: pages that are let go of are read again when touched.
            // That this fails costs memory and nothing else.
            let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from) };
        }
        #[cfg(not(unix))]
        let _ = (start, length);
    }
}

/// An [`Error::Format`].
pub(super) fn format_error(path: &Path, reason: impl Into<String>) -> Error {
    Error::Format { path: path.to_path_buf(), reason: reason.into() }
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    parts: Vec<Part>,
    /// Part and entry, by name.
    entries: BTreeMap<String, (usize, Entry)>,
    metadata: BTreeMap<String, String>,
}

/// Named tensors in a file or in several, in any format this crate reads. Cheap to clone.
///
/// Opening reads the table of contents; tensors are read when asked for.
#[derive(Clone, Debug)]
pub struct TensorFile {
    inner: Arc<Inner>,
}

impl TensorFile {
    /// Opens a file: safetensors, PyTorch's formats (nested dictionaries become names with dots), ONNX, or the
    /// `.index.json` of a sharded checkpoint. The format is told by the content.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be read; [`Error::Format`] where it is cut off, corrupt, hostile, of absurd
    /// sizes or of an unknown format; [`Error::Tensor`] naming the tensor where only one is at fault.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.extension().is_some_and(|extension| extension == "json") {
            return Self::open_sharded(path);
        }
        let part = Part::open(path)?;
        let Contents { entries, metadata } = part.contents()?;
        let entries = entries.into_iter().map(|(name, entry)| (name, (0, entry))).collect();
        Ok(Self::new(Inner { path: path.to_path_buf(), parts: vec![part], entries, metadata }))
    }

    fn new(inner: Inner) -> Self {
        TensorFile { inner: Arc::new(inner) }
    }

    /// Opens all shards that an index (`{"weight_map": {tensor: file}}`) names.
    fn open_sharded(index: &Path) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = read_text(index, 16 << 20)?;
        let Index { weight_map } = serde_json::from_str(&text)
            .map_err(|error| format_error(index, format!("not the index of a sharded checkpoint: {error}")))?;
        let folder = index.parent().unwrap_or(Path::new(""));
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &weight_map {
            shards.entry(shard).or_default().push(tensor);
        }
        let (mut parts, mut entries) = (Vec::new(), BTreeMap::new());
        for (i, (shard, names)) in shards.into_iter().enumerate() {
            if Path::new(shard).components().count() != 1 || shard.contains(['/', '\\']) || shard == ".." {
                let reason = format!("shard `{shard}`: expected the name of a file in the same folder");
                return Err(format_error(index, reason));
            }
            let part = Part::open(&folder.join(shard))?;
            let mut contents = part.contents()?;
            for name in names {
                let entry = contents.entries.remove(name).ok_or_else(|| Error::Tensor {
                    file: part.path.display().to_string(),
                    tensor: name.to_string(),
                    expected: format!("a tensor, as {} says", index.display()),
                    found: "nothing".into(),
                })?;
                entries.insert(name.to_string(), (i, entry));
            }
            if let Some(extra) = contents.entries.keys().next() {
                return Err(Error::Tensor {
                    file: part.path.display().to_string(),
                    tensor: extra.clone(),
                    expected: format!("only tensors that {} names", index.display()),
                    found: "one that it does not name".into(),
                });
            }
            parts.push(part);
        }
        Ok(Self::new(Inner { path: index.to_path_buf(), parts, entries, metadata: BTreeMap::new() }))
    }

    /// The file, or the index of the shards.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.inner.entries.keys().map(String::as_str)
    }

    /// Shape and type of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.inner.entries.get(name).map(|(_, entry)| &entry.info)
    }

    /// Names, shapes and types of all tensors, sorted by name.
    pub fn infos(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.inner.entries.iter().map(|(name, (_, entry))| (name.as_str(), &entry.info))
    }

    /// How many tensors.
    pub fn len(&self) -> usize {
        self.inner.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.inner.entries.is_empty()
    }

    /// The free-form notes of a safetensors file (`__metadata__`); empty for other formats.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.inner.metadata
    }

    /// An [`Error::Tensor`] about a tensor of this file.
    pub(crate) fn fault(&self, tensor: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        let file = match self.inner.entries.get(tensor) {
            Some((part, _)) => &self.inner.parts[*part].path,
            None => &self.inner.path,
        };
        Error::Tensor {
            file: file.display().to_string(),
            tensor: tensor.to_string(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// Reads a tensor, in the type it is stored in.
    ///
    /// # Errors
    /// [`Error::Tensor`] where there is none of this name, or it is of a type that is not supported.
    pub fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        let Some((part, entry)) = self.inner.entries.get(name) else {
            return Err(self.fault(name, "a tensor", "nothing"));
        };
        #[cfg(feature = "cuda")]
        if let (Device::Cuda(device), Some(upload)) = (device, self.upload(name))
            && let Some(tensor) = crate::cuda::upload_all(device, &[upload])?.pop()
        {
            return Ok(tensor);
        }
        let (part, info) = (&self.inner.parts[*part], &entry.info);
        let unsupported = || self.fault(name, "a supported type", info.dtype.name());
        let length = info.bytes().ok_or_else(|| self.fault(name, "a possible size", format!("{:?}", info.shape)))?;
        let gathered;
        let bytes: &[u8] = match &entry.place {
            Place::Inline(bytes) => bytes,
            Place::At(start) => {
                part.map.get(*start..start + length).ok_or_else(|| self.fault(name, "data", "a cut off file"))?
            }
            Place::Strided { start, strides } => {
                gathered = gather(&part.map[*start..], info, strides)
                    .ok_or_else(|| self.fault(name, "data", "a cut off file"))?;
                &gathered
            }
        };
        let tensor = match info.dtype {
            StoredDtype::I8 => {
                let numbers: Vec<i64> = bytes.iter().map(|byte| i64::from(*byte as i8)).collect();
                Tensor::from_vec(numbers, info.shape.as_slice(), device)?
            }
            dtype => {
                let dtype = dtype.candle().ok_or_else(unsupported)?;
                match length {
                    0 => Tensor::zeros(info.shape.as_slice(), dtype, device)?,
                    _ => Tensor::from_raw_buffer(bytes, dtype, &info.shape, device)?,
                }
            }
        };
        if let Place::At(start) = entry.place {
            part.forget(start, length);
        }
        Ok(tensor)
    }

    /// The names of the tensors that [`TensorFile::upload`] takes, as they come in the file.
    #[cfg(feature = "cuda")]
    pub(super) fn in_file_order(&self) -> Vec<String> {
        let mut places: Vec<(usize, usize, &String)> = Vec::with_capacity(self.len());
        for (name, (part, entry)) in &self.inner.entries {
            if let (Place::At(start), true) = (&entry.place, self.upload(name).is_some()) {
                places.push((*part, *start, name));
            }
        }
        places.sort();
        places.into_iter().map(|(_, _, name)| name.clone()).collect()
    }

    /// A floating-point tensor whose numbers lie one after the other in the file, for the GPU; `None` for others.
    #[cfg(feature = "cuda")]
    pub(super) fn upload(&self, name: &str) -> Option<crate::cuda::Upload<'_>> {
        use candle_core::DType;
        let (part, entry) = self.inner.entries.get(name)?;
        let (part, info) = (&self.inner.parts[*part], &entry.info);
        let dtype = info.dtype.candle().filter(|dtype| [DType::F32, DType::BF16, DType::F16].contains(dtype))?;
        let (Place::At(start), length @ 1..) = (&entry.place, info.bytes()?) else { return None };
        let bytes = part.map.get(*start..start.checked_add(length)?)?;
        // Read, not mapped; but of the map it is known that the file is as long.
        #[cfg(unix)]
        let bytes = crate::cuda::Bytes::File { file: &part.file, start: *start, length: bytes.len() };
        #[cfg(not(unix))]
        let bytes = crate::cuda::Bytes::Memory(bytes);
        Some(crate::cuda::Upload { dtype, shape: &info.shape, bytes })
    }

    /// Checks names and shapes of the whole file against what a network asks for, before any tensor is read.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming the first tensor that is missing, misshapen, or one too many.
    pub fn expect(&self, expected: &Expected<'_>) -> Result<()> {
        for (name, shape) in expected.shapes {
            let name = format!("{}{name}", expected.prefix);
            let wanted = || format!("shape {shape:?}");
            match self.info(&name) {
                None => return Err(self.fault(&name, wanted(), "nothing")),
                Some(info) if &info.shape != shape => {
                    return Err(self.fault(&name, wanted(), format!("shape {:?}", info.shape)));
                }
                Some(_) => {}
            }
        }
        let known = |name: &str| {
            let Some(rest) = name.strip_prefix(expected.prefix) else { return true };
            expected.shapes.contains_key(rest) || expected.ignored.iter().any(|ending| name.ends_with(ending))
        };
        match self.names().find(|name| !known(name)) {
            Some(extra) => {
                let shape = self.info(extra).map(|info| &info.shape);
                Err(self.fault(extra, "no tensor of this name", format!("one of shape {:?}", shape.unwrap_or(&vec![]))))
            }
            None => Ok(()),
        }
    }
}

/// What [`TensorFile::expect`] asks of a file.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// Where the network's tensors lie: names of the file that do not begin so are not looked at.
    pub prefix: &'a str,
    /// The network's tensors, by their names behind the prefix.
    pub shapes: &'a BTreeMap<String, Vec<usize>>,
    /// Endings of names that may be there without being used (`"position_ids"`).
    pub ignored: &'a [&'a str],
}

/// The numbers of a strided tensor, in order. `None` where one lies outside.
fn gather(bytes: &[u8], info: &TensorInfo, strides: &[usize]) -> Option<Vec<u8>> {
    let (size, count) = (info.dtype.size(), info.elements()?);
    let mut gathered = Vec::with_capacity(count.checked_mul(size)?);
    let mut index = vec![0usize; strides.len()];
    for _ in 0..count {
        let at = index.iter().zip(strides).map(|(i, stride)| i * stride).sum::<usize>() * size;
        gathered.extend_from_slice(bytes.get(at..at + size)?);
        for (i, length) in index.iter_mut().zip(&info.shape).rev() {
            *i += 1;
            if *i < *length {
                break;
            }
            *i = 0;
        }
    }
    Some(gathered)
}

/// Reads a text file that should not be longer than `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String> {
    let length = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
    if length > limit {
        return Err(format_error(path, format!("{length} bytes, expected at most {limit}")));
    }
    std::fs::read_to_string(path).map_err(Error::io("read", path))
}

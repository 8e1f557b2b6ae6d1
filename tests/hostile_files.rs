//! Files that are cut off, corrupt, hostile or absurd: each a typed error that names the file, before memory is taken.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use lcm_lookahead::Error;
use lcm_lookahead::formats::pytorch::{self, Node};
use lcm_lookahead::formats::{StoredDtype, TensorFile, TensorInfo, write_safetensors};

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/formats")).join(name)
}

/// The error that opening a file of this content gives, or reading one of its tensors.
fn refused(name: &str, content: &[u8]) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join(name);
    std::fs::write(&path, content)?;
    let opened = TensorFile::open(&path)
        .and_then(|file| file.names().try_for_each(|tensor| file.load(tensor, &Device::Cpu).map(drop)));
    let Err(error) = opened else { anyhow::bail!("{name}: accepted") };
    ensure!(matches!(error, Error::Format { .. } | Error::Tensor { .. } | Error::Io { .. }), "{error:?}");
    let text = error.to_string();
    ensure!(text.starts_with(&path.display().to_string()), "the file is not named: {text}");
    Ok(text)
}

fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// A zip file of PyTorch's shape around a pickle of our own, with one storage of four bytes.
fn with_pickle(pickle: &[u8]) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("x.pt");
    // A dictionary whose key is as long as the pickle makes room for it: the pickle is then put over it.
    let info = TensorInfo { shape: vec![1], dtype: StoredDtype::F32 };
    let key = "k".repeat(pickle.len().max(16));
    let root = Node::Dict(vec![(key.clone(), Node::Tensor(info, "s".into()))]);
    pytorch::write(&path, &root, |_| Ok(Tensor::zeros(1, DType::F32, &Device::Cpu)?))?;
    let mut bytes = std::fs::read(&path)?;
    let start = bytes.windows(2).position(|window| window == [0x80, 2]).expect("a pickle begins with its version");
    bytes[start..start + pickle.len()].copy_from_slice(pickle);
    Ok(bytes)
}

#[test]
fn a_pickle_that_would_run_a_command_is_refused_by_the_name_it_asks_for() -> Result<()> {
    let text = refused("hostile.pth", &std::fs::read(fixture("hostile.pth"))?)?;
    ensure!(text.contains("`posix.system`") && text.contains("nothing was executed"), "{text}");
    for (module, name) in [("builtins", "eval"), ("os", "system"), ("torch", "load"), ("torch.hub", "load")] {
        let mut pickle = vec![0x80, 2];
        pickle.extend(format!("c{module}\n{name}\n)R.").as_bytes());
        let text = refused("x.pt", &with_pickle(&pickle)?)?;
        ensure!(text.contains(&format!("`{module}.{name}`")), "{text}");
    }
    Ok(())
}

#[test]
fn pickles_that_are_damaged_or_absurd_end_in_an_error() -> Result<()> {
    let tensor = |count: &[u8], shape: &[u8], strides: &[u8]| {
        let mut pickle = b"\x80\x02}(X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((".to_vec();
        pickle.extend(b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" as &[u8]);
        pickle.extend(b"0X\x03\0\0\0cpu");
        pickle.extend(count);
        pickle.extend(b"tQK\0(");
        pickle.extend(shape);
        pickle.extend(b"t(");
        pickle.extend(strides);
        pickle.extend(b"t\x89)tRu.");
        pickle
    };
    let huge = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f";
    let two_to_40 = b"\x8a\x06\0\0\0\0\0\x01";
    let join = |parts: &[&[u8]]| parts.concat();
    // First, that such a tensor is read where it is right.
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("right.pt");
    std::fs::write(&path, with_pickle(&tensor(b"K\x01", b"K\x01", b"K\x01"))?)?;
    assert_eq!(TensorFile::open(&path)?.names().collect::<Vec<_>>(), ["a"]);

    let deep: Vec<u8> = join(&[b"\x80\x02", &[b'('; 5000], &[b't'; 5000], b"."]);
    let nested: Vec<u8> = join(&[b"\x80\x02", &b"]q\0"[..], &[b"]h\0a".as_slice(); 3000].concat(), b"."]);
    // Each dictionary holds the one before twice: 2^60 names from a few hundred bytes.
    let mut laughs = b"\x80\x02}q\0".to_vec();
    for i in 1..60u8 {
        laughs.extend([b'}', b'q', i, b'(', b'K', 0, b'h', i - 1, b'K', 1, b'h', i - 1, b'u']);
    }
    laughs.push(b'.');
    // A list that holds itself.
    let circle = b"\x80\x02]q\0h\0a.".to_vec();
    for (what, pickle) in [
        ("more numbers than its storage", tensor(huge, b"K\x01", b"K\x01")),
        ("a shape beyond its storage", tensor(b"K\x01", two_to_40, b"K\x01")),
        ("an expanded shape", tensor(b"K\x01", two_to_40, b"K\0")),
        ("a product that overflows", tensor(b"K\x01", &join(&[huge, huge]), &join(&[huge, huge]))),
        ("strides beyond its storage", tensor(b"K\x01", b"K\x01K\x01", b"K\x07")),
        ("a negative shape", tensor(b"K\x01", b"J\xff\xff\xff\xff", b"K\x01")),
        ("an absurd text", b"\x80\x02X\xff\xff\xff\xffabc".to_vec()),
        ("an absurd text of 64 bits", b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc".to_vec()),
        ("no end", b"\x80\x02}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}}\xff".to_vec()),
        ("operands that are not there", b"\x80\x02tttttttttttttttt".to_vec()),
        ("a reference to nothing", b"\x80\x02h\x07.".to_vec()),
        ("a mark below the stack", b"\x80\x02}(000000.".to_vec()),
        ("deep nesting", deep),
        ("deep lists", nested),
        ("a billion laughs", laughs),
        ("a circle", circle),
        ("a class instance", b"\x80\x02ccollections\nOrderedDict\n)\x81.".to_vec()),
    ] {
        let error = refused("x.pt", &with_pickle(&pickle)?);
        ensure!(error.is_ok(), "{what}: {error:?}");
    }
    Ok(())
}

#[test]
fn compressed_members_are_refused_whatever_they_claim() -> Result<()> {
    let mut bytes = std::fs::read(fixture("tensors.pth"))?;
    // Method and size in the table of contents at the end: 10 TB from a few bytes.
    let entries: Vec<usize> =
        bytes.windows(4).enumerate().filter(|(_, window)| window == b"PK\x01\x02").map(|(at, _)| at).collect();
    for at in entries {
        bytes[at + 10] = 8;
        bytes[at + 24..at + 28].copy_from_slice(&0xffff_fffeu32.to_le_bytes());
    }
    let text = refused("bomb.pth", &bytes)?;
    ensure!(text.contains("compressed") && text.contains("4294967294"), "{text}");
    Ok(())
}

#[test]
fn every_way_of_cutting_a_file_off_is_noticed() -> Result<()> {
    for name in ["tensors.pth", "legacy.pth", "ip_adapter.bin", "tensors.safetensors", "model.onnx"] {
        let whole = std::fs::read(fixture(name))?;
        let step = (whole.len() / 97).max(1);
        for length in (0..whole.len()).step_by(step) {
            refused(name, &whole[..length])?;
        }
        refused(name, &whole[..whole.len() - 1])?;
    }
    Ok(())
}

#[test]
fn flipped_bytes_never_panic() -> Result<()> {
    for name in ["tensors.pth", "legacy.pth", "tensors.safetensors", "model.onnx"] {
        let whole = std::fs::read(fixture(name))?;
        let folder = tempfile::tempdir()?;
        let path = folder.path().join(name);
        for at in (0..whole.len()).step_by(7) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            std::fs::write(&path, &bytes)?;
            if let Ok(file) = TensorFile::open(&path) {
                // Numbers may have changed, or a name; what matters is that nothing falls over.
                file.names().for_each(|tensor| drop(file.load(tensor, &Device::Cpu)));
            }
        }
    }
    Ok(())
}

#[test]
fn safetensors_headers_that_lie_are_refused() -> Result<()> {
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        safetensors(&format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#), 8)
    };
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("right.safetensors");
    std::fs::write(&path, entry("F32", "[2]", "[0,8]"))?;
    TensorFile::open(&path)?.load("a", &Device::Cpu)?;
    for (what, bytes) in [
        ("beyond the end", entry("F32", "[4]", "[0,16]")),
        ("absurd shape", entry("F32", "[4611686018427387904,4611686018427387904]", "[0,8]")),
        ("another size", entry("F32", "[3]", "[0,8]")),
        ("backwards", entry("F32", "[2]", "[8,0]")),
        ("negative", entry("F32", "[-2]", "[0,8]")),
        ("a hole", entry("F32", "[1]", "[4,8]")),
        ("bytes left over", entry("F32", "[1]", "[0,4]")),
        ("a type that cannot be loaded", entry("F8_E4M3", "[8]", "[0,8]")),
        ("an absurd header", u64::MAX.to_le_bytes().iter().copied().chain(*b"{}").collect()),
        ("no JSON", safetensors("{\"a\":", 0)),
    ] {
        let error = refused("x.safetensors", &bytes);
        ensure!(error.is_ok(), "{what}: {error:?}");
    }
    Ok(())
}

#[test]
fn pickles_pointers_and_other_files_are_told_apart() -> Result<()> {
    let bare = refused("x.pkl", b"\x80\x02cposix\nsystem\n.")?;
    ensure!(bare.contains("a bare pickle"), "{bare}");
    let pointer = refused("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n");
    ensure!(pointer.is_ok(), "{pointer:?}");
    let pointer = refused("model.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")?;
    ensure!(pointer.contains("git-lfs"), "{pointer}");
    refused("empty.safetensors", b"")?;
    refused("picture.bin", b"\x89PNG\r\n\x1a\n0000000000")?;
    Ok(())
}

#[test]
fn an_index_cannot_name_files_elsewhere_or_tensors_that_are_not_there() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let one = BTreeMap::from([("a".to_string(), Tensor::zeros(2, DType::F32, &Device::Cpu)?)]);
    write_safetensors(folder.path().join("one.safetensors"), &one, &BTreeMap::new())?;
    let index = folder.path().join("model.safetensors.index.json");
    let open = |map: &str| {
        std::fs::write(&index, format!("{{\"weight_map\": {map}}}"))?;
        anyhow::Ok(TensorFile::open(&index))
    };
    assert_eq!(open(r#"{"a": "one.safetensors"}"#)??.len(), 1);
    for (map, named) in [
        (r#"{"a": "../one.safetensors"}"#, "../one.safetensors"),
        (r#"{"a": "/etc/passwd"}"#, "/etc/passwd"),
        (r#"{"a": "one.safetensors", "b": "one.safetensors"}"#, "`b`"),
        (r#"{}"#, ""),
        (r#"{"a": "two.safetensors"}"#, "two.safetensors"),
    ] {
        match open(map)? {
            Ok(file) => ensure!(file.is_empty() && map == "{}", "{map}: accepted"),
            Err(error) => ensure!(error.to_string().contains(named), "{map}: {error}"),
        }
    }
    Ok(())
}

//! IP-Adapter Plus: the resampler under `image_proj`, the projections of the image tokens under `ip_adapter`, numbered
//! 1, 3, 5, ... over the blocks in the order down, up, middle. Published as nested dictionaries (`.bin`) and flat
//! (`.safetensors`); both have the names of [`crate::lookahead::FaceEncoder`]'s adapter branch.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::info::TensorInfo;
use super::pytorch::{self, Node};
use super::tensor_file::{TensorFile, format_error};
use super::{Expected, StoredDtype, safetensors};
use crate::models::ip_adapter::IpAdapter;
use crate::models::resampler::{self, Resampler};
use crate::models::unet::{self, UNet};
use crate::nn::Weights;
use crate::{Error, Result};

/// The width of a head in every published resampler; files do not say it.
const DIM_HEAD: usize = 64;
const PARTS: [&str; 2] = ["image_proj", "ip_adapter"];

/// An adapter, as a file has it.
#[derive(Clone, Debug)]
pub struct AdapterFile {
    /// The shape of the resampler, read off its tensors.
    pub resampler: resampler::Config,
    /// `image_proj.*` and `ip_adapter.*`, in the type they are stored in.
    pub tensors: BTreeMap<String, Tensor>,
}

/// Reads an adapter for a U-Net of this shape: `.safetensors`, or `.bin` with nested dictionaries.
///
/// # Errors
/// [`Error::Format`] where the file is no IP-Adapter Plus (the plain and the FaceID kinds have no resampler of this
/// kind); [`Error::Tensor`] where a tensor is missing, misshapen or one too many. Those of [`TensorFile::open`].
pub fn read(path: impl AsRef<Path>, unet: &unet::Config) -> Result<AdapterFile> {
    let file = TensorFile::open(path)?;
    let resampler = resampler_config(&file, "image_proj.")?;
    file.expect(&Expected { prefix: "", shapes: &shapes(&resampler, unet)?, ignored: &[] })?;
    let tensors = file.names().map(|name| Ok((name.to_string(), file.load(name, &Device::Cpu)?)));
    Ok(AdapterFile { resampler, tensors: tensors.collect::<Result<_>>()? })
}

/// Names and shapes of an adapter's tensors.
///
/// # Errors
/// [`Error::Config`] for a configuration that does not fit together.
pub fn shapes(resampler: &resampler::Config, unet: &unet::Config) -> Result<BTreeMap<String, Vec<usize>>> {
    let weights = Weights::shapes_only();
    Resampler::load(resampler, &weights.pp(PARTS[0]))?;
    IpAdapter::load(&UNet::load(unet, &Weights::shapes_only())?, &weights.pp(PARTS[1]))?;
    Ok(weights.shapes())
}

/// The shape of the resampler whose tensors lie behind a prefix.
///
/// # Errors
/// [`Error::Format`] where there is none.
pub(super) fn resampler_config(file: &TensorFile, prefix: &str) -> Result<resampler::Config> {
    let shape = |name: &str| file.info(&format!("{prefix}{name}")).map(|info| info.shape.as_slice());
    let depth = (0..=64).find(|i| shape(&format!("layers.{i}.0.to_q.weight")).is_none()).unwrap_or(0);
    let parts = (
        shape("latents"),
        shape("proj_in.weight"),
        shape("proj_out.weight"),
        shape("layers.0.0.to_q.weight"),
        shape("layers.0.1.1.weight"),
    );
    match parts {
        (
            Some(&[1, num_queries, dim]),
            Some(&[_, embedding_dim]),
            Some(&[output_dim, _]),
            Some(&[inner, _]),
            Some(&[wide, _]),
        ) if dim > 0 && inner > 0 && inner.is_multiple_of(DIM_HEAD.min(inner)) => {
            let dim_head = DIM_HEAD.min(inner);
            Ok(resampler::Config {
                dim,
                depth,
                dim_head,
                heads: inner / dim_head,
                num_queries,
                embedding_dim,
                output_dim,
                ff_mult: wide / dim,
            })
        }
        _ => {
            let names: Vec<&str> = file.names().filter(|name| name.starts_with(prefix)).take(3).collect();
            let found = if names.is_empty() { "nothing".to_string() } else { format!("`{}`, ...", names.join("`, `")) };
            Err(format_error(
                file.path(),
                format!("not an IP-Adapter Plus: expected the resampler's tensors at `{prefix}`, found {found}"),
            ))
        }
    }
}

/// Writes an adapter: nested dictionaries where the name ends in `.bin`, `.pt` or `.pth`, else safetensors. Other
/// tensors than `image_proj.*` and `ip_adapter.*` are left out.
///
/// # Errors
/// [`Error::Io`] where the file cannot be written; [`Error::Format`] where there are no such tensors.
pub fn write(path: impl AsRef<Path>, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let path = path.as_ref();
    let in_part = |part: &str| {
        let prefix = format!("{part}.");
        tensors.iter().filter(move |(name, _)| name.starts_with(&prefix))
    };
    if PARTS.iter().any(|part| in_part(part).next().is_none()) {
        return Err(format_error(path, "nothing to write: expected tensors `image_proj.*` and `ip_adapter.*`"));
    }
    if !is_pytorch(path) {
        let tensors: BTreeMap<String, Tensor> =
            PARTS.iter().flat_map(|part| in_part(part)).map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        return safetensors::write(path, &tensors, &BTreeMap::new());
    }
    let dict = |part: &&str| -> Result<(String, Node)> {
        let entries = in_part(part).map(|(name, tensor)| Ok((name[part.len() + 1..].to_string(), node(name, tensor)?)));
        Ok((part.to_string(), Node::Dict(entries.collect::<Result<_>>()?)))
    };
    let root = Node::Dict(PARTS.iter().map(dict).collect::<Result<_>>()?);
    pytorch::write(path, &root, |name| lookup(tensors, name))
}

/// Whether a file of this name should be PyTorch's.
pub(crate) fn is_pytorch(path: &Path) -> bool {
    path.extension().is_some_and(|extension| ["bin", "pt", "pth"].iter().any(|known| extension == *known))
}

/// A tensor in memory as an entry of a PyTorch file, stored under its name.
pub(super) fn node(name: &str, tensor: &Tensor) -> Result<Node> {
    let dtype = StoredDtype::of(tensor.dtype()).ok_or_else(|| {
        Error::argument("write", "tensors", "a type that files can store", format!("{:?}", tensor.dtype()))
    })?;
    Ok(Node::Tensor(TensorInfo { shape: tensor.dims().to_vec(), dtype }, name.to_string()))
}

pub(super) fn lookup(tensors: &BTreeMap<String, Tensor>, name: &str) -> Result<Tensor> {
    tensors.get(name).cloned().ok_or_else(|| Error::argument("write", "tensors", name, "nothing"))
}

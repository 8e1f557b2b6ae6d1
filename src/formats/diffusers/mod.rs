//! Folders as diffusers and transformers save them: for each component a folder with `config.json` and the weights, in
//! one file or in shards, in full or in a variant (`fp16`).

mod config;
mod json;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::tensor_file::{Expected, TensorFile, format_error};
use crate::Result;
use crate::nn::Weights;

pub use config::{
    autoencoder_kl_config, clip_text_config, clip_vision_config, noise_schedule, tiny_autoencoder_config, unet_config,
};
pub use json::JsonConfig;

/// What weights are called: by diffusers, by transformers, and before safetensors.
const STEMS: [(&str, &str); 4] = [
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
];

/// A pipeline's folder (`unet/`, `vae/`, `text_encoder/`, ...), or the folder of a single component.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
    variant: Option<String>,
}

impl Folder {
    /// The folder at a path. `variant` asks for the weights of this variant (`"fp16"`) in every component; without it
    /// the full weights are taken, or those of `fp16` where a component has no others.
    ///
    /// # Errors
    /// [`crate::Error::Format`] where there is no such folder.
    pub fn open(path: impl AsRef<Path>, variant: Option<&str>) -> Result<Self> {
        let path = path.as_ref();
        match path.is_dir() {
            true => Ok(Folder { path: path.to_path_buf(), variant: variant.map(str::to_string) }),
            false => Err(format_error(path, "expected a folder as diffusers saves it, found no folder")),
        }
    }

    /// The folder of a component; the folder itself for an empty name.
    ///
    /// # Errors
    /// [`crate::Error::Format`] where there is none.
    pub fn component(&self, name: &str) -> Result<Folder> {
        Folder::open(if name.is_empty() { self.path.clone() } else { self.path.join(name) }, self.variant.as_deref())
    }

    /// The folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The component's `config.json`.
    ///
    /// # Errors
    /// [`crate::Error::Io`] where it is missing, [`crate::Error::Format`] where it is no JSON object.
    pub fn config(&self) -> Result<JsonConfig> {
        JsonConfig::read(self.path.join("config.json"))
    }

    /// The file that holds the component's weights, or the index of its shards.
    ///
    /// # Errors
    /// [`crate::Error::Format`] naming the files that were looked for.
    pub fn weights_path(&self) -> Result<PathBuf> {
        let variants: &[Option<&str>] = match self.variant.as_deref() {
            Some(variant) => &[Some(variant)],
            None => &[None, Some("fp16")],
        };
        let names = variants.iter().flat_map(|variant| {
            STEMS.iter().flat_map(move |(stem, extension)| match variant {
                None => [format!("{stem}.{extension}"), format!("{stem}.{extension}.index.json")],
                Some(variant) => {
                    [format!("{stem}.{variant}.{extension}"), format!("{stem}.{extension}.index.{variant}.json")]
                }
            })
        });
        let names: Vec<String> = names.collect();
        let found = names.iter().map(|name| self.path.join(name)).find(|path| path.is_file());
        found.ok_or_else(|| format_error(&self.path, format!("no weights; looked for {}", names.join(", "))))
    }

    /// The component's weights, opened.
    ///
    /// # Errors
    /// Those of [`Folder::weights_path`] and [`TensorFile::open`].
    pub fn tensors(&self) -> Result<TensorFile> {
        TensorFile::open(self.weights_path()?)
    }

    /// The component's weights, for a network to load itself from, converted to `dtype`. `shapes` are the names and
    /// shapes that the network asks for ([`Weights::shapes`]): the whole file is compared with them before any tensor is
    /// read. Buffers that old versions saved (`position_ids`) may be there besides.
    ///
    /// # Errors
    /// Those of [`Folder::tensors`]; [`crate::Error::Tensor`] naming the first tensor that is missing, misshapen or one
    /// too many.
    pub fn weights(&self, shapes: &BTreeMap<String, Vec<usize>>, dtype: DType, device: &Device) -> Result<Weights> {
        let file = self.tensors()?;
        let shapes = as_the_file_names_them(&file, shapes);
        let shapes = &shapes;
        file.expect(&Expected { prefix: "", shapes, ignored: &["position_ids"] })?;
        Ok(Weights::from_file(file, dtype, device))
    }
}

/// The names and shapes that a network asks for, with the names of other versions where the file has these. The networks
/// look for both.
fn as_the_file_names_them(file: &TensorFile, shapes: &BTreeMap<String, Vec<usize>>) -> BTreeMap<String, Vec<usize>> {
    // transformers 5 writes a text encoder without projection without this prefix.
    let bare = file.info("embeddings.token_embedding.weight").is_some();
    // diffusers before 0.15 wrote the attention of autoencoders with these names.
    let old = file.names().any(|name| name.ends_with("mid_block.attentions.0.query.weight"));
    let attention = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];
    let name = |name: &String| match () {
        () if bare => name.strip_prefix("text_model.").unwrap_or(name).to_string(),
        () if old => attention.iter().fold(name.clone(), |name, (new, old)| name.replace(new, old)),
        () => name.clone(),
    };
    shapes.iter().map(|(asked, shape)| (name(asked), shape.clone())).collect()
}

//! The files of the ecosystem: reading them as they are, and writing what the original tools can read back.
//!
//! | file | reading | writing |
//! |---|---|---|
//! | safetensors, one file or shards with an index | [`TensorFile`] | [`write_safetensors`] |
//! | PyTorch's files (`.bin`, `.pt`, `.pth`), without executing anything | [`TensorFile`] | [`pytorch::write`] |
//! | ONNX initialisers | [`TensorFile`] | |
//! | diffusers folders with their `config.json` | [`diffusers::Folder`] | |
//! | LoRA of peft, diffusers and kohya | [`lora::LoraFile`] | [`lora::LoraFile::save`] |
//! | IP-Adapter Plus | [`ip_adapter::read`] | [`ip_adapter::write`] |
//! | face encoders of this crate, published or as checkpoints | [`EncoderFile`] | [`EncoderFile::save`] |
//! | face networks: IR-SE50, ArcFace, SFace, YuNet | [`faces`] | |
//! | the authors' released checkpoint | [`official::read`] | [`official::write`] |
//!
//! A file is mapped into memory, not read: opening one costs its table of contents, and a tensor costs its own bytes
//! when it is asked for. Whatever a file claims of sizes is checked against its length before memory is taken.

pub mod diffusers;
mod encoder;
pub mod faces;
mod info;
pub mod ip_adapter;
pub mod lora;
pub mod official;
mod onnx;
pub mod pytorch;
#[cfg(feature = "cuda")]
pub(crate) mod read_ahead;
mod safetensors;
mod tensor_file;

pub use encoder::{Content, EncoderFile};
pub use info::{StoredDtype, TensorInfo};
pub use safetensors::write as write_safetensors;
pub use tensor_file::{Expected, TensorFile};

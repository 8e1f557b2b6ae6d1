//! Where the layers of a network get their weights: from a file, frozen; or as variables, to be trained.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};

use super::Parameters;
use crate::formats::TensorFile;
#[cfg(feature = "cuda")]
use crate::formats::read_ahead::ReadAhead;
use crate::random::Address;
use crate::{Error, Result};

/// How a variable is filled when no saved value exists.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in ±1/sqrt(fan_in), PyTorch's default for linear and convolution layers.
    FanIn(usize),
}

#[derive(Debug)]
enum Source {
    Frozen {
        name: String,
        tensors: HashMap<String, Tensor>,
    },
    File {
        file: TensorFile,
        dtype: DType,
        device: Device,
        #[cfg(feature = "cuda")]
        ahead: ReadAhead,
    },
    Trainable {
        parameters: Parameters,
        seed: u64,
        dtype: DType,
        device: Device,
    },
    Random {
        dtype: DType,
        device: Device,
    },
    Shapes {
        seen: Mutex<BTreeMap<String, Vec<usize>>>,
    },
}

/// A place in a tree of named tensors, from which layers load themselves.
///
/// Plays the part of candle's `VarBuilder`, with errors that name the file and the tensor, and with the choice between
/// frozen tensors (never part of a graph) and variables made by the caller. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Weights {
    source: Arc<Source>,
    base: String,
    prefix: String,
}

impl Weights {
    /// Frozen weights from tensors in memory; `name` says in error messages where they came from.
    pub fn frozen(name: impl Into<String>, tensors: HashMap<String, Tensor>) -> Self {
        Self::root(Source::Frozen { name: name.into(), tensors })
    }

    /// Frozen weights from a file in any format that [`TensorFile::open`] reads, converted to `dtype`.
    ///
    /// # Errors
    /// Those of [`TensorFile::open`].
    pub fn from_safetensors(path: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self::from_file(TensorFile::open(path)?, dtype, device))
    }

    /// Frozen weights from an open file. Each tensor is read when a layer asks for it, and converted to `dtype`, so
    /// that memory never holds more than the layers that are loaded and one tensor; on a GPU, which reads ahead, and at
    /// most one GB.
    pub fn from_file(file: TensorFile, dtype: DType, device: &Device) -> Self {
        Self::root(Source::File {
            #[cfg(feature = "cuda")]
            ahead: ReadAhead::new(&file),
            file,
            dtype,
            device: device.clone(),
        })
    }

    /// Frozen weights from the bytes of a safetensors file, converted to `dtype`.
    ///
    /// # Errors
    /// [`Error::Format`] where the bytes are cut off or no safetensors file.
    pub fn from_safetensors_bytes(name: &str, bytes: &[u8], dtype: DType, device: &Device) -> Result<Self> {
        let format = |reason: String| Error::Format { path: name.into(), reason };
        let loaded = candle_core::safetensors::load_buffer(bytes, device)
            .map_err(|error| format(format!("not a whole safetensors file: {error}")))?;
        let tensors = loaded
            .into_iter()
            .map(|(key, tensor)| {
                let tensor = if tensor.dtype().is_float() { tensor.to_dtype(dtype)? } else { tensor };
                Ok((key, tensor))
            })
            .collect::<Result<_>>()?;
        Ok(Self::frozen(name, tensors))
    }

    /// Weights to be trained: each tensor a layer asks for is taken from `parameters` where it exists, or else made
    /// there and filled as the layer says, with draws addressed by `seed` and the tensor's name.
    pub fn trainable(parameters: &Parameters, seed: u64, dtype: DType, device: &Device) -> Self {
        Self::root(Source::Trainable { parameters: parameters.clone(), seed, dtype, device: device.clone() })
    }

    /// Frozen weights that are random: each tensor a layer asks for is drawn as if it were to be trained, on the device
    /// and by its generator. For measurements of networks whose published weights are not at hand.
    pub fn random(dtype: DType, device: &Device) -> Self {
        Self::root(Source::Random { dtype, device: device.clone() })
    }

    /// No weights at all: layers load tensors that take no memory, and [`Weights::shapes`] tells afterwards what they
    /// asked for.
    pub fn shapes_only() -> Self {
        Self::root(Source::Shapes { seen: Mutex::default() })
    }

    fn root(source: Source) -> Self {
        Weights { source: Arc::new(source), base: String::new(), prefix: String::new() }
    }

    /// The place `name` below this one.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        Weights { source: self.source.clone(), base: self.base.clone(), prefix: self.path(name) }
    }

    /// This place as the root of a network: paths below count from here, so that a network's layers have the same paths
    /// wherever its weights are stored.
    pub fn as_root(&self) -> Self {
        Weights { source: self.source.clone(), base: self.full_name(""), prefix: String::new() }
    }

    /// The path, from the network's root, of the tensor or layer `name` at this place; of the place itself for an
    /// empty name.
    pub fn path(&self, name: impl std::fmt::Display) -> String {
        join(&self.prefix, &name.to_string())
    }

    /// The name under which the tensor `name` at this place is stored.
    fn full_name(&self, name: &str) -> String {
        join(&self.base, &self.path(name))
    }

    /// All tensors that layers asked for so far, of weights made by [`Weights::shapes_only`]; empty for others.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        match &*self.source {
            Source::Shapes { seen } => seen.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            _ => BTreeMap::new(),
        }
    }

    /// Whether a tensor of this name exists; always true for weights that are made on demand.
    pub fn contains(&self, name: &str) -> bool {
        match &*self.source {
            Source::Frozen { tensors, .. } => tensors.contains_key(&self.full_name(name)),
            Source::File { file, .. } => file.info(&self.full_name(name)).is_some(),
            _ => true,
        }
    }

    /// The tensor `name`, of exactly this shape. Filled by `init` where it is a variable without a value.
    ///
    /// # Errors
    /// [`Error::Tensor`] where it is missing or has another shape.
    pub fn get(&self, shape: impl Into<Shape>, name: &str, init: Init) -> Result<Tensor> {
        let (shape, full) = (shape.into(), self.full_name(name));
        let mismatch = |file: &str, found: String| Error::Tensor {
            file: file.to_string(),
            tensor: full.clone(),
            expected: format!("shape {:?}", shape.dims()),
            found,
        };
        let check = |file: &str, tensor: Tensor| {
            if tensor.shape() == &shape {
                Ok(tensor)
            } else {
                Err(mismatch(file, format!("shape {:?}", tensor.dims())))
            }
        };
        match &*self.source {
            Source::Frozen { name, tensors } => match tensors.get(&full) {
                Some(tensor) => check(name, tensor.detach()),
                None => Err(mismatch(name, "nothing".into())),
            },
            Source::File { file, dtype, device, .. } => {
                match file.info(&full) {
                    Some(info) if info.shape == shape.dims() => {}
                    found => {
                        let found = found.map_or("nothing".into(), |info| format!("shape {:?}", info.shape));
                        return Err(file.fault(&full, format!("shape {:?}", shape.dims()), found));
                    }
                }
                #[cfg(feature = "cuda")]
                let tensor = self.read_ahead(&full)?.map_or_else(|| file.load(&full, device), Ok)?;
                #[cfg(not(feature = "cuda"))]
                let tensor = file.load(&full, device)?;
                Ok(if tensor.dtype().is_float() { tensor.to_dtype(*dtype)? } else { tensor })
            }
            Source::Trainable { parameters, seed, dtype, device } => {
                if let Some(variable) = parameters.get(&full) {
                    return check("the model's parameters", variable.as_tensor().clone());
                }
                let values = initial(*seed, &full, &shape, init, *dtype, device)?;
                let variable = Var::from_tensor(&values)?;
                parameters.insert(&full, variable.clone());
                Ok(variable.into_inner())
            }
            Source::Random { dtype, device } => drawn(&shape, init, *dtype, device),
            Source::Shapes { seen } => {
                seen.lock().unwrap_or_else(PoisonError::into_inner).insert(full.clone(), shape.dims().to_vec());
                Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?.broadcast_as(shape)?)
            }
        }
    }

    /// A tensor of a file on its way to a GPU; `None` where it is to be read by itself.
    #[cfg(feature = "cuda")]
    fn read_ahead(&self, name: &str) -> Result<Option<Tensor>> {
        match &*self.source {
            Source::File { file, device: Device::Cuda(device), ahead, .. } => ahead.get(file, name, device),
            _ => Ok(None),
        }
    }

    /// A convolution weight, stored as published `(out, in, height, width)`, in the order
    /// [`crate::ops::conv2d`] computes in: `(out, height, width, in)`. Frozen weights are reordered here, once; a
    /// variable is returned as stored, to be reordered when used, as its values change.
    pub(super) fn get_conv(&self, out: usize, inner: usize, kernel: usize, name: &str, init: Init) -> Result<Tensor> {
        let weight = self.get((out, inner, kernel, kernel), name, init)?;
        match &*self.source {
            Source::Frozen { .. } | Source::File { .. } | Source::Random { .. } => {
                Ok(weight.permute((0, 2, 3, 1))?.contiguous()?)
            }
            Source::Shapes { .. } => Ok(weight.permute((0, 2, 3, 1))?),
            Source::Trainable { .. } => Ok(weight),
        }
    }
}

fn join(prefix: &str, name: &str) -> String {
    match (prefix.is_empty(), name.is_empty()) {
        (true, _) => name.to_string(),
        (_, true) => prefix.to_string(),
        _ => format!("{prefix}.{name}"),
    }
}

/// A tensor filled by the device's own generator.
fn drawn(shape: &Shape, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
    let values = match init {
        Init::Zeros => return Ok(Tensor::zeros(shape, dtype, device)?),
        Init::Ones => return Ok(Tensor::ones(shape, dtype, device)?),
        Init::Normal(deviation) => Tensor::randn(0f32, deviation as f32, shape, device)?,
        Init::FanIn(fan_in) => {
            let bound = 1.0 / (fan_in.max(1) as f32).sqrt();
            Tensor::rand(-bound, bound, shape, device)?
        }
    };
    Ok(values.to_dtype(dtype)?)
}

fn initial(seed: u64, name: &str, shape: &Shape, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
    // The tensor's name takes the place of the step in the address, so that adding a layer changes no other's draw.
    let place =
        name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let address = Address::new(seed, "initial weights").step(place);
    Ok(match init {
        Init::Zeros => Tensor::zeros(shape, dtype, device)?,
        Init::Ones => Tensor::ones(shape, dtype, device)?,
        Init::Normal(deviation) => (address.normal(shape, dtype, device)? * deviation)?,
        Init::FanIn(fan_in) => {
            let bound = 1.0 / (fan_in.max(1) as f64).sqrt();
            ((address.uniform_tensor(shape, dtype, device)? * (2.0 * bound))? - bound)?
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_and_a_misshapen_tensor_are_named_with_their_file() -> Result<()> {
        let tensor = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
        let weights =
            Weights::frozen("a.safetensors", HashMap::from([("layer.weight".to_string(), tensor)])).pp("layer");
        for (shape, name, found) in [((2, 4), "weight", "[2, 3]"), ((2, 3), "bias", "nothing")] {
            let error = weights.get(shape, name, Init::Zeros).unwrap_err().to_string();
            assert!(error.contains("a.safetensors") && error.contains(&format!("layer.{name}")), "{error}");
            assert!(error.contains(found), "{error}");
        }
        Ok(())
    }

    #[test]
    fn a_cut_off_file_is_a_format_error() {
        let error = Weights::from_safetensors_bytes("x", &[9, 0, 0], DType::F32, &Device::Cpu).unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{error}");
    }

    #[test]
    fn variables_are_made_once_and_shared() -> Result<()> {
        let parameters = Parameters::new();
        let weights = Weights::trainable(&parameters, 0, DType::F32, &Device::Cpu);
        let first = weights.get((2, 2), "w", Init::Normal(1.0))?;
        let second = weights.get((2, 2), "w", Init::Normal(1.0))?;
        assert_eq!(first.id(), second.id());
        assert_eq!(parameters.len(), 1);
        Ok(())
    }
}

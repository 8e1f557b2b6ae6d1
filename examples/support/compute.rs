//! Where the networks compute, and in which type.

use std::str::FromStr;

use anyhow::bail;
use candle_core::{DType, Device};
use clap::{Args, ValueEnum};

/// The options of programs that run networks.
#[derive(Args, Clone, Copy, Debug)]
pub struct Compute {
    /// Where the networks compute: cpu, cuda (the first GPU) or cuda:N
    #[arg(long, default_value = "cpu", value_name = "cpu|cuda[:N]")]
    device: Place,
    /// What the networks compute in; trained parameters are f32 with all of them [default: f32 for the miniature, bf16
    /// for SDXL on a GPU]
    #[arg(long, value_enum)]
    dtype: Option<Type>,
}

impl Compute {
    /// Opens the device.
    pub fn open(&self) -> anyhow::Result<Device> {
        match self.device {
            Place::Cpu => Ok(Device::Cpu),
            #[cfg(feature = "cuda")]
            Place::Cuda(ordinal) => Ok(lcm_lookahead::cuda::open(ordinal)?),
            #[cfg(not(feature = "cuda"))]
            Place::Cuda(_) => {
                bail!("--device cuda: this program was built for the CPU alone; build it with --features cuda")
            }
        }
    }

    /// The type for networks whose own choice on this device is `on_gpu`; f32 on the CPU.
    pub fn dtype(&self, on_gpu: DType) -> anyhow::Result<DType> {
        match (self.device, self.dtype) {
            (Place::Cpu, None | Some(Type::F32)) => Ok(DType::F32),
            (Place::Cpu, Some(Type::F64)) => Ok(DType::F64),
            (Place::Cpu, Some(Type::Bf16)) => bail!("--dtype: the CPU computes in f32 and f64"),
            (Place::Cuda(_), None) => Ok(on_gpu),
            (Place::Cuda(_), Some(Type::F32)) => Ok(DType::F32),
            (Place::Cuda(_), Some(Type::Bf16)) => Ok(DType::BF16),
            (Place::Cuda(_), Some(Type::F64)) => bail!("--dtype: a GPU computes in f32 and bf16"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Cpu,
    Cuda(usize),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let wrong = || format!("`{name}` is not cpu, cuda or cuda:N");
        match name {
            "cpu" => Ok(Place::Cpu),
            "cuda" => Ok(Place::Cuda(0)),
            _ => name.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Place::Cuda).ok_or_else(wrong),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Type {
    F32,
    F64,
    Bf16,
}

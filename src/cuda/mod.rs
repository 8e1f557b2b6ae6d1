//! What the CUDA halves of the operations share: the device, pointers to tensors and fresh memory for results, matrix
//! products through cuBLASLt, and what a kernel's status code means.
//!
//! Every kernel runs on the one stream of its candle device, and memory is taken from and given back to a
//! stream-ordered pool. So a tensor may be dropped as soon as the kernels that read it are launched, and pointers need
//! no guards.

mod blas;
mod device;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod driver;
mod graph;
mod hopper_linear;
mod memory;
mod reading;
mod reduce;
mod upload;

pub(crate) use blas::{Gemm, Operand, gemm};
pub(crate) use device::avoids;
pub use device::{MemoryUse, deterministic, memory_use, open, profiled, set_deterministic, synchronize, timed};
pub use graph::Graph;
pub(crate) use hopper_linear::HopperLinear;
pub(crate) use memory::{Buffer, cuda_device, dtype_code, pointer, stream, upload};
pub(crate) use reading::Reading;
pub(crate) use reduce::{add_channels, sum_positions, sum_rows};
pub(crate) use upload::{Bytes, Upload, upload_all, upload_tensor};

use crate::{Error, Result};

/// What a kernel launcher returns where another path has to take the work.
pub(crate) const UNSUPPORTED: i32 = -1;

/// Turns the status of a kernel launcher into an error that names the operation.
pub(crate) fn check(operation: &'static str, status: i32) -> Result<()> {
    match status {
        0 => Ok(()),
        UNSUPPORTED => Err(Error::device(operation, "no kernel takes these shapes and this dtype")),
        2 => Err(Error::device(operation, "the GPU is out of memory")),
        98 | 209 => Err(Error::device(operation, "the kernels were not built for this GPU's architecture")),
        code => Err(Error::device(operation, format!("CUDA error {code}"))),
    }
}

/// Whether a launcher took the work; an error where it tried and failed.
pub(crate) fn taken(operation: &'static str, status: i32) -> Result<bool> {
    if status == UNSUPPORTED { Ok(false) } else { check(operation, status).map(|()| true) }
}

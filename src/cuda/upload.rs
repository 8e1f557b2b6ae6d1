//! Copying large tensors from memory (a mapped file, as a rule) to the GPU.
//!
//! A plain copy from pageable memory goes through one small buffer of the driver's, by one thread. Here pieces are
//! copied into pinned buffers by all threads at once, and each piece goes to the GPU while the others are being copied.

use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::result::{self, DriverError};
use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{CudaDevice, DType, Tensor};
use rayon::prelude::*;

use super::Buffer;
use crate::{Error, Result};

/// Bytes of a pinned buffer.
const PIECE: usize = 4 << 20;
/// Smaller tensors are not worth cutting up.
const WORTH_CUTTING: usize = 1 << 20;

/// A pinned buffer, and the event after which it is free again.
struct Pinned {
    memory: *mut c_void,
    event: sys::CUevent,
}

// SAFETY: a pinned buffer is plain memory, used by whoever took it out of the pool; events belong to no thread.
unsafe impl Send for Pinned {}

/// Buffers that are not in use by any thread. They are few (one a thread at most) and kept for the next file.
static POOL: Mutex<Vec<Pinned>> = Mutex::new(Vec::new());

impl Pinned {
    fn take() -> Result<Self, DriverError> {
        if let Some(pinned) = POOL.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(pinned);
        }
        // SAFETY: the context is bound to the calling thread.
        let memory = unsafe { result::malloc_host(PIECE, 0) }?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        Ok(Pinned { memory, event })
    }

    fn give_back(self) {
        POOL.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    /// Copies a piece to an address on the GPU, by way of the buffer.
    fn copy(&self, bytes: &[u8], to: u64, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: the buffer has room for a piece, and what was last copied out of it has arrived when the event has;
        // `to` points to as many bytes on the GPU, written in the order of the stream.
        unsafe {
            sys::cuEventSynchronize(self.event).result()?;
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.cast(), bytes.len());
            sys::cuMemcpyHtoDAsync_v2(to, self.memory, bytes.len(), stream).result()?;
            result::event::record(self.event, stream)
        }
    }
}

/// A tensor on the GPU from its bytes, in the machine's order.
pub(crate) fn upload_bytes(device: &CudaDevice, bytes: &[u8], dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let expected = shape.iter().product::<usize>() * dtype.size_in_bytes();
    if bytes.len() != expected {
        let found = format!("{} bytes", bytes.len());
        return Err(Error::argument("upload", "bytes", format!("{expected} bytes"), found));
    }
    let failed = |error: DriverError| Error::device("copying to the GPU", error.to_string());
    let buffer = Buffer::new(device, shape, dtype)?;
    let (stream, start) = (device.cuda_stream(), buffer.pointer() as u64);
    let raw = stream.cu_stream() as usize;
    let copy = |index: usize, piece: &[u8]| -> Result<(), DriverError> {
        stream.context().bind_to_thread()?;
        let pinned = Pinned::take()?;
        let copied = pinned.copy(piece, start + (index * PIECE) as u64, raw as sys::CUstream);
        pinned.give_back();
        copied
    };
    match bytes.len() {
        ..WORTH_CUTTING => bytes.chunks(PIECE).enumerate().try_for_each(|(i, piece)| copy(i, piece)),
        _ => bytes.par_chunks(PIECE).enumerate().try_for_each(|(i, piece)| copy(i, piece)),
    }
    .map_err(failed)?;
    Ok(buffer.into_tensor())
}

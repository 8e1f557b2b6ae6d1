//! Numbers on their way from the GPU, which the host need not wait for when it asks for them.

use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::result::{self, DriverError};
use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{DType, Tensor};

use super::{cuda_device, pointer};
use crate::{Error, Result};

/// A number of a GPU, being copied to pinned memory behind all that was launched before.
#[derive(Debug)]
pub(crate) struct Reading {
    slot: Option<Slot>,
    dtype: DType,
}

/// Pinned memory of one number, and the event after which it is there.
#[derive(Debug)]
struct Slot {
    /// The GPU that the event belongs to.
    gpu: usize,
    memory: *mut c_void,
    event: sys::CUevent,
}

// SAFETY: a slot is plain memory, used by whoever took it out of the pool; events belong to no thread.
unsafe impl Send for Slot {}
// SAFETY: nothing is done with a slot by reference.
unsafe impl Sync for Slot {}

/// Slots that nothing is being copied to, kept because to make one may wait for the GPU.
static POOL: Mutex<Vec<Slot>> = Mutex::new(Vec::new());

impl Slot {
    fn take(gpu: usize) -> Result<Self, DriverError> {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = pool.iter().position(|slot| slot.gpu == gpu) {
            return Ok(pool.swap_remove(place));
        }
        drop(pool);
        // SAFETY: the context is bound to the calling thread.
        let memory = unsafe { result::malloc_host(size_of::<f64>(), 0) }?;
        Ok(Slot { gpu, memory, event: result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)? })
    }

    fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the event lives as long as its slot.
        unsafe { sys::cuEventSynchronize(self.event).result() }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        // A slot that is still written to, or whose event failed, is nobody's any more.
        if let Some(slot) = self.slot.take().filter(|slot| slot.wait().is_ok()) {
            POOL.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
        }
    }
}

fn failed(error: DriverError) -> Error {
    Error::device("reading a number", error.to_string())
}

impl Reading {
    /// Begins to read a scalar of f32 or f64. The tensor may be dropped at once.
    pub fn start(scalar: &Tensor) -> Result<Self> {
        let (device, dtype) = (cuda_device("reading a number", scalar)?, scalar.dtype());
        if scalar.elem_count() != 1 || !matches!(dtype, DType::F32 | DType::F64) {
            let found = format!("{dtype:?} of shape {:?}", scalar.dims());
            return Err(Error::argument("reading a number", "scalar", "one number of f32 or f64", found));
        }
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().map_err(failed)?;
        let slot = Slot::take(stream.context().ordinal()).map_err(failed)?;
        let from = pointer("reading a number", scalar)? as u64;
        // SAFETY: the slot has room for a number, which the tensor has; its memory is given back in the order of the stream.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(slot.memory, from, dtype.size_in_bytes(), stream.cu_stream())
                .result()
                .map_err(failed)?;
            result::event::record(slot.event, stream.cu_stream()).map_err(failed)?;
        }
        Ok(Reading { slot: Some(slot), dtype })
    }

    /// The number, as soon as it is there.
    pub fn wait(&self) -> Result<f64> {
        let Some(slot) = &self.slot else { return Err(Error::device("reading a number", "it was given up")) };
        slot.wait().map_err(failed)?;
        // SAFETY: the copy of a number of this type to the slot is done.
        Ok(match self.dtype {
            DType::F64 => unsafe { slot.memory.cast::<f64>().read() },
            _ => f64::from(unsafe { slot.memory.cast::<f32>().read() }),
        })
    }
}

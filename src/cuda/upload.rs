//! Copying large tensors from files or memory to the GPU.
//!
//! A plain copy from pageable memory goes through one small buffer of the driver's, by one thread. Here all threads at
//! once bring pieces of many tensors to pinned buffers, and each piece goes to the GPU while the others are on their
//! way. Files are read into the buffers, not mapped: what is mapped comes a page fault for every few pages.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::result::{self, DriverError};
use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{CpuStorage, CudaDevice, DType, Device, Storage, Tensor};
use rayon::prelude::*;

use super::Buffer;
use crate::{Error, Result};

/// Bytes of a pinned buffer.
const PIECE: usize = 2 << 20;

/// A tensor to be made on the GPU.
pub(crate) struct Upload<'a> {
    pub dtype: DType,
    pub shape: &'a [usize],
    /// Its numbers, in the machine's order.
    pub bytes: Bytes<'a>,
}

/// Where bytes come from.
#[derive(Clone, Copy)]
pub(crate) enum Bytes<'a> {
    Memory(&'a [u8]),
    /// So many bytes of a file from a place on.
    #[cfg(unix)]
    File {
        file: &'a std::fs::File,
        start: usize,
        length: usize,
    },
}

impl Bytes<'_> {
    pub fn len(&self) -> usize {
        match self {
            Bytes::Memory(bytes) => bytes.len(),
            #[cfg(unix)]
            Bytes::File { length, .. } => *length,
        }
    }

    /// Copies some of them, which exist, to memory.
    fn copy(&self, from: usize, to: &mut [u8]) -> Result<()> {
        match self {
            Bytes::Memory(bytes) => to.copy_from_slice(&bytes[from..from + to.len()]),
            #[cfg(unix)]
            Bytes::File { file, start, .. } => {
                let read = std::os::unix::fs::FileExt::read_exact_at(*file, to, (start + from) as u64);
                read.map_err(|error| Error::device("copying a file to the GPU", error.to_string()))?;
            }
        }
        Ok(())
    }
}

fn failed(error: DriverError) -> Error {
    Error::device("copying to the GPU", error.to_string())
}

/// A pinned buffer, and the event after which it is free again.
struct Pinned {
    memory: *mut c_void,
    event: sys::CUevent,
}

// SAFETY: a pinned buffer is plain memory, used by whoever took it out of the pool; events belong to no thread.
unsafe impl Send for Pinned {}

/// The pinned buffers that no thread is filling, those that were sent first in front, and how many there are in all. They
/// are kept for the next file.
static POOL: Mutex<(VecDeque<Pinned>, usize)> = Mutex::new((VecDeque::new(), 0));

impl Pinned {
    /// A buffer, as a rule one that is free: two a thread are made before one is waited for.
    fn take() -> Result<Self, DriverError> {
        {
            let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
            let (waiting, made) = &mut *pool;
            if let Some(first) = waiting.pop_front() {
                // SAFETY: the event lives as long as its buffer.
                let free = unsafe { sys::cuEventQuery(first.event) } == sys::CUresult::CUDA_SUCCESS;
                if free || *made >= 2 * rayon::current_num_threads() {
                    return Ok(first);
                }
                waiting.push_front(first);
            }
            *made += 1;
        }
        // SAFETY: the context is bound to the calling thread.
        let memory = unsafe { result::malloc_host(PIECE, 0) }?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        Ok(Pinned { memory, event })
    }

    fn give_back(self) {
        POOL.lock().unwrap_or_else(PoisonError::into_inner).0.push_back(self);
    }

    /// Copies a piece to an address on the GPU, by way of the buffer.
    fn send(&self, bytes: &Bytes<'_>, from: usize, length: usize, to: u64, stream: sys::CUstream) -> Result<()> {
        // SAFETY: the buffer has room for a piece, and what was last copied out of it has arrived when the event has.
        let buffer = unsafe {
            sys::cuEventSynchronize(self.event).result().map_err(failed)?;
            std::slice::from_raw_parts_mut(self.memory.cast::<u8>(), length)
        };
        bytes.copy(from, buffer)?;
        // SAFETY: `to` points to as many bytes on the GPU, written in the order of the stream.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, self.memory, length, stream).result().map_err(failed)?;
            result::event::record(self.event, stream).map_err(failed)
        }
    }
}

/// Makes tensors on a GPU.
pub(crate) fn upload_all(device: &CudaDevice, uploads: &[Upload<'_>]) -> Result<Vec<Tensor>> {
    let (mut buffers, mut pieces) = (Vec::with_capacity(uploads.len()), Vec::new());
    for upload in uploads {
        let (length, expected) =
            (upload.bytes.len(), upload.shape.iter().product::<usize>() * upload.dtype.size_in_bytes());
        if length != expected {
            let found = format!("{length} bytes");
            return Err(Error::argument("upload", "bytes", format!("{expected} bytes"), found));
        }
        let buffer = Buffer::new(device, upload.shape, upload.dtype)?;
        let to = buffer.pointer() as u64;
        pieces.extend((0..length).step_by(PIECE).map(|from| (upload.bytes, from, PIECE.min(length - from), to)));
        buffers.push(buffer);
    }
    let stream = device.cuda_stream();
    let raw = stream.cu_stream() as usize;
    let send = |&(bytes, from, length, to): &(Bytes<'_>, usize, usize, u64)| -> Result<()> {
        stream.context().bind_to_thread().map_err(failed)?;
        let pinned = Pinned::take().map_err(failed)?;
        let sent = pinned.send(&bytes, from, length, to + from as u64, raw as sys::CUstream);
        pinned.give_back();
        sent
    };
    match &pieces[..] {
        [piece] => send(piece)?,
        pieces => pieces.par_iter().with_max_len(1).try_for_each(send)?,
    }
    Ok(buffers.into_iter().map(Buffer::into_tensor).collect())
}

/// Copies a tensor from the CPU, without waiting for what the GPU has still to do: a plain copy of more than a few
/// kilobytes does.
pub(crate) fn upload_tensor(device: &CudaDevice, tensor: &Tensor) -> Result<Tensor> {
    /// The memory of numbers.
    fn bytes<T: Copy>(numbers: &[T]) -> &[u8] {
        // SAFETY: numbers are so many bytes, each of which has a value.
        unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
    }
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let numbers = match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(numbers)), Some((start, end))) => bytes(&numbers[start..end]),
        (Storage::Cpu(CpuStorage::BF16(numbers)), Some((start, end))) => bytes(&numbers[start..end]),
        (Storage::Cpu(CpuStorage::F16(numbers)), Some((start, end))) => bytes(&numbers[start..end]),
        _ => {
            drop(storage);
            return Ok(tensor.to_device(&Device::Cuda(device.clone()))?);
        }
    };
    let upload = Upload { dtype: tensor.dtype(), shape: tensor.dims(), bytes: Bytes::Memory(numbers) };
    let mut tensors = upload_all(device, &[upload])?;
    tensors.pop().ok_or_else(|| Error::device("copying to the GPU", "nothing was copied"))
}

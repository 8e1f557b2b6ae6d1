//! Opening a GPU, and what it says about its memory.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use candle_core::cuda_backend::cudarc::driver::{result, sys};
use candle_core::{CudaDevice, Device};

use crate::{Error, Result};

/// Opens a GPU for this crate: candle's device on a stream of its own, whose memory pool keeps what is given back for
/// the next allocation, and whose tensors are not tracked with events (all work runs on the one stream).
///
/// # Errors
/// [`Error::Device`], in one sentence, where there is no driver, no such GPU, or one older than compute capability 8.0.
pub fn open(ordinal: usize) -> Result<Device> {
    let wrong = |reason: String| Error::device("opening a GPU", reason);
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    if !super::driver::is_there() {
        return Err(wrong("this machine has no NVIDIA driver (libcuda.so.1); use the CPU, or install one".into()));
    }
    let count = result::init()
        .and_then(|()| result::device::get_count())
        .map_err(|error| wrong(format!("no usable NVIDIA driver ({error}); use the CPU, or install one")))?;
    if ordinal >= count.max(0) as usize {
        return Err(wrong(format!("there is no GPU {ordinal}: the driver sees {count}")));
    }
    let device = CudaDevice::new_with_stream(ordinal).map_err(|error| wrong(format!("GPU {ordinal}: {error}")))?;
    let context = device.cuda_stream().context().clone();
    let (major, minor) = context
        .compute_capability()
        .map_err(|error| wrong(format!("GPU {ordinal} does not say what it is: {error}")))?;
    if major < 8 {
        return Err(wrong(format!(
            "GPU {ordinal} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer"
        )));
    }
    // SAFETY: all work on this device's tensors is put on its one stream, so order on the stream is all the
    // synchronisation they need.
    unsafe { device.disable_event_tracking() };
    keep_freed_memory(ordinal).map_err(|error| wrong(format!("GPU {ordinal}: its memory pool: {error}")))?;
    Ok(Device::Cuda(device))
}

/// Tells the pool that allocations come from to keep freed memory instead of giving it back to the driver at every
/// synchronisation.
fn keep_freed_memory(ordinal: usize) -> Result<(), result::DriverError> {
    let threshold = u64::MAX;
    // SAFETY: the device exists (checked by the caller), and the attribute takes a pointer to a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(result::device::get(ordinal as i32)?)?;
        sys::cuMemPoolSetAttribute(
            pool,
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            (&raw const threshold).cast_mut().cast(),
        )
        .result()
    }
}

/// Device memory of the pool that tensors come from, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// In use now.
    pub current: u64,
    /// The most that was in use since the last reset.
    pub peak: u64,
    /// Taken from the driver, in use or kept for later: what other programs see.
    pub reserved: u64,
}

/// What the pool of a GPU holds; `reset_peak` starts the measurement of the peak anew.
///
/// # Errors
/// [`Error::Device`] for a device that is not a GPU, or where the driver refuses.
pub fn memory_use(device: &Device, reset_peak: bool) -> Result<MemoryUse> {
    let wrong = |reason: String| Error::device("memory_use", reason);
    let Device::Cuda(cuda) = device else { return Err(wrong("the device is not a GPU".into())) };
    let ordinal = cuda.cuda_stream().context().ordinal();
    let read = |attribute| -> Result<u64, result::DriverError> {
        let mut value = 0u64;
        // SAFETY: the device exists, and these attributes are u64.
        unsafe {
            let pool = result::device::get_default_mem_pool(result::device::get(ordinal as i32)?)?;
            sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()).result()?;
        }
        Ok(value)
    };
    use sys::CUmemPool_attribute as Attribute;
    let all = || -> Result<MemoryUse, result::DriverError> {
        let memory = MemoryUse {
            current: read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
            peak: read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
            reserved: read(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
        };
        if reset_peak {
            let mut zero = 0u64;
            // SAFETY: as above; zero is the one value this attribute may be set to.
            unsafe {
                let pool = result::device::get_default_mem_pool(result::device::get(ordinal as i32)?)?;
                sys::cuMemPoolSetAttribute(pool, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, (&raw mut zero).cast())
                    .result()?;
            }
        }
        Ok(memory)
    };
    all().map_err(|error| wrong(error.to_string()))
}

static DETERMINISTIC: AtomicBool = AtomicBool::new(false);

/// Whether kernels must give bit-identical results in every run, also where that is slower.
pub fn deterministic() -> bool {
    DETERMINISTIC.load(Ordering::Relaxed)
}

/// Turns the deterministic mode on or off, for the whole process: with it every kernel adds in a fixed order, and
/// matrix products take the algorithm cuBLASLt proposes instead of the one that was fastest when timed.
pub fn set_deterministic(on: bool) {
    DETERMINISTIC.store(on, Ordering::Relaxed);
}

/// Whether the environment variable `LCM_LOOKAHEAD_AVOID` names a family of kernels (`hopper-attention`, `hopper-conv`,
/// `hopper-linear`, `cublaslt`, separated by commas), for which others are then used, where there are any: a way to tell
/// which kernel a fault is in.
pub(crate) fn avoids(family: &str) -> bool {
    static AVOIDED: OnceLock<String> = OnceLock::new();
    let avoided = AVOIDED.get_or_init(|| std::env::var("LCM_LOOKAHEAD_AVOID").unwrap_or_default());
    avoided.split(',').any(|name| name.trim() == family)
}

/// Waits until all work of a device is done. The CPU is always done.
///
/// # Errors
/// [`Error::Candle`] where a kernel failed.
pub fn synchronize(device: &Device) -> Result<()> {
    Ok(device.synchronize()?)
}

/// Runs a function and says how long the GPU took for what it launched, by events on the device's stream: what the
/// stream waited for the host in between is part of it, waiting for the end is not.
///
/// # Errors
/// That of the function; [`Error::Device`] for a device that is not a GPU, or where the driver refuses.
pub fn timed<T>(device: &Device, run: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let wrong = |reason: String| Error::device("timing", reason);
    let failed = |error: result::DriverError| wrong(error.to_string());
    let Device::Cuda(cuda) = device else { return Err(wrong("the device is not a GPU".into())) };
    let stream = cuda.cuda_stream();
    let event = || stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed);
    let start = event()?;
    let result = run()?;
    let milliseconds = start.elapsed_ms(&event()?).map_err(failed)?;
    Ok((result, Duration::from_secs_f64(f64::from(milliseconds) / 1e3)))
}

/// Runs a function between `cudaProfilerStart` and `cudaProfilerStop`, for profilers that are told to wait for them.
///
/// # Errors
/// That of the function; [`Error::Device`] where the driver refuses.
pub fn profiled<T>(device: &Device, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let failed = |error: result::DriverError| Error::device("profiling", error.to_string());
    synchronize(device)?;
    let profiler = candle_core::cuda_backend::cudarc::driver::Profiler::new().map_err(failed)?;
    let result = run();
    synchronize(device)?;
    drop(profiler);
    result
}

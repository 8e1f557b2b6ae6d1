//! NVIDIA's driver library, looked for when the program starts and not when it is linked.
//!
//! candle links against `libcuda.so.1`, which comes with the driver: where there is none, the program would not even
//! start. The functions below stand in for the library's at link time and jump to them; without a driver they return an
//! error, so that [`open`](super::open) can say what is missing and the CPU can do the work. Functions that are not in
//! the list are linked as before.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

unsafe extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

const RTLD_NOW: c_int = 2;
const LIBRARY: &CStr = c"libcuda.so.1";

/// What functions do that the driver lacks: `CUDA_ERROR_STUB_LIBRARY`.
extern "C" fn missing() -> c_int {
    34
}

macro_rules! stand_ins {
    ($($name:ident)*) => {
        $(
            #[allow(non_upper_case_globals, reason = "named as the function it leads to")]
            static $name: AtomicPtr<c_void> = AtomicPtr::new(missing as extern "C" fn() -> c_int as *mut c_void);
            #[cfg(target_arch = "x86_64")]
            std::arch::global_asm!(
                ".pushsection .text",
                concat!(".globl ", stringify!($name)),
                concat!(".hidden ", stringify!($name)),
                concat!(".type ", stringify!($name), ", @function"),
                ".p2align 4",
                concat!(stringify!($name), ":"),
                "endbr64",
                "jmp *{pointer}(%rip)",
                ".popsection",
                pointer = sym $name,
                options(att_syntax)
            );
            #[cfg(target_arch = "aarch64")]
            std::arch::global_asm!(
                ".pushsection .text",
                concat!(".globl ", stringify!($name)),
                concat!(".hidden ", stringify!($name)),
                concat!(".type ", stringify!($name), ", @function"),
                ".p2align 4",
                concat!(stringify!($name), ":"),
                "hint #34",
                "adrp x16, {pointer}",
                "ldr x16, [x16, :lo12:{pointer}]",
                "br x16",
                ".popsection",
                pointer = sym $name
            );
        )*

        /// The names of the functions, and where each leads.
        static FUNCTIONS: &[(&str, &AtomicPtr<c_void>)] = &[$((concat!(stringify!($name), "\0"), &$name)),*];
    };
}

// All that cudarc's driver modules call.
stand_ins! {
    cuCtxCreate_v3 cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetLimit
    cuCtxGetStreamPriorityRange cuCtxSetCacheConfig cuCtxSetCurrent cuCtxSetFlags cuCtxSetLimit
    cuCtxSynchronize cuDestroyExternalMemory cuDeviceGet cuDeviceGetAttribute cuDeviceGetCount
    cuDeviceGetDefaultMemPool cuDeviceGetMemPool cuDeviceGetName cuDeviceGetUuid cuDeviceGetUuid_v2
    cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRetain cuDeviceSetMemPool cuDeviceTotalMem_v2 cuEventCreate
    cuEventDestroy_v2 cuEventElapsedTime cuEventElapsedTime_v2 cuEventQuery cuEventRecord cuEventSynchronize
    cuExternalMemoryGetMappedBuffer cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig
    cuGetErrorName cuGetErrorString cuGraphDestroy cuGraphExecDestroy cuGraphInstantiateWithFlags
    cuGraphLaunch cuGraphUpload cuImportExternalMemory cuInit cuLaunchCooperativeKernel cuLaunchHostFunc
    cuLaunchKernel cuMemAdvise_v2 cuMemAllocAsync cuMemAllocFromPoolAsync cuMemAllocManaged
    cuMemAlloc_v2 cuMemFreeAsync cuMemFreeHost cuMemFree_v2 cuMemGetInfo_v2 cuMemHostAlloc
    cuMemPoolCreate cuMemPoolDestroy cuMemPoolGetAttribute cuMemPoolSetAttribute cuMemPoolTrimTo
    cuMemPrefetchAsync_v2 cuMemcpyDtoDAsync_v2 cuMemcpyDtoD_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2
    cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2 cuMemcpyPeerAsync cuMemsetD8Async cuMemsetD8_v2 cuModuleGetFunction
    cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData cuModuleUnload cuOccupancyAvailableDynamicSMemPerBlock
    cuOccupancyMaxActiveBlocksPerMultiprocessor cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags
    cuOccupancyMaxActiveClusters cuOccupancyMaxPotentialBlockSize cuOccupancyMaxPotentialBlockSizeWithFlags
    cuOccupancyMaxPotentialClusterSize cuProfilerStart cuProfilerStop cuStreamAttachMemAsync
    cuStreamBeginCapture_v2 cuStreamCreate cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamEndCapture
    cuStreamIsCapturing cuStreamSynchronize cuStreamWaitEvent
}

/// Runs before `main`, as loading the library does where it is linked.
#[used]
#[unsafe(link_section = ".init_array")]
static LOAD: extern "C" fn() = load;

extern "C" fn load() {
    // SAFETY: the names are strings that end with a zero; the library stays loaded until the program ends.
    unsafe {
        let library = dlopen(LIBRARY.as_ptr(), RTLD_NOW);
        if library.is_null() {
            return;
        }
        for (name, pointer) in FUNCTIONS {
            let function = dlsym(library, name.as_ptr().cast());
            if !function.is_null() {
                pointer.store(function, Ordering::Relaxed);
            }
        }
    }
}

/// Whether the driver library was found.
pub(super) fn is_there() -> bool {
    let missing = missing as extern "C" fn() -> c_int as *mut c_void;
    FUNCTIONS.iter().any(|(_, pointer)| pointer.load(Ordering::Relaxed) != missing)
}

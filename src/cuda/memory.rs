//! Pointers to the numbers of tensors, and fresh memory for results.

use std::ffi::c_void;

use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice, cudarc::driver::DevicePtr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Device, Shape, Storage, Tensor};
use half::{bf16, f16};

use crate::autograd::Output;
use crate::{Error, Result};

/// The candle device of a tensor on a GPU.
pub(crate) fn cuda_device(operation: &'static str, tensor: &Tensor) -> Result<CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device.clone()),
        other => Err(Error::argument(operation, "device", "a CUDA device", format!("{:?}", other.location()))),
    }
}

/// The stream all work of a device runs on, as kernel launchers take it.
///
/// Binds the device's context to the calling thread, which the kernels' runtime takes it from.
pub(crate) fn stream(device: &CudaDevice) -> *mut c_void {
    let stream = device.cuda_stream();
    // A context that cannot be bound shows as an error of the launch.
    stream.context().bind_to_thread().ok();
    stream.cu_stream().cast()
}

/// The dtype as kernel launchers take it: 0 f32, 1 bf16, 2 f16.
pub(crate) fn dtype_code(operation: &'static str, dtype: DType) -> Result<i32> {
    match dtype {
        DType::F32 => Ok(0),
        DType::BF16 => Ok(1),
        DType::F16 => Ok(2),
        other => Err(Error::argument(operation, "dtype", "f32, bf16 or f16 on a GPU", format!("{other:?}"))),
    }
}

/// Runs `$body` with `$slice` standing for the memory behind a storage, whatever its dtype.
macro_rules! with_slice {
    ($storage:expr, $slice:ident => $body:expr) => {
        match &$storage.slice {
            CudaStorageSlice::U8($slice) => $body,
            CudaStorageSlice::U32($slice) => $body,
            CudaStorageSlice::I16($slice) => $body,
            CudaStorageSlice::I32($slice) => $body,
            CudaStorageSlice::I64($slice) => $body,
            CudaStorageSlice::BF16($slice) => $body,
            CudaStorageSlice::F16($slice) => $body,
            CudaStorageSlice::F32($slice) => $body,
            CudaStorageSlice::F64($slice) => $body,
            CudaStorageSlice::F8E4M3($slice) => $body,
            CudaStorageSlice::F6E2M3($slice)
            | CudaStorageSlice::F6E3M2($slice)
            | CudaStorageSlice::F4($slice)
            | CudaStorageSlice::F8E8M0($slice) => $body,
        }
    };
}

fn address(storage: &CudaStorage) -> u64 {
    let stream = storage.device.cuda_stream();
    with_slice!(storage, slice => slice.device_ptr(&stream).0)
}

/// Where the numbers of a contiguous tensor begin on the GPU.
pub(crate) fn pointer(operation: &'static str, tensor: &Tensor) -> Result<*mut c_void> {
    let (storage, layout) = tensor.storage_and_layout();
    if !layout.is_contiguous() {
        return Err(Error::argument(operation, "layout", "contiguous", format!("strides {:?}", layout.stride())));
    }
    match &*storage {
        Storage::Cuda(storage) => {
            let offset = layout.start_offset() * tensor.dtype().size_in_bytes();
            Ok((address(storage) + offset as u64) as *mut c_void)
        }
        _ => Err(Error::argument(operation, "device", "a GPU, as the first argument", "the CPU")),
    }
}

/// Fresh memory on a GPU for the result of an operation. Its numbers are undefined until a kernel has written them.
pub(crate) struct Buffer {
    storage: CudaStorage,
    shape: Shape,
}

impl Buffer {
    /// Takes memory for a shape.
    pub fn new(device: &CudaDevice, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let shape = shape.into();
        // An empty allocation is an error of the driver's; nobody reads the one number it becomes.
        let count = shape.elem_count().max(1);
        // SAFETY: the memory is only handed out after the operation that owns this buffer has written all of it.
        let slice = unsafe {
            match dtype {
                DType::F32 => CudaStorageSlice::F32(device.alloc::<f32>(count)?),
                DType::BF16 => CudaStorageSlice::BF16(device.alloc::<bf16>(count)?),
                DType::F16 => CudaStorageSlice::F16(device.alloc::<f16>(count)?),
                DType::U8 => CudaStorageSlice::U8(device.alloc::<u8>(count)?),
                DType::U32 => CudaStorageSlice::U32(device.alloc::<u32>(count)?),
                other => {
                    let found = format!("{other:?}");
                    return Err(Error::argument("a CUDA operation", "dtype", "f32, bf16, f16, u8 or u32", found));
                }
            }
        };
        Ok(Buffer { storage: CudaStorage { slice, device: device.clone() }, shape })
    }

    /// Memory of the shape, dtype and device of a tensor.
    pub fn like(operation: &'static str, tensor: &Tensor) -> Result<Self> {
        Self::new(&cuda_device(operation, tensor)?, tensor.shape().clone(), tensor.dtype())
    }

    /// Scratch memory of so many bytes.
    pub fn bytes(device: &CudaDevice, bytes: usize) -> Result<Self> {
        Self::new(device, bytes, DType::U8)
    }

    pub fn pointer(&self) -> *mut c_void {
        address(&self.storage) as *mut c_void
    }

    pub fn elem_count(&self) -> usize {
        self.shape.elem_count()
    }

    pub fn into_output(self) -> Output {
        Output::Fresh(Storage::Cuda(self.storage), self.shape)
    }

    pub fn into_tensor(self) -> Tensor {
        Tensor::from_storage(Storage::Cuda(self.storage), self.shape, BackpropOp::none(), false)
    }
}

/// Copies numbers to the GPU of a tensor.
pub(crate) fn upload<T: candle_core::WithDType>(device: &CudaDevice, values: &[T]) -> Result<Tensor> {
    Ok(Tensor::new(values, &Device::Cuda(device.clone()))?)
}

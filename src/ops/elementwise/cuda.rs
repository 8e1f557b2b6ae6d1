//! Sums, scalings, casts and copies on a GPU, in f32, bf16 and f16.

use std::ffi::c_void;

use candle_core::{DType, Shape, Tensor};

use crate::Result;
use crate::autograd::Output;
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};

// `elementwise.h`.
unsafe extern "C" {
    fn lcm_elementwise_combine(
        a: *const c_void,
        b: *const c_void,
        out: *mut c_void,
        alpha: f32,
        beta: f32,
        count: i64,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_elementwise_cast(
        from: *const c_void,
        to: *mut c_void,
        count: i64,
        from_dtype: i32,
        to_dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_elementwise_add_channels(
        x: *const c_void,
        v: *const c_void,
        out: *mut c_void,
        batch: i64,
        pixels: i64,
        channels: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_elementwise_concat(
        a: *const c_void,
        b: *const c_void,
        out: *mut c_void,
        rows: i64,
        channels_a: i64,
        channels_b: i64,
        element_bytes: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_elementwise_split(
        x: *const c_void,
        a: *mut c_void,
        b: *mut c_void,
        rows: i64,
        channels_a: i64,
        channels_b: i64,
        element_bytes: i32,
        stream: *mut c_void,
    ) -> i32;
}

/// Whether the kernels take the tensor: on a GPU, of one of their dtypes. (candle has f64 there too.)
pub(super) fn takes(tensor: &Tensor) -> bool {
    tensor.device().is_cuda() && is_kernel_dtype(tensor.dtype())
}

pub(super) fn is_kernel_dtype(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
}

/// `alpha * a + beta * b`, without `b` `alpha * a`; contiguous tensors of one shape.
fn combine(name: &'static str, a: &Tensor, b: Option<&Tensor>, alpha: f64, beta: f64) -> Result<Buffer> {
    let device = cuda_device(name, a)?;
    let out = Buffer::like(name, a)?;
    let b = b.map_or(Ok(std::ptr::null_mut()), |b| pointer(name, b))?;
    let (a_at, dtype, count) = (pointer(name, a)?, dtype_code(name, a.dtype())?, a.elem_count() as i64);
    // SAFETY: the pointers belong to `count` numbers each, alive on this stream.
    let status = unsafe {
        lcm_elementwise_combine(a_at, b, out.pointer(), alpha as f32, beta as f32, count, dtype, stream(&device))
    };
    check(name, status)?;
    Ok(out)
}

/// Adds a tensor of its shape to fresh memory, in place.
pub(crate) fn add_to(sum: Buffer, addend: &Tensor) -> Result<Buffer> {
    let name = "add";
    let (at, count, dtype) = (sum.pointer(), sum.elem_count() as i64, dtype_code(name, addend.dtype())?);
    let stream = stream(&cuda_device(name, addend)?);
    // SAFETY: the pointers belong to `count` numbers each, alive on this stream; each is read and written by one thread.
    check(name, unsafe { lcm_elementwise_combine(at, pointer(name, addend)?, at, 1.0, 1.0, count, dtype, stream) })?;
    Ok(sum)
}

pub(super) fn add_scaled(a: &Tensor, b: &Tensor, beta: f64) -> Result<Output> {
    Ok(combine("add", a, Some(b), 1.0, beta)?.into_output())
}

pub(super) fn scale(x: &Tensor, factor: f64) -> Result<Output> {
    Ok(combine("scale", x, None, factor, 0.0)?.into_output())
}

pub(super) fn scaled(x: &Tensor, factor: f64) -> Result<Tensor> {
    Ok(combine("scale", x, None, factor, 0.0)?.into_tensor())
}

fn cast_to(x: &Tensor, dtype: DType) -> Result<Buffer> {
    let name = "cast";
    let device = cuda_device(name, x)?;
    let to = Buffer::new(&device, x.shape().clone(), dtype)?;
    let (from_code, to_code) = (dtype_code(name, x.dtype())?, dtype_code(name, dtype)?);
    let (from, count) = (pointer(name, x)?, x.elem_count() as i64);
    // SAFETY: as in `combine`.
    check(name, unsafe { lcm_elementwise_cast(from, to.pointer(), count, from_code, to_code, stream(&device)) })?;
    Ok(to)
}

pub(super) fn cast(x: &Tensor, dtype: DType) -> Result<Output> {
    Ok(cast_to(x, dtype)?.into_output())
}

pub(super) fn cast_tensor(x: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(cast_to(x, dtype)?.into_tensor())
}

/// `(batch, ..., channels)` plus `(batch, channels)`.
pub(super) fn add_per_sample(x: &Tensor, vectors: &Tensor) -> Result<Output> {
    let name = "add_per_sample";
    let device = cuda_device(name, x)?;
    let (batch, channels) = vectors.dims2()?;
    let pixels = x.elem_count() / (batch * channels).max(1);
    let out = Buffer::like(name, x)?;
    let (x_at, vectors, dtype) = (pointer(name, x)?, pointer(name, vectors)?, dtype_code(name, x.dtype())?);
    let sizes = (batch as i64, pixels as i64, channels as i32);
    // SAFETY: the pointers belong to tensors of the shapes stated, alive on this stream.
    let status = unsafe {
        lcm_elementwise_add_channels(x_at, vectors, out.pointer(), sizes.0, sizes.1, sizes.2, dtype, stream(&device))
    };
    check(name, status)?;
    Ok(out.into_output())
}

/// `(..., a channels)` and `(..., b channels)` side by side.
pub(super) fn concat(a: &Tensor, b: &Tensor, [width_a, width_b]: [usize; 2], shape: Shape) -> Result<Output> {
    let name = "concat_channels";
    let device = cuda_device(name, a)?;
    let rows = (shape.elem_count() / (width_a + width_b).max(1)) as i64;
    let out = Buffer::new(&device, shape, a.dtype())?;
    let (a_at, b_at, bytes) = (pointer(name, a)?, pointer(name, b)?, a.dtype().size_in_bytes() as i32);
    let (width_a, width_b) = (width_a as i64, width_b as i64);
    // SAFETY: the pointers belong to `rows` rows of the widths stated, alive on this stream.
    let status =
        unsafe { lcm_elementwise_concat(a_at, b_at, out.pointer(), rows, width_a, width_b, bytes, stream(&device)) };
    check(name, status)?;
    Ok(out.into_output())
}

/// The parts of `(..., a + b channels)` that are wanted, each dense.
pub(super) fn split(x: &Tensor, widths: [usize; 2], wanted: [bool; 2]) -> Result<[Option<Tensor>; 2]> {
    let name = "concat_channels";
    let device = cuda_device(name, x)?;
    let part = |i: usize| -> Result<Option<Buffer>> {
        let mut shape = x.dims().to_vec();
        shape.pop();
        shape.push(widths[i]);
        wanted[i].then(|| Buffer::new(&device, shape, x.dtype())).transpose()
    };
    let parts = [part(0)?, part(1)?];
    let at = |i: usize| parts[i].as_ref().map_or(std::ptr::null_mut(), Buffer::pointer);
    let rows = (x.elem_count() / widths.iter().sum::<usize>().max(1)) as i64;
    let (from, bytes) = (pointer(name, x)?, x.dtype().size_in_bytes() as i32);
    let [width_a, width_b] = widths.map(|width| width as i64);
    // SAFETY: as in `concat`.
    let status = unsafe { lcm_elementwise_split(from, at(0), at(1), rows, width_a, width_b, bytes, stream(&device)) };
    check(name, status)?;
    Ok(parts.map(|part| part.map(Buffer::into_tensor)))
}

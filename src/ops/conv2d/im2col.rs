//! Convolution on a GPU by patches laid out as a matrix, for cuBLASLt: the way of what no kernel of our own takes. Patches
//! are `kernel * kernel` times what they are taken from, so they are made and used a part at a time.

use std::ffi::c_void;

use candle_core::{CudaDevice, Tensor};

use super::cuda::{Geometry, NAME};
use crate::Result;
use crate::cuda::{Buffer, Gemm, Operand, check, cuda_device, pointer, stream};

// `im2col.h`.
unsafe extern "C" {
    fn lcm_im2col_forward(
        x: *const c_void,
        patches: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        kernel_height: i32,
        kernel_width: i32,
        stride: i32,
        padding: i32,
        padding_end: i32,
        first: i64,
        pixels: i64,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_im2col_backward(
        patches: *const c_void,
        x: *mut c_void,
        batch: i64,
        height: i32,
        width: i32,
        channels: i32,
        kernel_height: i32,
        kernel_width: i32,
        stride: i32,
        padding: i32,
        padding_end: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
}

/// Bytes of patches at a time.
const PATCHES: usize = 256 << 20;

/// The patches of output pixels `first .. first + pixels` of a batch as a matrix `(pixels, columns)`.
fn patches(device: &CudaDevice, x: &Tensor, shape: &Geometry, first: usize, pixels: usize) -> Result<Buffer> {
    let patches = Buffer::new(device, (pixels, shape.patch()), x.dtype())?;
    // SAFETY: the pointers belong to tensors of the shapes stated.
    let status = unsafe {
        lcm_im2col_forward(
            pointer(NAME, x)?,
            patches.pointer(),
            i64::from(shape.batch),
            shape.height,
            shape.width,
            shape.input_channels,
            shape.kernel,
            shape.kernel,
            shape.stride,
            shape.padding,
            shape.padding_end,
            first as i64,
            pixels as i64,
            shape.dtype,
            stream(device),
        )
    };
    check(NAME, status)?;
    Ok(patches)
}

/// `y = convolution + bias + residual`, into memory that the caller has.
pub(super) fn forward(
    shape: &Geometry,
    x: &Tensor,
    weight: &Tensor,
    (bias, residual): (Option<*const c_void>, Option<*const c_void>),
    y: *mut c_void,
) -> Result<()> {
    let device = cuda_device(NAME, x)?;
    let (rows, columns, out, size) = (shape.rows(), shape.patch(), weight.dim(0)?, x.dtype().size_in_bytes());
    // Whole multiples of the tiles that products are cut into.
    let most = (PATCHES / (columns * size)).max(1).next_multiple_of(256);
    for first in (0..rows).step_by(most) {
        let pixels = most.min(rows - first);
        let patches = patches(&device, x, shape, first, pixels)?;
        let start = first * out * size;
        crate::cuda::gemm(
            &device,
            &Gemm {
                dtype: x.dtype(),
                left: Operand::new(patches.pointer(), pixels, columns),
                right: Operand::new(pointer(NAME, weight)?, out, columns).t(),
                scale: 1.0,
                addend: residual.map(|residual| residual.wrapping_byte_add(start)),
                bias,
                out: y.wrapping_byte_add(start),
                out_dtype: x.dtype(),
                batch: (1, [0; 3]),
            },
        )?;
    }
    Ok(())
}

/// The gradient of the input, into memory that the caller has; some samples at a time.
pub(super) fn input_gradient(shape: &Geometry, weight: &Tensor, gradient: &Tensor, dx: *mut c_void) -> Result<()> {
    let device = cuda_device(NAME, gradient)?;
    let (out, columns, size) = (weight.dim(0)?, shape.patch(), gradient.dtype().size_in_bytes());
    let samples = shape.batch as usize;
    let pixels = shape.rows() / samples.max(1);
    let most = (PATCHES / (pixels * columns * size).max(1)).max(1);
    let input = shape.height as usize * shape.width as usize * shape.input_channels as usize;
    for first in (0..samples).step_by(most) {
        let count = most.min(samples - first);
        let rows = count * pixels;
        let patches = Buffer::new(&device, (rows, columns), gradient.dtype())?;
        let from = pointer(NAME, gradient)?.wrapping_byte_add(first * pixels * out * size);
        crate::cuda::gemm(
            &device,
            &Gemm {
                dtype: gradient.dtype(),
                left: Operand::new(from, rows, out),
                right: Operand::new(pointer(NAME, weight)?, out, columns),
                scale: 1.0,
                addend: None,
                bias: None,
                out: patches.pointer(),
                out_dtype: gradient.dtype(),
                batch: (1, [0; 3]),
            },
        )?;
        // SAFETY: the pointers belong to tensors of the shapes stated.
        let status = unsafe {
            lcm_im2col_backward(
                patches.pointer(),
                dx.wrapping_byte_add(first * input * size),
                count as i64,
                shape.height,
                shape.width,
                shape.input_channels,
                shape.kernel,
                shape.kernel,
                shape.stride,
                shape.padding,
                shape.padding_end,
                shape.dtype,
                stream(&device),
            )
        };
        check(NAME, status)?;
    }
    Ok(())
}

/// The gradient of a trained weight.
pub(super) fn weight_gradient(shape: &Geometry, x: &Tensor, weight: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let device = cuda_device(NAME, x)?;
    let rows = shape.rows();
    let patches = patches(&device, x, shape, 0, rows)?;
    let dw = Buffer::like(NAME, weight)?;
    crate::cuda::gemm(
        &device,
        &Gemm {
            dtype: x.dtype(),
            left: Operand::new(pointer(NAME, gradient)?, rows, weight.dim(0)?).t(),
            right: Operand::new(patches.pointer(), rows, shape.patch()),
            scale: 1.0,
            addend: None,
            bias: None,
            out: dw.pointer(),
            out_dtype: x.dtype(),
            batch: (1, [0; 3]),
        },
    )?;
    Ok(dw.into_tensor())
}

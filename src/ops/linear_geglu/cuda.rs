//! The fused kernel of [`linear_geglu`](super::linear_geglu).

use std::ffi::c_void;

use candle_core::Tensor;

use crate::Result;
use crate::cuda::{Buffer, avoids, cuda_device, dtype_code, pointer, stream, taken};

/// `LcmLinearGeglu` of `linear_geglu.h`.
#[repr(C)]
struct Arguments {
    x: *const c_void,
    weight: *const c_void,
    bias: *const c_void,
    y: *mut c_void,
    rows: i32,
    inner: i32,
    columns: i32,
    dtype: i32,
}

unsafe extern "C" {
    fn lcm_linear_geglu_hopper(arguments: *const Arguments, stream: *mut c_void) -> i32;
}

const NAME: &str = "linear_geglu";
const HOPPER: &str = "hopper-geglu";

/// The result, or `None` where no kernel takes these shapes on this GPU. The tensors are contiguous, their shapes fit.
pub(super) fn fused(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let (out, inner) = weight.dims2()?;
    let (rows, columns) = (x.elem_count() / inner.max(1), out / 2);
    let (Ok(rows), Ok(inner), Ok(columns)) = (rows.try_into(), inner.try_into(), i32::try_from(columns)) else {
        return Ok(None);
    };
    if avoids(HOPPER) || rows == 0 {
        return Ok(None);
    }
    let device = cuda_device(NAME, x)?;
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(columns as usize);
    let y = Buffer::new(&device, shape, x.dtype())?;
    let arguments = Arguments {
        x: pointer(NAME, x)?,
        weight: pointer(NAME, weight)?,
        bias: bias.map_or(Ok(std::ptr::null()), |bias| pointer(NAME, bias).map(|p| p.cast_const()))?,
        y: y.pointer(),
        rows,
        inner,
        columns,
        dtype: dtype_code(NAME, x.dtype())?,
    };
    // SAFETY: the pointers belong to tensors of the shapes stated, alive on this stream.
    let status = unsafe { lcm_linear_geglu_hopper(&raw const arguments, stream(&device)) };
    Ok(taken(NAME, status)?.then(|| y.into_tensor()))
}

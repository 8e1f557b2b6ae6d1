//! The fused kernel of [`linear_geglu`](super::linear_geglu).

use candle_core::Tensor;

use crate::Result;
use crate::cuda::{Buffer, HopperLinear, cuda_device, dtype_code, pointer};

const NAME: &str = "linear_geglu";

/// The result, or `None` where no kernel takes these shapes on this GPU. The tensors are contiguous, their shapes fit.
pub(super) fn fused(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let (out, inner) = weight.dims2()?;
    let (rows, columns) = (x.elem_count() / inner.max(1), out / 2);
    let (Ok(rows @ 1..), Ok(inner), Ok(columns)) = (i32::try_from(rows), i32::try_from(inner), i32::try_from(columns))
    else {
        return Ok(None);
    };
    let device = cuda_device(NAME, x)?;
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(out / 2);
    let y = Buffer::new(&device, shape, x.dtype())?;
    let arguments = HopperLinear {
        x: pointer(NAME, x)?,
        weight: pointer(NAME, weight)?,
        bias: bias.map_or(Ok(std::ptr::null()), |bias| pointer(NAME, bias).map(|p| p.cast_const()))?,
        residual: std::ptr::null(),
        y: y.pointer(),
        rows,
        inner,
        columns,
        dtype: dtype_code(NAME, x.dtype())?,
        gated: 1,
    };
    Ok(arguments.launch(NAME, &device)?.then(|| y.into_tensor()))
}

//! Conversion between dtypes.

use candle_core::{DType, Tensor};

use super::storage;
use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::{Error, Result};

/// `x` in another floating-point dtype; its gradient comes back in the dtype of `x`. The same dtype returns `x` itself.
///
/// # Errors
/// [`Error::Argument`] for a dtype that is not floating-point.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    for (argument, dtype) in [("x", x.dtype()), ("dtype", dtype)] {
        if !dtype.is_float() {
            return Err(Error::argument("cast", argument, "a floating-point dtype", format!("{dtype:?}")));
        }
    }
    apply(Cast { from: x.dtype(), to: dtype }, &[x])
}

/// The dtype that losses, schedules and trained parameters are kept in beside activations of a dtype: f32 for bf16 and
/// f16, else the same.
pub(crate) fn wide_dtype(dtype: DType) -> DType {
    match dtype {
        DType::BF16 | DType::F16 => DType::F32,
        other => other,
    }
}

/// `x` in its [`wide_dtype`].
pub(crate) fn widen(x: &Tensor) -> Result<Tensor> {
    cast(x, wide_dtype(x.dtype()))
}

struct Cast {
    from: DType,
    to: DType,
}

impl Function for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        #[cfg(feature = "cuda")]
        if super::cuda::takes(&inputs[0]) && super::cuda::is_kernel_dtype(self.to) {
            return Ok(super::cuda::cast(&inputs[0], self.to)?.into());
        }
        Ok(storage::cast("cast", &inputs[0], self.to)?.into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let gradient = context.gradient()?;
        #[cfg(feature = "cuda")]
        if super::cuda::takes(gradient) && super::cuda::is_kernel_dtype(self.from) {
            return Ok(vec![Some(super::cuda::cast_tensor(gradient, self.from)?)]);
        }
        Ok(vec![Some(gradient.to_dtype(self.from)?)])
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

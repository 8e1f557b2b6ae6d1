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

struct Cast {
    from: DType,
    to: DType,
}

impl Function for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        Ok(storage::cast("cast", &inputs[0], self.to)?.into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(context.gradient()?.to_dtype(self.from)?)])
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

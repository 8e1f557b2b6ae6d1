//! Between channels-first and channels-last images.

use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Backward, Forward, Function, Output, Value, apply, dense};

/// `(batch, channels, height, width)` to `(batch, height, width, channels)`.
///
/// # Errors
/// [`Error::Candle`](crate::Error::Candle) where `x` has not four dimensions.
pub fn to_channels_last(x: &Tensor) -> Result<Tensor> {
    x.dims4()?;
    apply(Permute { order: [0, 2, 3, 1], back: [0, 3, 1, 2], name: "to_channels_last" }, &[x])
}

/// `(batch, height, width, channels)` to `(batch, channels, height, width)`.
///
/// # Errors
/// [`Error::Candle`](crate::Error::Candle) where `x` has not four dimensions.
pub fn to_channels_first(x: &Tensor) -> Result<Tensor> {
    x.dims4()?;
    apply(Permute { order: [0, 3, 1, 2], back: [0, 2, 3, 1], name: "to_channels_first" }, &[x])
}

struct Permute {
    order: [usize; 4],
    back: [usize; 4],
    name: &'static str,
}

impl Function for Permute {
    fn name(&self) -> &'static str {
        self.name
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let (storage, layout) = inputs[0].storage_and_layout();
        let layout = layout.permute(&self.order)?;
        Ok(Output::Fresh(dense(&storage, &layout)?, layout.shape().clone()).into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(context.gradient()?.permute(self.back)?)])
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

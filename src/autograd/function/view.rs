//! Functions whose outputs are views: they share the storage of their input.

use std::sync::Arc;

use candle_core::Tensor;

use super::{Backward, Forward, Function, Output, Value};
use crate::Result;
use crate::autograd::tape::{self, Mode};

/// A differentiable function of one tensor whose outputs are views of it.
pub(crate) trait View: Send + Sync + 'static {
    /// A short name for error messages.
    fn name(&self) -> &'static str;

    /// The views, made by operations of candle that copy nothing.
    fn views(&self, x: &Tensor) -> candle_core::Result<Vec<Tensor>>;

    /// The gradient of the input, given its shape and dtype but no values.
    fn backward(&self, context: &Backward<'_>) -> Result<Tensor>;
}

/// Makes views of a tensor. In candle's graph these are candle's own operations, whose gradients are exact.
pub(crate) fn apply_views(view: impl View, x: &Tensor) -> Result<Vec<Tensor>> {
    match tape::mode() {
        Mode::Graph => Ok(view.views(x)?),
        Mode::Discover => {
            let viewed = Viewed(Arc::new(view));
            tape::discover_views(&viewed, x, |x| viewed.0.views(x))
        }
        Mode::Record => {
            let view = Arc::new(view);
            tape::note_views(Box::new(Viewed(view.clone())), x, |x| view.views(x))
        }
    }
}

struct Viewed<V>(Arc<V>);

impl<V: View> Function for Viewed<V> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let outputs = self.0.views(&inputs[0])?.into_iter().map(Output::Tensor).collect();
        Ok(Forward { outputs, saved: Vec::new() })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(self.0.backward(context)?)])
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

//! What candle's automatic differentiation lacks: operations with any number of inputs and outputs and saved state,
//! a tape for segments of a network, recomputation of activations, and a check of gradients against finite differences.

mod check;
mod function;
mod leaves;
mod recompute;
mod stack;
pub mod tape;
mod taped;
mod taped_once;

pub use check::{GradientCheck, check_gradients};
pub use function::{Backward, Forward, Function, Output, Saves, Value, apply, apply_many};
pub(crate) use function::{View, apply_views, dense};
pub(crate) use leaves::active as differentiates;
pub use leaves::gradients;
pub use recompute::{Recomputations, recomputations, recompute, recompute_keeping, recompute_needed};
pub(crate) use stack::on_pool;
pub use stack::with_large_stack;
pub use taped::taped;
pub(crate) use taped_once::taped_once;

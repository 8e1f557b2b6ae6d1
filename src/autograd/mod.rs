//! What candle's automatic differentiation lacks: operations with any number of inputs and outputs and saved state,
//! recomputation of activations, and a check of gradients against finite differences.

mod check;
mod function;
mod recompute;
mod stack;

pub use check::{GradientCheck, check_gradients};
pub use function::{Backward, Forward, Function, Output, apply, apply_many};
pub use recompute::recompute;
pub use stack::with_large_stack;

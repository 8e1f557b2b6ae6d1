//! Pointwise activation functions.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::support::{Real, dispatch, on_cuda};
use crate::Result;
use crate::autograd::{Backward, Forward, Function, Value, apply};

/// A pointwise activation function. Named as `hidden_act` / `act_fn` in the configurations of transformers and
/// diffusers name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// The identity.
    #[default]
    None,
    /// `x sigmoid(x)`: `silu` or `swish`.
    Silu,
    /// `x Phi(x)` with the normal distribution function, by `erf` (not the tanh approximation): `gelu`.
    Gelu,
    /// `x sigmoid(1.702 x)`: `quick_gelu`, of OpenAI's CLIP.
    QuickGelu,
    /// `max(x, 0)`: `relu`, with the derivative 0 at 0, as in torch.
    Relu,
}

impl Activation {
    /// The function's value.
    #[inline(always)]
    pub(crate) fn value<T: Real>(self, x: T) -> T {
        match self {
            Activation::None => x,
            Activation::Silu => x * sigmoid(x),
            Activation::Gelu => x * x.normal_distribution(),
            Activation::QuickGelu => x * sigmoid(T::of(QUICK_GELU) * x),
            // Written so that NaN passes through.
            Activation::Relu => {
                if x <= T::of(0.0) {
                    T::of(0.0)
                } else {
                    x
                }
            }
        }
    }

    /// The function's derivative.
    #[inline(always)]
    pub(crate) fn derivative<T: Real>(self, x: T) -> T {
        let one = T::of(1.0);
        match self {
            Activation::None => one,
            Activation::Silu => {
                let s = sigmoid(x);
                s + x * s * (one - s)
            }
            Activation::Gelu => x.normal_distribution() + x * normal_density(x),
            Activation::QuickGelu => {
                let s = sigmoid(T::of(QUICK_GELU) * x);
                s + T::of(QUICK_GELU) * x * s * (one - s)
            }
            Activation::Relu => {
                if x <= T::of(0.0) {
                    T::of(0.0)
                } else {
                    one
                }
            }
        }
    }

    /// Replaces every number by the function's value.
    #[inline(always)]
    pub(crate) fn replace<T: Real>(self, xs: &mut [T]) {
        // One loop a function: no choice inside.
        match self {
            Activation::None => {}
            Activation::Silu => xs.iter_mut().for_each(|x| *x = Activation::Silu.value(*x)),
            Activation::Gelu => xs.iter_mut().for_each(|x| *x = Activation::Gelu.value(*x)),
            Activation::QuickGelu => xs.iter_mut().for_each(|x| *x = Activation::QuickGelu.value(*x)),
            Activation::Relu => xs.iter_mut().for_each(|x| *x = Activation::Relu.value(*x)),
        }
    }

    /// Replaces every argument by the function's derivative there times the gradient of the value.
    #[inline(always)]
    pub(crate) fn replace_by_gradient<T: Real>(self, xs: &mut [T], gradient: &[T]) {
        let pairs = xs.iter_mut().zip(gradient);
        match self {
            Activation::None => pairs.for_each(|(x, g)| *x = *g),
            Activation::Silu => pairs.for_each(|(x, g)| *x = *g * Activation::Silu.derivative(*x)),
            Activation::Gelu => pairs.for_each(|(x, g)| *x = *g * Activation::Gelu.derivative(*x)),
            Activation::QuickGelu => pairs.for_each(|(x, g)| *x = *g * Activation::QuickGelu.derivative(*x)),
            Activation::Relu => pairs.for_each(|(x, g)| *x = *g * Activation::Relu.derivative(*x)),
        }
    }
}

const QUICK_GELU: f64 = 1.702;

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    // exp overflows to infinity for very negative x, of which the reciprocal is the right limit, 0.
    T::of(1.0) / (T::of(1.0) + (-x).exp())
}

#[inline(always)]
fn normal_density<T: Real>(x: T) -> T {
    const FACTOR: f64 = 0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
    T::of(FACTOR) * (T::of(-0.5) * x * x).exp()
}

/// Applies a pointwise activation function to a tensor of any shape.
///
/// `x`: any shape, f32 or f64. Returns the same shape. [`Activation::None`] returns `x` itself.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) where the dtype is none of those supported.
pub fn activation(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::None => Ok(x.clone()),
        _ => apply(Pointwise(activation), &[x]),
    }
}

struct Pointwise(Activation);

impl Function for Pointwise {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(self.0, &inputs[0]));
        dispatch!("activation", inputs[0], T => cpu::forward::<T>(self.0, &inputs[0]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        on_cuda!(context.inputs[0] => cuda::backward(self.0, context));
        dispatch!("activation", context.inputs[0], T => cpu::backward::<T>(self.0, context))
    }

    fn uses(&self, value: Value, _: &[bool]) -> bool {
        matches!(value, Value::Input(_))
    }
}

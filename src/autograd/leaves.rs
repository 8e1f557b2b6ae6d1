//! Gradients of variables past candle's graph.
//!
//! For every variable that takes part in a function candle's graph costs zeros, a sum with them, and for functions of
//! many inputs a token each with the same of its own: some seven launches. An encoder has thousands of variables.
//! [`gradients`] has functions hand the gradients of variables over directly; what is left of the graph are the tensors
//! between functions.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, DeviceLocation, Tensor, TensorId, Var};

use crate::{Error, Result};

/// What functions handed over so far.
#[derive(Default)]
struct Leaves {
    sums: HashMap<TensorId, (Tensor, Tensor)>,
    /// Stand-ins for the variables of functions that have no other inputs to be differentiated: without one they would
    /// not be part of the graph.
    anchors: HashMap<DeviceLocation, Var>,
}

thread_local! {
    static LEAVES: RefCell<Option<Leaves>> = const { RefCell::new(None) };
}

/// Puts the leaves of a scope around this one back, also where a panic passes through.
struct Around(Option<Leaves>);

impl Drop for Around {
    fn drop(&mut self) {
        // What is dropped here may run code of others, so after the borrow.
        drop(LEAVES.replace(self.0.take()));
    }
}

/// Computes a loss and differentiates it: the same as `loss()?.backward()`, but faster the more variables there are.
///
/// `None` where there is no loss. All that the loss depends on through variables must be computed inside.
///
/// # Errors
/// Those of `loss`, and of the backward pass.
///
/// # Example
/// ```
/// use candle_core::{Device, Var};
/// use lcm_lookahead::{autograd::gradients, ops};
///
/// let (x, weight) = (Var::new(&[[2f32]], &Device::Cpu)?, Var::new(&[[3f32]], &Device::Cpu)?);
/// let store = gradients(|| Ok(Some(ops::linear(&x, &weight, None)?)))?.unwrap();
/// assert_eq!(store.get(&weight).unwrap().to_vec2::<f32>()?, [[2.0]]);
/// # Ok::<(), lcm_lookahead::Error>(())
/// ```
pub fn gradients(loss: impl FnOnce() -> Result<Option<Tensor>>) -> Result<Option<GradStore>> {
    let around = Around(LEAVES.replace(Some(Leaves::default())));
    let Some(loss) = loss()? else { return Ok(None) };
    let mut store = loss.backward()?;
    let leaves = LEAVES.take().unwrap_or_default();
    drop(around);
    for (variable, gradient) in leaves.sums.into_values() {
        let sum = match store.remove(&variable) {
            // The variable took part in an operation of candle's own as well.
            Some(other) => (other + gradient)?,
            None => gradient,
        };
        store.insert(&variable, sum);
    }
    Ok(Some(store))
}

/// Runs code whose backward pass is its own.
pub(super) fn suspended<T>(run: impl FnOnce() -> T) -> T {
    let _around = Around(LEAVES.take());
    run()
}

/// Whether functions hand the gradients of variables over: inside [`gradients`].
pub(crate) fn active() -> bool {
    LEAVES.with_borrow(Option::is_some)
}

/// A variable that a function of nothing but variables hangs on.
pub(super) fn anchor(device: &Device) -> Result<Tensor> {
    let known = LEAVES.with_borrow(|leaves| leaves.as_ref()?.anchors.get(&device.location()).cloned());
    if let Some(anchor) = known {
        return Ok(anchor.into_inner());
    }
    let anchor = Var::zeros((), DType::F32, device)?;
    LEAVES.with_borrow_mut(|leaves| {
        leaves.as_mut().and_then(|leaves| leaves.anchors.insert(device.location(), anchor.clone()))
    });
    Ok(anchor.into_inner())
}

/// Takes the gradients of variables, given with their places, out of those of all inputs of a function.
pub(super) fn take(variables: &[(usize, Tensor)], gradients: &mut [Option<Tensor>]) -> Result<()> {
    for (place, variable) in variables {
        let Some(gradient) = gradients.get_mut(*place).and_then(Option::take) else { continue };
        let gradient = gradient.detach();
        let before = LEAVES.with_borrow_mut(|leaves| {
            let leaves = leaves.as_mut().ok_or_else(|| {
                let expected = "the backward pass of `autograd::gradients` for what it computed";
                Error::argument("autograd", "backward", expected, "another")
            })?;
            Ok::<_, Error>(leaves.sums.remove(&variable.id()))
        })?;
        let sum = match before {
            Some((_, before)) => (before + gradient)?,
            None => gradient,
        };
        LEAVES.with_borrow_mut(|leaves| {
            if let Some(leaves) = leaves {
                leaves.sums.insert(variable.id(), (variable.clone(), sum));
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{recomputations, recompute};
    use crate::ops;
    use crate::random::Address;

    fn variables(count: usize) -> Result<Vec<Var>> {
        let random = |i: usize| Address::new(3, "leaves").sample(i).normal((4, 4), DType::F64, &Device::Cpu);
        (0..count).map(|i| Ok(Var::from_tensor(&random(i)?)?)).collect()
    }

    /// Recomputed and plain functions of variables alone, of variables and others, and an operation of candle's own.
    fn loss(variables: &[Var], candles_own: bool) -> Result<Tensor> {
        let first = ops::linear(variables[0].as_tensor(), &variables[1], None)?;
        let (segment, constant) = (variables.to_vec(), Tensor::ones((2, 4), DType::F64, &Device::Cpu)?);
        let alone = recompute(&[&constant], move |x| {
            segment.iter().try_fold(x[0].clone(), |x, weight| ops::linear(&x, weight, None)).map(|x| vec![x])
        })?;
        let segment = variables[2..].to_vec();
        let both = recompute(&[&first], move |x| {
            let x = segment.iter().try_fold(x[0].clone(), |x, weight| ops::linear(&x, weight, None))?;
            Ok(vec![if candles_own { x.tanh()? } else { x }])
        })?;
        let own = (variables[1].as_tensor() * variables[3].as_tensor())?;
        Ok(((alone[0].sqr()?.sum_all()? + both[0].sum_all()?)? + own.sum_all()?)?)
    }

    #[test]
    fn gradients_equal_those_of_candles_graph() -> Result<()> {
        let variables = variables(7)?;
        for candles_own in [false, true] {
            let expected = loss(&variables, candles_own)?.backward()?;
            let before = recomputations();
            let found = gradients(|| loss(&variables, candles_own).map(Some))?.unwrap();
            assert_eq!(recomputations().on_graph - before.on_graph, u64::from(candles_own));
            for variable in &variables {
                let (expected, found) = (expected.get(variable).unwrap(), found.get(variable).unwrap());
                let error = (expected - found)?.abs()?.max_all()?.to_scalar::<f64>()?;
                let size = expected.abs()?.max_all()?.to_scalar::<f64>()?;
                assert!(error <= 1e-12 * size, "{error} of {size}");
            }
        }
        Ok(())
    }

    #[test]
    fn variables_that_take_no_part_have_no_gradient_and_no_loss_no_gradients() -> Result<()> {
        let variables = variables(3)?;
        let store = gradients(|| Ok(Some(ops::linear(&variables[0], &variables[1], None)?.sum_all()?)))?.unwrap();
        assert!(store.get(&variables[1]).is_some() && store.get(&variables[2]).is_none());
        assert!(gradients(|| Ok(None))?.is_none());
        assert!(!active());
        Ok(())
    }

    #[test]
    fn another_backward_pass_than_its_own_is_an_error() -> Result<()> {
        let variables = variables(2)?;
        let mut escaped = None;
        gradients(|| {
            escaped = Some(ops::linear(&variables[0], &variables[1], None)?.sum_all()?);
            Ok(None)
        })?;
        assert!(escaped.unwrap().backward().unwrap_err().to_string().contains("autograd::gradients"));
        Ok(())
    }
}

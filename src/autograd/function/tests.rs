use candle_core::{Device, Var};

use super::*;

/// `(a*b + c*d, a - d)`: four inputs, two outputs.
struct Pair;

impl Function for Pair {
    fn name(&self) -> &'static str {
        "pair"
    }
    fn forward(&self, x: &[Tensor]) -> Result<Forward> {
        let first = ((&x[0] * &x[1])? + (&x[2] * &x[3])?)?;
        let second = (&x[0] - &x[3])?;
        Ok(Forward { outputs: vec![Output::Tensor(first), Output::Tensor(second)], saved: vec![] })
    }
    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        assert!(!context.needs[1], "b is frozen in this test");
        let x = context.inputs;
        let zero = x[0].zeros_like()?;
        let g1 = context.gradients[0].as_ref().unwrap_or(&zero);
        let g2 = context.gradients[1].as_ref().unwrap_or(&zero);
        Ok(vec![Some(((g1 * &x[1])? + g2)?), None, Some((g1 * &x[3])?), Some(((g1 * &x[2])? - g2)?)])
    }
}

fn variable(value: f64) -> Result<Var> {
    Ok(Var::new(&[value], &Device::Cpu)?)
}

fn value(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.sum_all()?.to_scalar()?)
}

#[test]
fn several_inputs_and_outputs_get_their_own_gradients_and_frozen_ones_none() -> Result<()> {
    let (a, c, d) = (variable(2.)?, variable(5.)?, variable(7.)?);
    let b = Tensor::new(&[3f64], &Device::Cpu)?;
    let outputs = apply_many(Pair, &[a.as_tensor(), &b, c.as_tensor(), d.as_tensor()])?;
    assert_eq!((value(&outputs[0])?, value(&outputs[1])?), (41., -5.));
    // The same graph walked for both outputs, for one and for the other.
    let both = (&outputs[0] + (&outputs[1] * 10.)?)?.backward()?;
    let first = outputs[0].backward()?;
    let second = outputs[1].backward()?;
    let gradient = |store: &candle_core::backprop::GradStore, x: &Var| value(store.get(x).unwrap());
    assert_eq!((gradient(&both, &a)?, gradient(&both, &c)?, gradient(&both, &d)?), (13., 7., -5.));
    assert_eq!((gradient(&first, &a)?, gradient(&first, &c)?, gradient(&first, &d)?), (3., 7., 5.));
    assert_eq!((gradient(&second, &a)?, gradient(&second, &c)?, gradient(&second, &d)?), (1., 0., -1.));
    assert!(both.get(&b).is_none());
    Ok(())
}

#[test]
fn without_a_tracked_input_there_is_no_graph() -> Result<()> {
    let x = Tensor::new(&[1f64], &Device::Cpu)?;
    let outputs = apply_many(Pair, &[&x, &x, &x, &x])?;
    assert!(outputs.iter().all(|output| !output.track_op()));
    Ok(())
}

use candle_core::{D, DType, Device, Tensor, Var};

use super::layer_norm;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

const EPS: f64 = 1e-5;

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(8, purpose).normal(shape, DType::F64, &Device::Cpu)
}

fn inputs(shape: &[usize]) -> Result<[Tensor; 3]> {
    let channels = &shape[shape.len() - 1..];
    Ok([random("x", shape)?, random("w", channels)?, random("b", channels)?])
}

fn naive(t: &[Tensor]) -> Result<Tensor> {
    let centred = t[0].broadcast_sub(&t[0].mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    Ok(centred.broadcast_div(&deviation)?.broadcast_mul(&t[1])?.broadcast_add(&t[2])?)
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!(a.dims(), b.dims());
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f64>()?)
}

#[test]
fn values_and_gradients_equal_those_of_the_definition() -> Result<()> {
    for shape in [&[2, 3, 10][..], &[150, 7], &[12], &[64, 3]] {
        let variables = inputs(shape)?.map(|t| Var::from_tensor(&t).unwrap().into_inner());
        let ours = layer_norm(&variables[0], &variables[1], &variables[2], EPS)?;
        let expected = naive(&variables)?;
        assert!(distance(&ours, &expected)? < 1e-12, "{shape:?}");
        let weights = random("weights", shape)?;
        let ours = (ours * &weights)?.sum_all()?.backward()?;
        let expected = (expected * &weights)?.sum_all()?.backward()?;
        for variable in &variables {
            let difference = distance(ours.get(variable).unwrap(), expected.get(variable).unwrap())?;
            assert!(difference < 1e-11, "{shape:?}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn gradients_of_all_arguments_match_finite_differences() -> Result<()> {
    let check = check_gradients(&inputs(&[2, 3, 6])?, |t| Ok(vec![layer_norm(&t[0], &t[1], &t[2], EPS)?]))?;
    assert!(check.worst() < 1e-7, "{check:?}");
    assert!(check.norms.iter().all(|norm| *norm > 1e-2), "{check:?}");
    Ok(())
}

#[test]
fn frozen_weights_get_no_gradient() -> Result<()> {
    let [x, w, b] = inputs(&[3, 4])?;
    let x = Var::from_tensor(&x)?;
    let gradients = layer_norm(&x, &w, &b, EPS)?.sqr()?.sum_all()?.backward()?;
    assert!(gradients.get(&x).is_some());
    assert!(gradients.get(&w).is_none() && gradients.get(&b).is_none());
    Ok(())
}

#[test]
fn a_large_mean_costs_single_precision_no_digits() -> Result<()> {
    let [x, w, b] = inputs(&[20, 64])?;
    let single = [(x + 1000.0)?, w, b].map(|t| t.to_dtype(DType::F32).unwrap());
    let double = single.clone().map(|t| t.to_dtype(DType::F64).unwrap());
    let ours = layer_norm(&single[0], &single[1], &single[2], EPS)?.to_dtype(DType::F64)?;
    let difference = distance(&ours, &naive(&double)?)?;
    assert!(difference < 2e-6, "{difference}");
    Ok(())
}

#[test]
fn a_weight_of_another_width_is_named() -> Result<()> {
    let [x, _, b] = inputs(&[3, 4])?;
    let error = layer_norm(&x, &random("w", &[5])?, &b, EPS).unwrap_err().to_string();
    assert!(error.contains("`weight`: expected (4,), found [5]"), "{error}");
    Ok(())
}

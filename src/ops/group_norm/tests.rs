use candle_core::{DType, Device, Tensor, Var};

use super::group_norm;
use crate::Result;
use crate::autograd::check_gradients;
use crate::ops::{Activation, activation};
use crate::random::Address;

const ALL: [Activation; 5] =
    [Activation::None, Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::Relu];

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(5, purpose).normal(shape, DType::F64, &Device::Cpu)
}

fn largest(difference: Tensor) -> Result<f64> {
    Ok(difference.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

/// The definition, in candle's own operations, for `(batch, positions, channels)`.
fn composed(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64, act: Activation) -> Result<Tensor> {
    let (batch, positions, channels) = x.dims3()?;
    let grouped = x.reshape((batch, positions, groups, channels / groups))?;
    let centred = grouped.broadcast_sub(&grouped.mean_keepdim((1, 3))?)?;
    let deviation = (centred.sqr()?.mean_keepdim((1, 3))? + eps)?.sqrt()?;
    let normal = centred.broadcast_div(&deviation)?.reshape(x.shape())?;
    activation(&normal.broadcast_mul(weight)?.broadcast_add(bias)?, act)
}

#[test]
fn values_equal_the_definition_for_every_activation() -> Result<()> {
    for (shape, groups) in [([2, 5, 6], 3), ([1, 1, 4], 2), ([3, 1000, 33], 11), ([2, 7, 5], 5)] {
        let (x, w, b) = (random("x", &shape)?, random("w", &shape[2..])?, random("b", &shape[2..])?);
        for act in ALL {
            let expected = composed(&x, groups, &w, &b, 1e-5, act)?;
            let difference = largest((group_norm(&x, groups, &w, &b, 1e-5, act)? - expected)?)?;
            assert!(difference < 1e-11, "{shape:?} {act:?}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn gradients_of_all_arguments_match_finite_differences() -> Result<()> {
    for (shape, groups) in [(vec![2, 3, 5, 6], 3), (vec![1, 1, 1, 4], 1), (vec![3, 7, 5], 1)] {
        let channels = &shape[shape.len() - 1..];
        let inputs = [random("x", &shape)?, random("w", channels)?, random("b", channels)?];
        for act in ALL {
            let check = check_gradients(&inputs, |t| Ok(vec![group_norm(&t[0], groups, &t[1], &t[2], 1e-5, act)?]))?;
            assert!(check.worst() < 1e-7, "{shape:?} {act:?}: {check:?}");
        }
    }
    Ok(())
}

#[test]
fn gradients_over_many_chunks_equal_those_of_the_definition() -> Result<()> {
    let shape = [2, 1500, 32];
    let [x, w, b] = [random("x", &shape)?, random("w", &[32])?, random("b", &[32])?].map(|t| Var::from_tensor(&t));
    let (x, w, b) = (x?, w?, b?);
    let weighting = random("g", &shape)?;
    let ours = (group_norm(&x, 8, &w, &b, 1e-6, Activation::Silu)? * &weighting)?.sum_all()?.backward()?;
    let theirs = (composed(&x, 8, &w, &b, 1e-6, Activation::Silu)? * &weighting)?.sum_all()?.backward()?;
    for variable in [&x, &w, &b] {
        assert!(largest((ours.get(variable).unwrap() - theirs.get(variable).unwrap())?)? < 1e-9);
    }
    Ok(())
}

#[test]
fn a_large_mean_costs_no_precision_beyond_that_of_the_input() -> Result<()> {
    let (w, b) = (Tensor::ones(8, DType::F32, &Device::Cpu)?, Tensor::zeros(8, DType::F32, &Device::Cpu)?);
    // Multiples of 1/256 near 1000 are exact in f32.
    let noise = ((random("x", &[1, 64, 8])? * 256.0)?.round()? / 256.0)?;
    let near = group_norm(&noise.to_dtype(DType::F32)?, 2, &w, &b, 1e-5, Activation::None)?;
    let far = group_norm(&(noise + 1000.0)?.to_dtype(DType::F32)?, 2, &w, &b, 1e-5, Activation::None)?;
    assert!(largest((near - far)?)? < 1e-4);
    Ok(())
}

#[test]
fn the_number_of_threads_changes_no_bit() -> Result<()> {
    let run = |threads: usize| -> Result<Vec<Vec<f32>>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let variable = |purpose, shape: &[usize]| -> Result<Var> {
                Ok(Var::from_tensor(&random(purpose, shape)?.to_dtype(DType::F32)?)?)
            };
            let (x, w, b) = (variable("x", &[2, 40, 40, 32])?, variable("w", &[32])?, variable("b", &[32])?);
            let gradients = group_norm(&x, 4, &w, &b, 1e-5, Activation::Silu)?.sqr()?.sum_all()?.backward()?;
            [&x, &w, &b].map(|v| Ok(gradients.get(v).unwrap().flatten_all()?.to_vec1::<f32>()?)).into_iter().collect()
        })
    };
    assert!(run(1)? == run(3)?);
    Ok(())
}

#[test]
fn frozen_weights_get_no_gradient() -> Result<()> {
    let (x, w, b) = (Var::from_tensor(&random("x", &[1, 3, 4])?)?, random("w", &[4])?, random("b", &[4])?);
    let gradients = group_norm(&x, 2, &w, &b, 1e-5, Activation::Silu)?.sum_all()?.backward()?;
    assert!(gradients.get(&x).is_some());
    assert!(gradients.get(&w).is_none() && gradients.get(&b).is_none());
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let (x, w, b) = (random("x", &[1, 3, 4])?, random("w", &[4])?, random("b", &[4])?);
    let message = |x: &Tensor, groups, w: &Tensor, b: &Tensor, eps| {
        group_norm(x, groups, w, b, eps, Activation::None).unwrap_err().to_string()
    };
    assert!(message(&x, 3, &w, &b, 1e-5).contains("`groups`: expected a divisor of the 4 channels, found 3"));
    assert!(message(&x, 0, &w, &b, 1e-5).contains("`groups`"));
    assert!(message(&x, 2, &random("w", &[5])?, &b, 1e-5).contains("`weight`"));
    assert!(message(&x, 2, &w, &random("b", &[2])?, 1e-5).contains("`bias`"));
    assert!(message(&x, 2, &w, &b.to_dtype(DType::F32)?, 1e-5).contains("`bias`"));
    assert!(message(&x, 2, &w, &b, -1.0).contains("`eps`"));
    assert!(message(&random("x", &[4])?, 2, &w, &b, 1e-5).contains("`x`"));
    Ok(())
}

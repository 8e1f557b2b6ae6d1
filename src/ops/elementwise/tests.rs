use candle_core::{DType, Device, Tensor, Var};

use super::*;
use crate::Result;
use crate::autograd::{check_gradients, recomputations, recompute};
use crate::ops::linear;
use crate::random::Address;

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(31, purpose).normal(shape, DType::F64, &Device::Cpu)
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar()?)
}

/// An operation equals what candle makes of it, and its gradients equal finite differences, in candle's graph and on a
/// tape.
fn check(
    inputs: &[Tensor],
    ours: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + Clone + Send + Sync + 'static,
    candles: impl Fn(&[Tensor]) -> candle_core::Result<Vec<Tensor>>,
) -> Result<()> {
    for (found, expected) in ours(inputs)?.iter().zip(candles(inputs)?) {
        assert_eq!(found.dims(), expected.dims());
        assert_eq!(distance(found, &expected)?, 0.0);
    }
    let in_graph = check_gradients(inputs, &ours)?;
    assert!(in_graph.worst() < 1e-8 && in_graph.norms.iter().all(|norm| *norm > 0.1), "{in_graph:?}");
    let before = recomputations();
    let on_tape = check_gradients(inputs, |x| recompute(&x.iter().collect::<Vec<_>>(), ours.clone()))?;
    assert_eq!(on_tape.relative_errors, in_graph.relative_errors);
    let after = recomputations();
    assert_eq!((after.on_tape - before.on_tape, after.on_graph), (1, before.on_graph));
    Ok(())
}

#[test]
fn add_is_a_sum() -> Result<()> {
    let inputs = [random("a", &[2, 3, 4])?, random("b", &[2, 3, 4])?];
    check(&inputs, |x| Ok(vec![add(&x[0], &x[1])?]), |x| Ok(vec![(&x[0] + &x[1])?]))?;
    check(&inputs, |x| Ok(vec![add_scaled(&x[0], &x[1], -0.3)?]), |x| Ok(vec![(&x[0] + (&x[1] * -0.3)?)?]))
}

#[test]
fn scale_is_a_product() -> Result<()> {
    check(&[random("x", &[2, 5])?], |x| Ok(vec![scale(&x[0], 0.7)?]), |x| Ok(vec![(&x[0] * 0.7)?]))
}

#[test]
fn add_per_sample_adds_a_samples_vector_everywhere() -> Result<()> {
    let inputs = [random("x", &[2, 3, 2, 4])?, random("v", &[2, 4])?];
    check(
        &inputs,
        |x| Ok(vec![add_per_sample(&x[0], &x[1])?]),
        |x| Ok(vec![x[0].broadcast_add(&x[1].reshape((2, 1, 1, 4))?)?]),
    )
}

#[test]
fn concat_channels_sets_channels_side_by_side() -> Result<()> {
    let inputs = [random("a", &[2, 3, 2, 4])?, random("b", &[2, 3, 2, 1])?];
    check(&inputs, |x| Ok(vec![concat_channels(&x[0], &x[1])?]), |x| Ok(vec![Tensor::cat(&[&x[0], &x[1]], 3)?]))
}

#[test]
fn a_permuted_image_keeps_its_pixels() -> Result<()> {
    let x = random("x", &[2, 3, 4, 5])?;
    check(
        std::slice::from_ref(&x),
        |x| Ok(vec![to_channels_last(&x[0])?]),
        |x| Ok(vec![x[0].permute((0, 2, 3, 1))?.contiguous()?]),
    )?;
    check(
        std::slice::from_ref(&x),
        |x| Ok(vec![to_channels_first(&x[0])?]),
        |x| Ok(vec![x[0].permute((0, 3, 1, 2))?]),
    )?;
    assert_eq!(distance(&to_channels_first(&to_channels_last(&x)?)?, &x)?, 0.0);
    Ok(())
}

#[test]
fn a_cast_gradient_comes_back_in_the_dtype_of_the_argument() -> Result<()> {
    let (x, weight) = (random("x", &[3, 4])?.to_dtype(DType::F32)?, Var::from_tensor(&random("w", &[2, 4])?)?);
    let through = |on_tape: bool| -> Result<Tensor> {
        let (x, w) = (x.clone(), weight.as_tensor().clone());
        let segment = move |_: &[Tensor]| Ok(vec![linear(&x, &cast(&w, DType::F32)?, None)?]);
        let y = if on_tape { recompute(&[], segment)? } else { segment(&[])? };
        assert_eq!(y[0].dtype(), DType::F32);
        Ok(y[0].sqr()?.sum_all()?.backward()?.remove(&weight).unwrap())
    };
    let (in_graph, on_tape) = (through(false)?, through(true)?);
    assert_eq!((in_graph.dtype(), on_tape.dtype()), (DType::F64, DType::F64));
    let y = x.to_dtype(DType::F64)?.matmul(&weight.t()?)?;
    let exact = (y.t()?.matmul(&x.to_dtype(DType::F64)?)? * 2.0)?.detach();
    assert!(distance(&in_graph, &exact)? < 1e-5);
    assert_eq!(distance(&in_graph, &on_tape)?, 0.0);
    Ok(())
}

#[test]
fn views_show_the_same_numbers() -> Result<()> {
    let inputs = [random("x", &[2, 3, 5])?];
    check(&inputs, |x| Ok(vec![reshape(&x[0], (6, 5))?]), |x| Ok(vec![x[0].reshape((6, 5))?]))?;
    check(&inputs, |x| Ok(vec![narrow(&x[0], 1, 3)?]), |x| Ok(vec![x[0].narrow(2, 1, 3)?]))?;
    check(&inputs, |x| split(&x[0], &[2, 3]), |x| Ok(vec![x[0].narrow(2, 0, 2)?, x[0].narrow(2, 2, 3)?]))?;
    // Parts that are all, and parts of which one is no part of the loss.
    check(&inputs, |x| Ok(vec![narrow(&x[0], 0, 5)?]), |x| Ok(vec![x[0].clone()]))?;
    check(&inputs, |x| Ok(vec![split(&x[0], &[2, 3])?.remove(1)]), |x| Ok(vec![x[0].narrow(2, 2, 3)?]))
}

#[test]
fn views_share_the_storage() -> Result<()> {
    let x = Var::from_tensor(&random("x", &[2, 6])?)?;
    let (flat, parts) = (reshape(&x, (12,))?, split(&x, &[4, 2])?);
    x.set(&x.zeros_like()?)?;
    for view in [&flat, &parts[0], &parts[1]] {
        assert_eq!(view.abs()?.sum_all()?.to_scalar::<f64>()?, 0.0);
    }
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let x = random("x", &[2, 3, 4])?;
    for (error, parts) in [
        (add(&x, &random("b", &[2, 4])?).unwrap_err(), ["[2, 3, 4]", "[2, 4]"]),
        (add(&x, &x.to_dtype(DType::F32)?).unwrap_err(), ["F64", "F32"]),
        (add_per_sample(&x, &random("v", &[3, 4])?).unwrap_err(), ["[2, 3, 4]", "[3, 4]"]),
        (concat_channels(&x, &random("b", &[3, 3, 4])?).unwrap_err(), ["[2, 3, 4]", "[3, 3, 4]"]),
        (cast(&x, DType::U32).unwrap_err(), ["floating-point", "U32"]),
        (reshape(&x, (5, 5)).unwrap_err(), ["24 elements", "[5, 5]"]),
        (narrow(&x, 3, 2).unwrap_err(), ["4 channels", "2 channels from 3"]),
        (split(&x, &[2, 3]).unwrap_err(), ["4", "[2, 3]"]),
    ] {
        let message = error.to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    Ok(())
}

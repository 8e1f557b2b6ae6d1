use candle_core::{DType, Device, Tensor};

use super::{gated_sum, mean_pixels};
use crate::Result;
use crate::autograd::{check_gradients, taped};
use crate::random::Address;

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(6, purpose).normal(shape, DType::F64, &Device::Cpu)
}

fn numbers(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

#[test]
fn values_equal_the_definitions() -> Result<()> {
    let (x, logits, addend) = (random("x", &[2, 3, 4, 5])?, random("s", &[2, 1, 1, 5])?, random("a", &[2, 3, 4, 5])?);
    let (xs, ls, rest) = (numbers(&x)?, numbers(&logits)?, numbers(&addend)?);
    let (gated, means) = (numbers(&gated_sum(&x, &logits, &addend)?)?, mean_pixels(&x)?);
    assert_eq!(means.dims(), [2, 1, 1, 5]);
    let mut sums = [0.0; 10];
    for (i, found) in gated.iter().enumerate() {
        let place = i / 60 * 5 + i % 5;
        let expected = xs[i] / (1.0 + (-ls[place]).exp()) + rest[i];
        assert!((found - expected).abs() < 1e-12, "{found} and {expected}");
        sums[place] += xs[i];
    }
    for (mean, sum) in numbers(&means)?.iter().zip(sums) {
        assert!((mean - sum / 12.0).abs() < 1e-12);
    }
    Ok(())
}

#[test]
fn gradients_of_all_arguments_match_finite_differences_in_a_graph_and_on_a_tape() -> Result<()> {
    let inputs = [random("x", &[2, 3, 2, 3])?, random("s", &[2, 1, 1, 3])?, random("a", &[2, 3, 2, 3])?];
    let network =
        |t: &[Tensor]| -> Result<Vec<Tensor>> { Ok(vec![gated_sum(&t[0], &t[1], &t[2])?, mean_pixels(&t[0])?]) };
    for on_tape in [false, true] {
        let check = check_gradients(&inputs, |t| match on_tape {
            true => taped(&t.iter().collect::<Vec<_>>(), network),
            false => network(t),
        })?;
        assert!(check.worst() < 1e-7 && check.norms.iter().all(|norm| *norm > 0.1), "{check:?}");
    }
    Ok(())
}

#[test]
fn huge_logits_open_and_close_and_pass_no_nan() -> Result<()> {
    let x = Tensor::new(&[[[[2f64, 3.0]]]], &Device::Cpu)?;
    let logits = Tensor::new(&[[[[1e4f64, -1e4]]]], &Device::Cpu)?;
    assert_eq!(numbers(&gated_sum(&x, &logits, &x.zeros_like()?)?)?, [2.0, 0.0]);
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let (x, logits) = (random("x", &[2, 3, 4, 5])?, random("s", &[2, 1, 1, 5])?);
    assert!(gated_sum(&x, &logits.squeeze(1)?, &x).unwrap_err().to_string().contains("`logits`"));
    assert!(gated_sum(&x, &logits, &logits).unwrap_err().to_string().contains("`addend`"));
    assert!(gated_sum(&x, &logits, &x.to_dtype(DType::F32)?).unwrap_err().to_string().contains("`addend`"));
    assert!(mean_pixels(&x.get(0)?).unwrap_err().to_string().contains("`x`"));
    Ok(())
}

use candle_core::{DType, Device, Tensor};

use super::{resize_bicubic, taps};
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

fn random(shape: &[usize]) -> Result<Tensor> {
    Address::new(5, "x").normal(shape, DType::F64, &Device::Cpu)
}

#[test]
fn taps_are_keys_filter_stretched_and_normalised() {
    // Doubling: a quarter and three quarters of a pixel off, and one pixel further out on both sides.
    let close = |found: &[(usize, f64)], expected: &[f64]| {
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(expected).all(|((_, a), b)| (a - b).abs() < 1e-12), "{found:?}, not {expected:?}");
    };
    close(&taps(6, 12, 5), &[-0.0703125, 0.8671875, 0.2265625, -0.0234375]);
    // The same size: one pixel.
    let same: Vec<_> = taps(5, 5, 2).into_iter().filter(|(_, weight)| *weight != 0.0).collect();
    assert_eq!(same, [(2, 1.0)]);
    assert!((taps(100, 7, 3).iter().map(|(_, weight)| weight).sum::<f64>() - 1.0).abs() < 1e-12);
}

#[test]
fn a_straight_slope_stays_straight_inside() -> Result<()> {
    let x = Tensor::arange(0f64, 12.0, &Device::Cpu)?.reshape((1, 1, 12, 1))?;
    let y = resize_bicubic(&x, 1, 24)?.flatten_all()?.to_vec1::<f64>()?;
    for (i, value) in y.iter().enumerate().skip(4).take(16) {
        assert!((value - ((i as f64 + 0.5) / 2.0 - 0.5)).abs() < 1e-12, "{i}: {value}");
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for (shape, height, width) in [([2, 7, 5, 2], 3, 8), ([1, 4, 9, 1], 9, 4), ([1, 1, 1, 3], 2, 3)] {
        let check = check_gradients(&[random(&shape)?], |t| Ok(vec![resize_bicubic(&t[0], height, width)?]))?;
        assert!(check.worst() < 1e-7, "{shape:?}: {check:?}");
    }
    Ok(())
}

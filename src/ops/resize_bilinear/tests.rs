use candle_core::{DType, Device, Tensor};

use super::resize_bilinear;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

fn random(shape: &[usize]) -> Result<Tensor> {
    Address::new(5, "x").normal(shape, DType::F64, &Device::Cpu)
}

/// The resized version of a picture of one row.
fn row(values: &[f64], width: usize, antialias: bool) -> Result<Vec<f64>> {
    let x = Tensor::new(values, &Device::Cpu)?.reshape((1, 1, values.len(), 1))?;
    Ok(resize_bilinear(&x, 1, width, antialias)?.flatten_all()?.to_vec1()?)
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}, not {expected:?}");
}

#[test]
fn an_enlargement_interpolates_between_pixel_centres_and_repeats_the_border() -> Result<()> {
    for antialias in [false, true] {
        close(&row(&[0., 4., 8.], 6, antialias)?, &[0., 1., 3., 5., 7., 8.]);
        close(&row(&[0., 8.], 4, antialias)?, &[0., 2., 6., 8.]);
        close(&row(&[3.], 4, antialias)?, &[3.; 4]);
    }
    Ok(())
}

#[test]
fn a_reduction_without_antialiasing_reads_two_pixels_only() -> Result<()> {
    close(&row(&[1., 2., 4., 8., 16., 32., 64., 128.], 2, false)?, &[3., 48.]);
    close(&row(&[1., 2., 4.], 1, false)?, &[2.]);
    Ok(())
}

#[test]
fn an_antialiased_reduction_weighs_with_a_stretched_triangle() -> Result<()> {
    // Halving: weights 1, 3, 3, 1 (of 8) inside; what would lie outside the picture is left out of the mean.
    let found = row(&[1., 2., 4., 8., 16., 32.], 3, true)?;
    let edge = |a: f64, b: f64, c: f64| (3. * a + 3. * b + c) / 7.;
    close(&found, &[edge(1., 2., 4.), (2. + 3. * 4. + 3. * 8. + 16.) / 8., edge(32., 16., 8.)]);
    Ok(())
}

/// The definition by dense weights, one output at a time, for two axes at once.
fn dense(from: usize, to: usize, antialias: bool) -> Vec<Vec<f64>> {
    let scale = from as f64 / to as f64;
    let reach = if antialias { scale.max(1.0) } else { 1.0 };
    (0..to)
        .map(|output| {
            let mut centre = (output as f64 + 0.5) * scale - 0.5;
            if !antialias {
                centre = centre.clamp(0.0, (from - 1) as f64);
            }
            let weights: Vec<f64> = (0..from).map(|i| (1.0 - (i as f64 - centre).abs() / reach).max(0.0)).collect();
            let total: f64 = weights.iter().sum();
            weights.iter().map(|weight| weight / total).collect()
        })
        .collect()
}

#[test]
fn values_equal_the_definition_on_both_axes() -> Result<()> {
    for ([batch, height, width, channels], (to_height, to_width)) in
        [([2, 7, 9, 3], (3, 14)), ([1, 40, 33, 2], (17, 11)), ([3, 5, 4, 1], (5, 13)), ([2, 80, 6, 3], (9, 1))]
    {
        for antialias in [false, true] {
            let x = random(&[batch, height, width, channels])?;
            let matrix = |rows: Vec<Vec<f64>>| Tensor::new(rows, &Device::Cpu);
            let (down, across) =
                (matrix(dense(height, to_height, antialias))?, matrix(dense(width, to_width, antialias))?);
            let columns = x.reshape((batch, height, width * channels))?;
            let tall = down.broadcast_left(batch)?.contiguous()?.matmul(&columns)?;
            let rows = tall.reshape((batch * to_height, width, channels))?;
            let expected = across.broadcast_left(batch * to_height)?.contiguous()?.matmul(&rows)?;
            let found = resize_bilinear(&x, to_height, to_width, antialias)?.reshape(expected.shape())?;
            let difference = (found - expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(difference < 1e-12, "{difference}");
        }
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for (shape, height, width) in
        [([2, 7, 5, 2], 3, 8), ([1, 4, 9, 1], 9, 4), ([1, 1, 1, 3], 2, 3), ([1, 66, 2, 1], 5, 1)]
    {
        for antialias in [false, true] {
            let check =
                check_gradients(&[random(&shape)?], |t| Ok(vec![resize_bilinear(&t[0], height, width, antialias)?]))?;
            assert!(check.worst() < 1e-7, "{shape:?}: {check:?}");
        }
    }
    Ok(())
}

#[test]
fn f32_gives_the_values_of_f64() -> Result<()> {
    let x = random(&[2, 9, 7, 3])?;
    let single = resize_bilinear(&x.to_dtype(DType::F32)?, 4, 5, true)?.to_dtype(DType::F64)?;
    let difference = (single - resize_bilinear(&x, 4, 5, true)?)?.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(difference < 1e-6, "{difference}");
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let message = |x: &Tensor, height, width| resize_bilinear(x, height, width, true).unwrap_err().to_string();
    assert!(message(&random(&[2, 3, 3])?, 2, 2).contains("`x`"));
    assert!(message(&random(&[1, 2, 3, 3])?, 0, 2).contains("`height`"));
    assert!(message(&random(&[1, 2, 3, 3])?, 2, 0).contains("`width`"));
    Ok(())
}

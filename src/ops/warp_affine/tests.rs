use candle_core::{DType, Device, Tensor};

use super::warp_affine;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

const IDENTITY: [[f64; 3]; 2] = [[1., 0., 0.], [0., 1., 0.]];
const TURN: [[f64; 3]; 2] = [[0.8, -0.45, 1.3], [0.5, 0.7, -0.6]];

fn random(shape: &[usize]) -> Result<Tensor> {
    Address::new(5, "x").normal(shape, DType::F64, &Device::Cpu)
}

fn flat(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

#[test]
fn the_identity_crops_or_pads_with_zeros() -> Result<()> {
    let x = random(&[2, 3, 4, 2])?;
    assert_eq!(flat(&warp_affine(&x, &[IDENTITY; 2], 3, 4)?)?, flat(&x)?);
    assert_eq!(flat(&warp_affine(&x, &[IDENTITY; 2], 2, 3)?)?, flat(&x.narrow(1, 0, 2)?.narrow(2, 0, 3)?)?);
    let padded = x.pad_with_zeros(1, 0, 2)?.pad_with_zeros(2, 0, 1)?;
    assert_eq!(flat(&warp_affine(&x, &[IDENTITY; 2], 5, 5)?)?, flat(&padded)?);
    Ok(())
}

#[test]
fn a_matrix_maps_output_pixels_to_input_positions() -> Result<()> {
    let x = Tensor::new(&[[1., 2., 4.], [8., 16., 32.]], &Device::Cpu)?.reshape((1, 2, 3, 1))?;
    // Output (x, y) reads input (x + 1, y); then a quarter of the way down and half a pixel to the left.
    assert_eq!(flat(&warp_affine(&x, &[[[1., 0., 1.], [0., 1., 0.]]], 2, 2)?)?, [2., 4., 16., 32.]);
    let shifted = flat(&warp_affine(&x, &[[[1., 0., -0.5], [0., 1., 0.25]]], 1, 2)?)?;
    assert_eq!(shifted, [0.5 * (0.75 * 1. + 0.25 * 8.), 0.75 * 1.5 + 0.25 * 12.]);
    // Transposition: output (x, y) reads input (y, x).
    assert_eq!(flat(&warp_affine(&x, &[[[0., 1., 0.], [1., 0., 0.]]], 3, 2)?)?, [1., 8., 2., 16., 4., 32.]);
    Ok(())
}

#[test]
fn every_sample_has_its_own_matrix_and_values_equal_the_definition() -> Result<()> {
    let (height, width, channels, to_height, to_width) = (6, 5, 3, 7, 8);
    let x = random(&[2, height, width, channels])?;
    let matrices = [TURN, [[-0.9, 0.3, 4.2], [0.1, 1.7, -1.1]]];
    let xs = flat(&x)?;
    let mut expected = Vec::new();
    for (sample, [across, down]) in matrices.iter().enumerate() {
        for (row, column) in (0..to_height).flat_map(|y| (0..to_width).map(move |x| (y as f64, x as f64))) {
            let at = |line: &[f64; 3]| line[0] * column + line[1] * row + line[2];
            for channel in 0..channels {
                // Bilinear interpolation is a mean with the weights of a triangle around the position.
                let mut sum = 0.0;
                for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
                    let weight = |position: f64, pixel: usize| (1.0 - (position - pixel as f64).abs()).max(0.0);
                    sum += xs[((sample * height + y) * width + x) * channels + channel]
                        * weight(at(across), x)
                        * weight(at(down), y);
                }
                expected.push(sum);
            }
        }
    }
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        let found = flat(&warp_affine(&x.to_dtype(dtype)?, &matrices, to_height, to_width)?)?;
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < tolerance));
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for (shape, height, width) in [([2, 5, 7, 2], 6, 5), ([1, 4, 3, 3], 2, 9), ([1, 1, 2, 1], 3, 3)] {
        let matrices = &[TURN, [[-0.9, 0.3, 4.2], [0.1, 1.7, -1.1]]][..shape[0]];
        let check = check_gradients(&[random(&shape)?], |t| Ok(vec![warp_affine(&t[0], matrices, height, width)?]))?;
        assert!(check.worst() < 1e-7 && check.norms[0] > 0.1, "{shape:?}: {check:?}");
    }
    Ok(())
}

#[test]
fn positions_far_outside_are_zero() -> Result<()> {
    let far = [[1., 0., 1e300], [0., 1., -1e300]];
    assert!(flat(&warp_affine(&random(&[1, 3, 3, 1])?, &[far], 2, 2)?)?.iter().all(|value| *value == 0.0));
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let x = random(&[2, 3, 3, 1])?;
    let message = |x: &Tensor, matrices: &[[[f64; 3]; 2]], height, width| {
        warp_affine(x, matrices, height, width).unwrap_err().to_string()
    };
    assert!(message(&x, &[IDENTITY], 2, 2).contains("`matrices`: expected 2"));
    assert!(message(&x, &[IDENTITY, [[f64::NAN; 3]; 2]], 2, 2).contains("finite"));
    assert!(message(&x, &[IDENTITY; 2], 0, 2).contains("`height`"));
    assert!(message(&x, &[IDENTITY; 2], 2, 0).contains("`width`"));
    assert!(message(&random(&[3, 3, 1])?, &[IDENTITY; 3], 2, 2).contains("`x`"));
    Ok(())
}

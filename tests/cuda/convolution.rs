//! Convolutions.

use candle_core::{DType, Tensor};
use lcm_lookahead::Result;
use lcm_lookahead::ops::{self, Activation, Addends};

use crate::{compare, error, gpu, random, run};

#[test]
fn convolution_equals_the_cpu() -> Result<()> {
    for (size, input, output, kernel, stride) in [
        (8, 64, 64, 3, 1),
        (9, 16, 24, 3, 1),
        (16, 64, 128, 3, 2),
        (12, 4, 32, 3, 1),
        (8, 32, 4, 3, 1),
        (12, 64, 3, 3, 1),
        (9, 16, 21, 3, 2),
        (16, 128, 4, 1, 1),
        (8, 64, 32, 1, 1),
        (8, 272, 272, 3, 1),
        (8, 16, 272, 3, 1),
        (9, 272, 24, 3, 2),
        (24, 160, 160, 3, 1),
        (16, 320, 256, 3, 1),
        (14, 64, 328, 5, 1),
        (16, 32, 40, 5, 2),
        (8, 272, 272, 1, 1),
    ] {
        let shape = [2, size, size + 4, input];
        let weight = random("w", &[output, kernel, kernel, input]);
        let inputs = [random("x", &shape), weight, random("b", &[output])];
        compare(&format!("conv2d {size} {input} {output} {kernel} {stride}"), &inputs, |t| {
            ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, kernel / 2)
        })?;
    }
    Ok(())
}

#[test]
fn convolution_between_a_few_channels_and_many_equals_the_cpu() -> Result<()> {
    for (height, width, input, output, padding) in [
        (33, 20, 3, 128, 1),
        (130, 150, 3, 72, 1), // more tiles than blocks
        (16, 16, 128, 3, 1),
        (20, 35, 320, 4, 1),
        (9, 40, 4, 72, 0),
        (18, 17, 40, 1, 2),
        (5, 3, 72, 2, 1),
    ] {
        let weight = random("w", &[output, 3, 3, input]);
        let inputs = [random("x", &[2, height, width, input]), weight, random("b", &[output])];
        compare(&format!("narrow conv2d {height} {width} {input} {output} {padding}"), &inputs, |t| {
            ops::conv2d(&t[0], &t[1], Some(&t[2]), 1, padding)
        })?;
    }
    Ok(())
}

#[test]
fn convolution_padded_at_the_end_equals_the_cpu() -> Result<()> {
    for (size, input, output) in [(16, 64, 64), (8, 16, 24), (10, 4, 4)] {
        let inputs =
            [random("x", &[2, size, size + 2, input]), random("w", &[output, 3, 3, input]), random("b", &[output])];
        compare(&format!("conv2d padded at the end {size} {input} {output}"), &inputs, |t| {
            ops::conv2d_padded(&t[0], &t[1], &Addends::bias(Some(&t[2])), 2, [0, 1])
        })?;
    }
    Ok(())
}

#[test]
fn blocks_of_rectified_convolutions_equal_the_cpu_and_single_operations() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (size, channels) in [(40, 64), (9, 24), (6, 12)] {
        let weight = |factor: f64| random("w", &[channels, 3, 3, channels]).affine(0.1 * factor, 0.0);
        let (weights, bias) = ([weight(1.0)?, weight(-1.0)?, weight(0.5)?], random("b", &[channels]));
        let x = random("x", &[2, size, size + 3, channels]);
        let single = |t: &[Tensor], w: &[Tensor; 3], b: &Tensor| {
            let relu = |y: &Tensor| ops::activation(y, Activation::Relu);
            let y = relu(&ops::conv2d(&t[0], &w[0], Some(b), 1, 1)?)?;
            let y = relu(&ops::conv2d(&y, &w[1], Some(b), 1, 1)?)?;
            let addends = Addends { bias: Some(b), residual: Some(&t[0]), ..Addends::default() };
            relu(&ops::conv2d_with(&y, &w[2], &addends, 1, 1)?)
        };
        // Where a rectifier bends depends on rounding: in bf16 the reference is what single operations make of the same
        // numbers on the same GPU; in f32 it is the CPU in f64.
        for (dtype, limit) in [(DType::F32, 2e-5), (DType::BF16, 1e-2)] {
            let rounded = |t: &Tensor| t.to_dtype(dtype)?.to_dtype(DType::F64);
            let here = |t: &Tensor| t.to_dtype(dtype)?.to_device(&device);
            let (w, b) = ([here(&weights[0])?, here(&weights[1])?, here(&weights[2])?], here(&bias)?);
            let block = run(&[here(&x)?], &|t| ops::rectified_block(&t[0], [(&w[0], &b), (&w[1], &b), (&w[2], &b)]))?;
            let expected = match dtype {
                DType::BF16 => run(&[here(&x)?], &|t| single(t, &w, &b))?,
                _ => {
                    let w = [rounded(&weights[0])?, rounded(&weights[1])?, rounded(&weights[2])?];
                    let b = rounded(&bias)?;
                    run(&[rounded(&x)?], &|t| single(t, &w, &b))?
                }
            };
            for (what, (found, expected)) in ["value", "gradient"].iter().zip(block.iter().zip(&expected)) {
                let error = error(found, expected);
                println!("rectified block {size} {channels} {dtype:?} {what}: {error:.2e}");
                assert!(
                    error < limit,
                    "rectified block {size} {channels} {dtype:?}, {what}: {error:.2e}, limit {limit:.0e}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn convolution_of_64_and_128_channels_equals_the_cpu() -> Result<()> {
    for (size, input, output) in [(64, 64, 64), (40, 128, 128), (37, 64, 120), (33, 72, 56)] {
        let inputs =
            [random("x", &[3, size, size, input]), random("w", &[output, 3, 3, input]), random("b", &[output])];
        compare(&format!("conv2d {size} {input} {output}"), &inputs, |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), 1, 1))?;
    }
    Ok(())
}

#[test]
fn convolution_with_a_residual_equals_the_cpu() -> Result<()> {
    for (size, input, output) in [(40, 64, 128), (37, 64, 120), (17, 64, 256), (33, 72, 56), (9, 64, 64)] {
        let residual = random("residual", &[3, size, size + 5, output]);
        let weight = random("w", &[output, 3, 3, input]);
        let inputs = [random("x", &[3, size, size + 5, input]), weight, random("b", &[output]), residual];
        compare(&format!("conv2d with a residual {size} {input} {output}"), &inputs, |t| {
            let addends = Addends { bias: Some(&t[2]), residual: Some(&t[3]), ..Addends::default() };
            ops::conv2d_with(&t[0], &t[1], &addends, 1, 1)
        })?;
    }
    Ok(())
}

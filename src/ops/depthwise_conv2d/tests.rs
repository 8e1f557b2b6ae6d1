use candle_core::{DType, Device, Tensor};

use super::depthwise_conv2d;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

/// `count` slices of a dimension: `first`, `first + stride`, ...
fn strided(x: &Tensor, dim: usize, first: usize, stride: usize, count: usize) -> Result<Tensor> {
    let indices: Vec<u32> = (0..count).map(|i| (first + i * stride) as u32).collect();
    Ok(x.index_select(&Tensor::from_vec(indices, count, x.device())?, dim)?)
}

/// The same of candle's operations: a sum of shifted images times a weight each.
fn composed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Tensor> {
    let (kernel_height, kernel_width, channels) = weight.dims3()?;
    let x = x.pad_with_zeros(1, padding, padding)?.pad_with_zeros(2, padding, padding)?;
    let (batch, height, width, _) = x.dims4()?;
    let (out_height, out_width) = ((height - kernel_height) / stride + 1, (width - kernel_width) / stride + 1);
    let mut y = match bias {
        Some(bias) => bias.broadcast_as((batch, out_height, out_width, channels))?,
        None => Tensor::zeros((batch, out_height, out_width, channels), x.dtype(), x.device())?,
    };
    for dy in 0..kernel_height {
        let rows = strided(&x, 1, dy, stride, out_height)?;
        for dx in 0..kernel_width {
            let shifted = strided(&rows, 2, dx, stride, out_width)?;
            y = (y + shifted.broadcast_mul(&weight.get(dy)?.get(dx)?)?)?;
        }
    }
    Ok(y)
}

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(5, purpose).normal(shape, DType::F64, &Device::Cpu)
}

/// Shape, kernel, stride and padding.
const CASES: [([usize; 4], [usize; 2], usize, usize); 4] = [
    ([2, 4, 5, 3], [3, 3], 1, 1),
    ([1, 7, 6, 2], [3, 3], 2, 1),
    ([2, 3, 3, 4], [3, 3], 1, 0),
    ([1, 4, 6, 1], [1, 4], 3, 2),
];

#[test]
fn values_equal_candles_grouped_convolution() -> Result<()> {
    for (shape, [kernel_height, kernel_width], stride, padding) in CASES {
        let x = random("x", &shape)?;
        let (w, b) = (random("w", &[kernel_height, kernel_width, shape[3]])?, random("b", &shape[3..])?);
        let ours = depthwise_conv2d(&x, &w, Some(&b), stride, padding)?;
        let (nchw, grouped) = (x.permute((0, 3, 1, 2))?, w.permute((2, 0, 1))?.unsqueeze(1)?);
        let theirs = nchw.contiguous()?.conv2d(&grouped.contiguous()?, padding, stride, 1, shape[3])?;
        let theirs = theirs.permute((0, 2, 3, 1))?.broadcast_add(&b)?;
        for other in [theirs, composed(&x, &w, Some(&b), stride, padding)?] {
            assert!((&ours - other)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-12, "{shape:?}");
        }
    }
    Ok(())
}

#[test]
fn gradients_of_all_arguments_match_finite_differences() -> Result<()> {
    for (shape, [kernel_height, kernel_width], stride, padding) in CASES {
        let weight = random("w", &[kernel_height, kernel_width, shape[3]])?;
        let inputs = [random("x", &shape)?, weight, random("b", &shape[3..])?];
        for conv in [depthwise_conv2d, composed] {
            let check = check_gradients(&inputs, |t| Ok(vec![conv(&t[0], &t[1], Some(&t[2]), stride, padding)?]))?;
            assert!(check.worst() < 1e-7 && check.norms.iter().all(|norm| *norm > 0.01), "{shape:?}: {check:?}");
        }
    }
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let (x, w) = (random("x", &[1, 3, 3, 2])?, random("w", &[3, 3, 2])?);
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    assert!(message(depthwise_conv2d(&x, &random("w", &[3, 3, 1])?, None, 1, 1)).contains("`x`"));
    assert!(message(depthwise_conv2d(&x, &random("w", &[3, 3, 2, 1])?, None, 1, 1)).contains("`weight`"));
    assert!(message(depthwise_conv2d(&x, &w, Some(&random("b", &[3])?), 1, 1)).contains("`bias`"));
    assert!(message(depthwise_conv2d(&x, &w, None, 0, 1)).contains("`stride`"));
    assert!(message(depthwise_conv2d(&x, &random("w", &[4, 3, 2])?, None, 1, 0)).contains("4 x 3"));
    Ok(())
}

use candle_core::{DType, Device, Tensor};

use super::max_pool2d;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

/// `count` slices of a dimension: `first`, `first + stride`, ...
fn strided(x: &Tensor, dim: usize, first: usize, stride: usize, count: usize) -> Result<Tensor> {
    let indices: Vec<u32> = (0..count).map(|i| (first + i * stride) as u32).collect();
    Ok(x.index_select(&Tensor::from_vec(indices, count, x.device())?, dim)?)
}

/// The same of candle's operations: the maximum of the shifted images.
fn composed(x: &Tensor, kernel: usize, stride: usize) -> Result<Tensor> {
    let (_, height, width, _) = x.dims4()?;
    let (out_height, out_width) = ((height - kernel) / stride + 1, (width - kernel) / stride + 1);
    let mut largest: Option<Tensor> = None;
    for (dy, dx) in (0..kernel).flat_map(|dy| (0..kernel).map(move |dx| (dy, dx))) {
        let shifted = strided(&strided(x, 1, dy, stride, out_height)?, 2, dx, stride, out_width)?;
        largest = Some(match largest {
            Some(largest) => largest.maximum(&shifted)?,
            None => shifted,
        });
    }
    Ok(largest.unwrap())
}

fn random(shape: [usize; 4]) -> Result<Tensor> {
    Address::new(5, "x").normal(&shape, DType::F64, &Device::Cpu)
}

/// Shape, kernel and stride: VGG's, AlexNet's, the shortcut of IR networks, and an image that is not used up.
const CASES: [([usize; 4], usize, usize); 4] =
    [([2, 6, 4, 3], 2, 2), ([1, 7, 9, 2], 3, 2), ([2, 5, 4, 3], 1, 2), ([1, 5, 8, 1], 2, 3)];

#[test]
fn every_output_is_the_largest_of_its_window() -> Result<()> {
    let x = Tensor::new(&[[1.0, 5.0, 2.0, 0.0], [3.0, 4.0, -1.0, -2.0]], &Device::Cpu)?.reshape((1, 2, 4, 1))?;
    assert_eq!(max_pool2d(&x, 2, 2)?.flatten_all()?.to_vec1::<f64>()?, [5.0, 2.0]);
    assert_eq!(max_pool2d(&x, 2, 1)?.flatten_all()?.to_vec1::<f64>()?, [5.0, 5.0, 2.0]);
    for (shape, kernel, stride) in CASES {
        let x = random(shape)?;
        let (ours, other) = (max_pool2d(&x, kernel, stride)?, composed(&x, kernel, stride)?);
        assert_eq!(ours.dims(), other.dims());
        assert_eq!(ours.flatten_all()?.to_vec1::<f64>()?, other.flatten_all()?.to_vec1::<f64>()?);
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for (shape, kernel, stride) in CASES {
        for pool in [max_pool2d, composed] {
            let check = check_gradients(&[random(shape)?], |t| Ok(vec![pool(&t[0], kernel, stride)?]))?;
            assert!(check.worst() < 1e-7 && check.norms[0] > 0.1, "{shape:?}: {check:?}");
        }
    }
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let x = random([1, 3, 3, 1])?;
    for (kernel, stride) in [(0, 1), (4, 1), (2, 0)] {
        assert!(max_pool2d(&x, kernel, stride).unwrap_err().to_string().contains("`kernel`"));
    }
    assert!(max_pool2d(&x.squeeze(0)?, 1, 1).unwrap_err().to_string().contains("`x`"));
    Ok(())
}

use candle_core::{DType, Device, Tensor, Var};

use super::conv2d;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(5, purpose).normal(shape, DType::F64, &Device::Cpu)
}

fn largest(difference: Tensor) -> Result<f64> {
    Ok(difference.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

/// `(x, weight, stride, padding)` of convolutions that differ in kind.
const CASES: [([usize; 4], [usize; 4], usize, usize); 9] = [
    ([2, 5, 7, 3], [4, 3, 3, 3], 1, 1),
    ([1, 6, 5, 2], [3, 3, 3, 2], 2, 1),
    ([2, 1, 1, 3], [2, 3, 3, 3], 1, 1),
    ([1, 7, 6, 2], [2, 1, 1, 2], 2, 0),
    ([2, 3, 4, 3], [5, 1, 1, 3], 1, 0),
    ([1, 8, 4, 2], [3, 4, 4, 2], 4, 0),
    ([1, 4, 6, 2], [2, 2, 5, 2], 1, 3),
    ([2, 7, 9, 1], [3, 3, 2, 1], 3, 2),
    ([1, 4, 4, 2], [2, 2, 2, 2], 2, 3),
];

#[test]
fn values_equal_the_definition() -> Result<()> {
    for (x_shape, w_shape, stride, padding) in CASES {
        let (x, w, b) = (random("x", &x_shape)?, random("w", &w_shape)?, random("b", &[w_shape[0]])?);
        let y = conv2d(&x, &w, Some(&b), stride, padding)?;
        let (_, out_height, out_width, _) = y.dims4()?;
        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f64>();
        let (xs, ws, bs, ys) = (flat(&x)?, flat(&w)?, flat(&b)?, flat(&y)?);
        let ([batch, height, width, channels], [out, kernel_height, kernel_width, _]) = (x_shape, w_shape);
        assert_eq!((out_height - 1) * stride, (height + 2 * padding - kernel_height) / stride * stride);
        assert_eq!((out_width - 1) * stride, (width + 2 * padding - kernel_width) / stride * stride);
        let mut expected = Vec::new();
        for n in 0..batch {
            for (oy, ox) in (0..out_height).flat_map(|y| (0..out_width).map(move |x| (y, x))) {
                for o in 0..out {
                    let mut sum = bs[o];
                    for (ky, kx) in (0..kernel_height).flat_map(|y| (0..kernel_width).map(move |x| (y, x))) {
                        let (iy, ix) =
                            ((oy * stride + ky).wrapping_sub(padding), (ox * stride + kx).wrapping_sub(padding));
                        if iy < height && ix < width {
                            for c in 0..channels {
                                sum += xs[((n * height + iy) * width + ix) * channels + c]
                                    * ws[((o * kernel_height + ky) * kernel_width + kx) * channels + c];
                            }
                        }
                    }
                    expected.push(sum);
                }
            }
        }
        assert_eq!(expected.len(), ys.len());
        let worst = expected.iter().zip(&ys).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-11, "{x_shape:?} {w_shape:?}: {worst}");
    }
    Ok(())
}

#[test]
fn gradients_of_all_arguments_match_finite_differences() -> Result<()> {
    for (x, w, stride, padding) in CASES {
        let inputs = [random("x", &x)?, random("w", &w)?, random("b", &[w[0]])?];
        let check = check_gradients(&inputs, |t| Ok(vec![conv2d(&t[0], &t[1], Some(&t[2]), stride, padding)?]))?;
        assert!(check.worst() < 1e-7, "{x:?} {w:?} {stride} {padding}: {check:?}");
        assert!(check.norms.iter().all(|norm| *norm > 0.1), "{check:?}");
    }
    Ok(())
}

#[test]
fn values_and_gradients_over_many_chunks_equal_candles_own() -> Result<()> {
    for (size, channels, out, stride) in [(33, 40, 24, 1), (34, 16, 8, 2)] {
        let x = Var::from_tensor(&random("x", &[3, size, size, channels])?.to_dtype(DType::F32)?)?;
        let w = Var::from_tensor(&random("w", &[out, 3, 3, channels])?.to_dtype(DType::F32)?)?;
        let ours = conv2d(&x, &w, None, stride, 1)?;
        let nchw = x.permute((0, 3, 1, 2))?.contiguous()?;
        let oihw = w.permute((0, 3, 1, 2))?.contiguous()?;
        let theirs = nchw.conv2d(&oihw, 1, stride, 1, 1)?.permute((0, 2, 3, 1))?.contiguous()?;
        assert!(largest((&ours - &theirs)?)? < 2e-4);
        let weighting = random("g", ours.dims())?.to_dtype(DType::F32)?;
        let ours = (ours * &weighting)?.sum_all()?.backward()?;
        let theirs = (theirs * &weighting)?.sum_all()?.backward()?;
        for variable in [&x, &w] {
            let (ours, theirs) = (ours.get(variable).unwrap(), theirs.get(variable).unwrap());
            assert!(largest((ours - theirs)?)? < 1e-5 * largest(theirs.clone())? + 2e-4);
        }
    }
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
            let (x, w) = (variable("x", &[2, 31, 29, 16])?, variable("w", &[24, 3, 3, 16])?);
            let b = variable("b", &[24])?;
            let y = conv2d(&x, &w, Some(&b), 1, 1)?;
            let gradients = y.sqr()?.sum_all()?.backward()?;
            [y.clone()]
                .iter()
                .chain([&x, &w, &b].map(|v| gradients.get(v).unwrap()))
                .map(|t| Ok(t.flatten_all()?.to_vec1::<f32>()?))
                .collect()
        })
    };
    assert!(run(1)? == run(3)?);
    Ok(())
}

#[test]
fn a_frozen_weight_gets_no_gradient() -> Result<()> {
    let (w, b) = (random("w", &[2, 3, 3, 4])?, random("b", &[2])?);
    let x = Var::from_tensor(&random("x", &[1, 3, 3, 4])?)?;
    let gradients = conv2d(&x, &w, Some(&b), 1, 1)?.sum_all()?.backward()?;
    assert!(gradients.get(&x).is_some());
    assert!(gradients.get(&w).is_none() && gradients.get(&b).is_none());
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let (x, w, b) = (random("x", &[1, 3, 3, 4])?, random("w", &[2, 3, 3, 4])?, random("b", &[2])?);
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let channels = message(conv2d(&random("x", &[1, 3, 3, 5])?, &w, None, 1, 1));
    assert!(channels.contains("`x`") && channels.contains("[1, 3, 3, 5]"), "{channels}");
    assert!(message(conv2d(&x, &random("w", &[2, 36])?, None, 1, 1)).contains("`weight`"));
    assert!(message(conv2d(&x, &w, Some(&random("b", &[3])?), 1, 1)).contains("(2,)"));
    assert!(message(conv2d(&x, &w, Some(&b), 0, 1)).contains("`stride`"));
    assert!(message(conv2d(&x, &random("w", &[2, 5, 3, 4])?, None, 1, 0)).contains("5 x 3"));
    assert!(message(conv2d(&x, &w.to_dtype(DType::F32)?, None, 1, 1)).contains("`weight`"));
    let empty = Tensor::zeros((0, 3, 3, 4), DType::F64, &Device::Cpu)?;
    assert!(message(conv2d(&empty, &w, None, 1, 1)).contains("`x`"));
    let half = message(conv2d(&x.to_dtype(DType::F16)?, &w.to_dtype(DType::F16)?, None, 1, 1));
    assert!(half.contains("f32 or f64"), "{half}");
    Ok(())
}

use candle_core::{DType, Device, Tensor};

use super::upsample_nearest_2x;
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

fn random(shape: &[usize]) -> Result<Tensor> {
    Address::new(5, "x").normal(shape, DType::F64, &Device::Cpu)
}

#[test]
fn values_equal_candles_own() -> Result<()> {
    for shape in [[2, 3, 5, 4], [1, 1, 1, 1], [3, 1, 7, 2]] {
        for dtype in [DType::F32, DType::F64] {
            let x = random(&shape)?.to_dtype(dtype)?;
            let nchw = x.permute((0, 3, 1, 2))?.contiguous()?;
            let expected = nchw.upsample_nearest2d(2 * shape[1], 2 * shape[2])?.permute((0, 2, 3, 1))?;
            let difference = (upsample_nearest_2x(&x)? - expected)?.abs()?.max_all()?.to_dtype(DType::F64)?;
            assert_eq!(difference.to_scalar::<f64>()?, 0.0);
        }
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for shape in [[2, 3, 5, 4], [1, 1, 1, 1], [3, 1, 7, 2]] {
        let check = check_gradients(&[random(&shape)?], |t| Ok(vec![upsample_nearest_2x(&t[0])?]))?;
        assert!(check.worst() < 1e-7, "{check:?}");
    }
    Ok(())
}

#[test]
fn a_wrong_rank_is_named() -> Result<()> {
    let error = upsample_nearest_2x(&random(&[3, 4, 2])?).unwrap_err().to_string();
    assert!(error.contains("`x`") && error.contains("[3, 4, 2]"), "{error}");
    Ok(())
}

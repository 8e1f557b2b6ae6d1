use candle_core::{DType, Device, Tensor};

use super::{TokenSelection, select_tokens};
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

fn random(shape: &[usize]) -> Result<Tensor> {
    Address::new(5, "x").normal(shape, DType::F64, &Device::Cpu)
}

fn selection(kept: &[u32], tokens: usize) -> Result<TokenSelection> {
    TokenSelection::new(kept.to_vec(), tokens, &Device::Cpu)
}

#[test]
fn values_equal_candles_index_select() -> Result<()> {
    for (shape, kept) in [([3, 7, 4], &[0, 2, 3, 6][..]), ([1, 5, 1], &[4]), ([2, 4, 3], &[3, 1, 2, 0])] {
        for dtype in [DType::F32, DType::F64] {
            let x = random(&shape)?.to_dtype(dtype)?;
            let expected = x.index_select(&Tensor::new(kept, &Device::Cpu)?, 1)?;
            let found = select_tokens(&x, &selection(kept, shape[1])?)?;
            assert_eq!(found.dims(), expected.dims());
            assert_eq!((found - expected)?.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?, 0.0);
        }
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for (shape, kept) in [([3, 7, 4], &[2, 0, 3, 6][..]), ([1, 5, 1], &[4])] {
        let selection = selection(kept, shape[1])?;
        let check = check_gradients(&[random(&shape)?], |t| Ok(vec![select_tokens(&t[0], &selection)?]))?;
        assert!(check.worst() < 1e-7, "{check:?}");
    }
    Ok(())
}

#[test]
fn indices_that_do_not_fit_are_refused() -> Result<()> {
    for (kept, tokens) in [(vec![], 3), (vec![0, 3], 3), (vec![1, 1], 3)] {
        let error = TokenSelection::new(kept, tokens, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("`kept`") && error.contains("below 3"), "{error}");
    }
    let error = select_tokens(&random(&[2, 4, 3])?, &selection(&[0], 3)?).unwrap_err().to_string();
    assert!(error.contains("`x`") && error.contains("[2, 4, 3]"), "{error}");
    Ok(())
}

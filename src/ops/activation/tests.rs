use candle_core::{DType, Device, Tensor};

use super::{Activation, activation};
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

const ALL: [Activation; 5] =
    [Activation::None, Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::Relu];

#[test]
fn values_equal_candles() -> Result<()> {
    let x = (Address::new(2, "x").normal((3, 50), DType::F64, &Device::Cpu)? * 3.0)?;
    for kind in ALL {
        let expected = match kind {
            Activation::None => x.clone(),
            Activation::Silu => x.silu()?,
            Activation::Gelu => x.gelu_erf()?,
            Activation::QuickGelu => (&x * (((&x * -1.702)?.exp()? + 1.0)?.recip()?))?,
            Activation::Relu => x.relu()?,
        };
        let difference = (activation(&x, kind)? - expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(difference < 1e-13, "{kind:?}: {difference}");
    }
    Ok(())
}

#[test]
fn single_precision_agrees_with_double() -> Result<()> {
    let x = (Address::new(3, "x").normal(5000, DType::F32, &Device::Cpu)? * 3.0)?;
    for kind in ALL {
        let single = activation(&x, kind)?.to_dtype(DType::F64)?;
        let double = activation(&x.to_dtype(DType::F64)?, kind)?;
        let difference = (single - double)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(difference < 2e-6, "{kind:?}: {difference}");
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let x = Address::new(4, "x").normal((4, 7), DType::F64, &Device::Cpu)?;
    for kind in ALL {
        let check = check_gradients(std::slice::from_ref(&x), |t| Ok(vec![activation(&t[0], kind)?]))?;
        assert!(check.worst() < 1e-8, "{kind:?}: {check:?}");
        assert!(check.norms[0] > 0.1, "{kind:?}: {check:?}");
    }
    Ok(())
}

#[test]
fn large_arguments_stay_finite_in_both_directions() -> Result<()> {
    for kind in ALL {
        for (x, limit) in [(-1e4f32, 0f32), (1e4, 1e4)] {
            let expected = if kind == Activation::None { x } else { limit };
            let slope = if kind == Activation::None || x > 0.0 { 1.0 } else { 0.0 };
            assert_eq!(kind.value(x), expected, "{kind:?}");
            assert_eq!(kind.derivative(x), slope, "{kind:?}");
        }
    }
    Ok(())
}

#[test]
fn an_unsupported_dtype_is_an_error() -> Result<()> {
    let x = Tensor::zeros(3, DType::U8, &Device::Cpu)?;
    let error = activation(&x, Activation::Silu).unwrap_err().to_string();
    assert!(error.contains("f32 or f64"), "{error}");
    Ok(())
}

//! Functions composed of candle's operations, with gradients of their own: what frozen networks need besides large
//! operations, and a [`tape`](crate::autograd::tape) can note.

use candle_core::{D, Tensor};

use crate::Result;
use crate::autograd::{Backward, Forward, Function, Output, Value, apply};
use crate::ops;

/// `x * factor + term`, for `x` of any shape.
///
/// # Errors
/// [`Error::Candle`](crate::Error::Candle) for a dtype that cannot be multiplied.
pub(crate) fn affine(x: &Tensor, factor: f64, term: f64) -> Result<Tensor> {
    apply(Affine { factor, term }, &[x])
}

struct Affine {
    factor: f64,
    term: f64,
}

impl Function for Affine {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        Ok(Output::Tensor(inputs[0].affine(self.factor, self.term)?).into())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(context.gradient()?.affine(self.factor, 0.0)?)])
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

/// Vectors of unit length: `x` `(..., dimension)` divided by its norm, in f32 for bf16 and f16. The zero vector stays
/// zero.
///
/// # Errors
/// [`Error::Candle`](crate::Error::Candle) where `x` has no dimension.
pub(crate) fn unit_vectors(x: &Tensor) -> Result<Tensor> {
    apply(UnitVectors, &[&ops::widen(x)?])
}

struct UnitVectors;

impl Function for UnitVectors {
    fn name(&self) -> &'static str {
        "unit_vectors"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let x = &inputs[0];
        // Small enough not to be seen in f32 beside any norm that means something.
        let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
        Ok(Forward { outputs: vec![Output::Tensor(x.broadcast_div(&norm)?)], saved: vec![norm] })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (gradient, norm) = (context.gradient()?, &context.saved[0]);
        let Some(y) = &context.outputs[0] else { return Ok(vec![None]) };
        // What would make a vector longer changes nothing.
        let along = (gradient * y)?.sum_keepdim(D::Minus1)?;
        Ok(vec![Some((gradient - y.broadcast_mul(&along)?)?.broadcast_div(norm)?)])
    }

    fn uses(&self, value: Value, _: &[bool]) -> bool {
        value == Value::Output(0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::autograd::check_gradients;
    use crate::random::Address;

    fn random(shape: &[usize]) -> Result<Tensor> {
        Address::new(12, "composed").normal(shape, DType::F64, &Device::Cpu)
    }

    #[test]
    fn a_unit_vector_has_length_one_and_the_zero_vector_stays() -> Result<()> {
        let x = Tensor::cat(&[(random(&[2, 5])? * 7.0)?, random(&[1, 5])?.zeros_like()?], 0)?;
        let squares = unit_vectors(&x)?.sqr()?.sum(1)?.to_vec1::<f64>()?;
        assert!((squares[0] - 1.0).abs() < 1e-10 && (squares[1] - 1.0).abs() < 1e-10 && squares[2] == 0.0);
        Ok(())
    }

    #[test]
    fn gradients_match_finite_differences() -> Result<()> {
        let check = check_gradients(&[random(&[3, 5])?], |x| Ok(vec![unit_vectors(&x[0])?]))?;
        assert!(check.worst() < 1e-7 && check.norms[0] > 0.1, "{check:?}");
        let check = check_gradients(&[random(&[3, 5])?], |x| Ok(vec![affine(&x[0], -0.7, 2.0)?]))?;
        assert!(check.worst() < 1e-8 && check.norms[0] > 0.1, "{check:?}");
        Ok(())
    }
}

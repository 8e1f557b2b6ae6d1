//! [`linear_geglu`](super::linear_geglu) on a GPU: in one kernel where the projection is not wanted again.

use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Backward, Forward, Function, Saves, Value};
use crate::cuda::{Buffer, HopperLinear, cuda_device, dtype_code, pointer, sum_rows};
use crate::ops::geglu::cuda as geglu;
use crate::ops::linear::cuda::{matrix, product};

const NAME: &str = "linear_geglu";

/// Its inputs are `x`, `weight` and, where there is one, the bias.
pub(super) struct LinearGeglu;

/// `x W^T + bias`.
fn projection(inputs: &[Tensor]) -> Result<Tensor> {
    let (x, weight) = (&inputs[0], &inputs[1]);
    let (out, inner) = weight.dims2()?;
    let rows = x.elem_count() / inner.max(1);
    let shape = [&x.dims()[..x.rank() - 1], &[out]].concat();
    let left = (x, matrix(x, rows, inner)?);
    Ok(product(left, matrix(weight, out, inner)?.t(), (inputs.get(2), None), &shape)?.into_tensor())
}

impl Function for LinearGeglu {
    fn name(&self) -> &'static str {
        NAME
    }

    /// Saves the projection.
    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let projection = projection(inputs)?;
        Ok(Forward { outputs: vec![geglu::value(&projection)?.into_output()], saved: vec![projection] })
    }

    fn forward_alone(&self, inputs: &[Tensor]) -> Result<Forward> {
        match fused(&inputs[0], &inputs[1], inputs.get(2))? {
            Some(y) => Ok(y.into_output().into()),
            None => Ok(geglu::value(&projection(inputs)?)?.into_output().into()),
        }
    }

    fn saves(&self) -> Saves {
        Saves::Alone(vec![0, 1, 2])
    }

    fn save(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![projection(inputs)?])
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (x, weight) = (&context.inputs[0], &context.inputs[1]);
        let (out, inner) = weight.dims2()?;
        let rows = x.elem_count() / inner.max(1);
        let gradient = geglu::gradient(&context.saved[0], context.gradient()?)?;
        let g = matrix(&gradient, rows, out)?;
        let mut gradients = vec![None; context.inputs.len()];
        if context.needs[0] {
            let dx = product((&gradient, g), matrix(weight, out, inner)?, (None, None), x.dims())?;
            gradients[0] = Some(dx.into_tensor());
        }
        if context.needs[1] {
            let dw = product((&gradient, g.t()), matrix(x, rows, inner)?, (None, None), weight.dims())?;
            gradients[1] = Some(dw.into_tensor());
        }
        if context.needs.get(2) == Some(&true) {
            gradients[2] = Some(sum_rows(&gradient)?);
        }
        Ok(gradients)
    }

    fn uses(&self, value: Value, needs: &[bool]) -> bool {
        // Each factor for the other's gradient.
        match value {
            Value::Input(0) => needs[1],
            Value::Input(1) => needs[0],
            _ => false,
        }
    }
}

/// The result, or `None` where no kernel takes these shapes on this GPU. The tensors are contiguous, their shapes fit.
fn fused(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Buffer>> {
    let (out, inner) = weight.dims2()?;
    let (rows, columns) = (x.elem_count() / inner.max(1), out / 2);
    let (Ok(rows @ 1..), Ok(inner), Ok(columns)) = (i32::try_from(rows), i32::try_from(inner), i32::try_from(columns))
    else {
        return Ok(None);
    };
    let device = cuda_device(NAME, x)?;
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(out / 2);
    let y = Buffer::new(&device, shape, x.dtype())?;
    let arguments = HopperLinear {
        x: pointer(NAME, x)?,
        weight: pointer(NAME, weight)?,
        bias: bias.map_or(Ok(std::ptr::null()), |bias| pointer(NAME, bias).map(|p| p.cast_const()))?,
        residual: std::ptr::null(),
        y: y.pointer(),
        rows,
        inner,
        columns,
        dtype: dtype_code(NAME, x.dtype())?,
        gated: 1,
    };
    Ok(arguments.launch(NAME, &device)?.then_some(y))
}

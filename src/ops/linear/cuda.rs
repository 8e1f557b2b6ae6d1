//! The linear map on a GPU: matrix products of cuBLASLt, with the bias added as they are written.

use candle_core::Tensor;

use super::Linear;
use crate::Result;
use crate::autograd::{Backward, Forward};
use crate::cuda::{Buffer, Gemm, Operand, add_channels, cuda_device, gemm, pointer, sum_rows};

/// A plain product of two operands into fresh memory of a shape.
pub(crate) fn product(
    left: (&Tensor, Operand),
    right: Operand,
    (bias, residual): (Option<&Tensor>, Option<&Tensor>),
    shape: &[usize],
) -> Result<Buffer> {
    let (tensor, left) = left;
    let device = cuda_device("linear", tensor)?;
    let out = Buffer::new(&device, shape, tensor.dtype())?;
    let at =
        |tensor: Option<&Tensor>| tensor.map(|tensor| pointer("linear", tensor).map(|p| p.cast_const())).transpose();
    gemm(
        &device,
        &Gemm {
            dtype: tensor.dtype(),
            left,
            right,
            scale: 1.0,
            addend: at(residual)?,
            bias: at(bias)?,
            out: out.pointer(),
            out_dtype: tensor.dtype(),
            batch: (1, [0; 3]),
        },
    )?;
    Ok(out)
}

/// Several linear maps of one input in one launch: `weight` holds `parts` weights of one shape one after the other.
/// Returns `(parts, ..., out)`. Nothing of it is differentiable.
pub(crate) fn products(x: &Tensor, weight: &Tensor, parts: usize) -> Result<Tensor> {
    let device = cuda_device("linear", x)?;
    let x = x.detach().contiguous()?;
    let (out, inner) = weight.dims2()?;
    let (out, rows) = (out / parts.max(1), x.elem_count() / inner.max(1));
    let mut shape = vec![parts];
    shape.extend_from_slice(&x.dims()[..x.rank() - 1]);
    shape.push(out);
    let y = Buffer::new(&device, shape, x.dtype())?;
    gemm(
        &device,
        &Gemm {
            dtype: x.dtype(),
            left: matrix(&x, rows, inner)?,
            right: matrix(weight, out, inner)?.t(),
            scale: 1.0,
            addend: None,
            bias: None,
            out: y.pointer(),
            out_dtype: x.dtype(),
            batch: (parts, [0, out * inner, rows * out]),
        },
    )?;
    Ok(y.into_tensor())
}

pub(crate) fn matrix(tensor: &Tensor, rows: usize, columns: usize) -> Result<Operand> {
    Ok(Operand::new(pointer("linear", tensor)?, rows, columns))
}

pub(super) fn forward(linear: &Linear, inputs: &[Tensor]) -> Result<Forward> {
    let (x, weight) = (&inputs[0], &inputs[1]);
    let at = |place: Option<usize>| place.map(|place| &inputs[place]);
    let (out, inner) = weight.dims2()?;
    let rows = x.elem_count() / inner.max(1);
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(out);
    let addends = (at(linear.places.bias), at(linear.places.residual));
    let y = product((x, matrix(x, rows, inner)?), matrix(weight, out, inner)?.t(), addends, &shape)?;
    match at(linear.places.per_sample) {
        None => Ok(y.into_output().into()),
        Some(vectors) => Ok(add_channels(y, vectors)?.into_output().into()),
    }
}

pub(super) fn backward(linear: &Linear, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (&context.inputs[0], &context.inputs[1]);
    let (out, inner) = weight.dims2()?;
    let rows = x.elem_count() / inner.max(1);
    let gradient = context.gradient()?;
    let g = matrix(gradient, rows, out)?;
    let mut gradients = vec![None; context.inputs.len()];
    if context.needs[0] {
        let so_far = context.take_so_far(0);
        let dx = product((gradient, g), matrix(weight, out, inner)?, (None, so_far.as_ref()), x.dims())?;
        gradients[0] = Some(dx.into_tensor());
    }
    if context.needs[1] {
        let dw = product((gradient, g.t()), matrix(x, rows, inner)?, (None, None), weight.dims())?;
        gradients[1] = Some(dw.into_tensor());
    }
    if let Some(bias) = linear.places.bias.filter(|place| context.needs[*place]) {
        gradients[bias] = Some(sum_rows(gradient)?);
    }
    linear.places.gradients(context, &mut gradients)?;
    Ok(gradients)
}

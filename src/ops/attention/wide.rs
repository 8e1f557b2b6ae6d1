//! Attention on a GPU over heads that are too wide for one kernel (the 512 numbers of an autoencoder's): matrix products
//! and a softmax between them, for a block of queries at a time, so that the scores of all pixels of a large picture
//! never lie in memory together.

use std::ffi::c_void;

use candle_core::{CudaDevice, DType, Tensor};

use super::{Attention, Mask};
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::cuda::{Buffer, Gemm, Operand, check, cuda_device, dtype_code, gemm, pointer, stream};

// `wide.h`.
unsafe extern "C" {
    fn lcm_attention_softmax(
        scores: *const f32,
        weights: *mut c_void,
        lse: *mut f32,
        rows: i64,
        keys: i64,
        first_query: i64,
        causal: i32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_attention_softmax_gradient(
        scores: *const f32,
        lse: *const f32,
        dweights: *const f32,
        weights: *mut c_void,
        slopes: *mut c_void,
        rows: i64,
        keys: i64,
        first_query: i64,
        causal: i32,
        scale: f32,
        dtype: i32,
        stream: *mut c_void,
    ) -> i32;
}

const NAME: &str = "attention";
/// The widest head that the fused kernels take.
pub(super) const FUSED_WIDTH: usize = 256;
/// Scores of one block of queries: 128 MB in f32.
const SCORES: usize = 1 << 25;

/// Whether the heads are too wide for the fused kernels.
pub(super) fn takes(attention: &Attention, q: &Tensor) -> bool {
    q.dims()[q.rank() - 1] / attention.heads > FUSED_WIDTH
}

/// One head of one sample: matrices `(tokens, width)`, dense.
struct Head {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    width: usize,
    scale: f32,
    causal: bool,
}

/// A product `scale * left . right (+ out)` into `out`, stored row by row.
fn product(
    device: &CudaDevice,
    dtype: DType,
    (left, right): (Operand, Operand),
    scale: f32,
    (out, out_dtype, add): (*mut c_void, DType, bool),
) -> Result<()> {
    let addend = add.then_some(out.cast_const());
    gemm(device, &Gemm { dtype, left, right, scale, addend, bias: None, out, out_dtype, batch: (1, [0; 3]) })
}

impl Head {
    fn sizes(&self) -> Result<(usize, usize)> {
        Ok((self.q.dim(0)?, self.k.dim(0)?))
    }

    /// The blocks of queries: first, count.
    fn blocks(&self) -> Result<impl Iterator<Item = (usize, usize)>> {
        let (queries, keys) = self.sizes()?;
        let most = (SCORES / keys.max(1)).clamp(1, queries.max(1));
        Ok((0..queries).step_by(most).map(move |first| (first, most.min(queries - first))))
    }

    /// Some rows of a matrix `(rows, width)`.
    fn rows(&self, matrix: &Tensor, first: usize, count: usize) -> Result<Operand> {
        Ok(Operand::new(pointer(NAME, &matrix.narrow(0, first, count)?)?, count, self.width))
    }

    fn all(&self, matrix: &Tensor) -> Result<Operand> {
        self.rows(matrix, 0, matrix.dim(0)?)
    }

    fn scores(&self, device: &CudaDevice, first: usize, count: usize) -> Result<Buffer> {
        let scores = Buffer::new(device, (count, self.k.dim(0)?), DType::F32)?;
        let pair = (self.rows(&self.q, first, count)?, self.all(&self.k)?.t());
        product(device, self.q.dtype(), pair, self.scale, (scores.pointer(), DType::F32, false))?;
        Ok(scores)
    }

    /// The output `(queries, width)` and the log-sum-exps `(queries,)`.
    fn forward(&self, device: &CudaDevice) -> Result<(Tensor, Tensor)> {
        let (dtype, (queries, keys)) = (self.q.dtype(), self.sizes()?);
        let out = Buffer::new(device, (queries, self.width), dtype)?.into_tensor();
        let lse = Buffer::new(device, queries, DType::F32)?.into_tensor();
        for (first, count) in self.blocks()? {
            let scores = self.scores(device, first, count)?;
            let weights = Buffer::new(device, (count, keys), dtype)?;
            let lse = pointer(NAME, &lse.narrow(0, first, count)?)?;
            // SAFETY: the pointers belong to buffers of the shapes stated, alive on this stream.
            check(NAME, unsafe {
                lcm_attention_softmax(
                    scores.pointer().cast(),
                    weights.pointer(),
                    lse.cast(),
                    count as i64,
                    keys as i64,
                    first as i64,
                    i32::from(self.causal),
                    dtype_code(NAME, dtype)?,
                    stream(device),
                )
            })?;
            let pair = (Operand::new(weights.pointer(), count, keys), self.all(&self.v)?);
            let to = pointer(NAME, &out.narrow(0, first, count)?)?;
            product(device, dtype, pair, 1.0, (to, dtype, false))?;
        }
        Ok((out, lse))
    }

    /// The gradients of `q`, `k` and `v`; those of `k` and `v`, sums over the blocks of queries, in f32.
    fn backward(&self, device: &CudaDevice, lse: &Tensor, dout: &Tensor) -> Result<[Tensor; 3]> {
        let (dtype, (queries, keys)) = (self.q.dtype(), self.sizes()?);
        let dq = Buffer::new(device, (queries, self.width), dtype)?.into_tensor();
        let sum = || Ok::<_, crate::Error>(Buffer::new(device, (keys, self.width), DType::F32)?.into_tensor());
        let (dk, dv) = (sum()?, sum()?);
        for (first, count) in self.blocks()? {
            let scores = self.scores(device, first, count)?;
            let dweights = Buffer::new(device, (count, keys), DType::F32)?;
            let douts = self.rows(dout, first, count)?;
            let pair = (douts, self.all(&self.v)?.t());
            product(device, dtype, pair, 1.0, (dweights.pointer(), DType::F32, false))?;
            let (weights, slopes) =
                (Buffer::new(device, (count, keys), dtype)?, Buffer::new(device, (count, keys), dtype)?);
            let lse = pointer(NAME, &lse.narrow(0, first, count)?)?;
            // SAFETY: as in `forward`.
            check(NAME, unsafe {
                lcm_attention_softmax_gradient(
                    scores.pointer().cast(),
                    lse.cast(),
                    dweights.pointer().cast(),
                    weights.pointer(),
                    slopes.pointer(),
                    count as i64,
                    keys as i64,
                    first as i64,
                    i32::from(self.causal),
                    self.scale,
                    dtype_code(NAME, dtype)?,
                    stream(device),
                )
            })?;
            let matrix = |buffer: &Buffer| Operand::new(buffer.pointer(), count, keys);
            let to = pointer(NAME, &dq.narrow(0, first, count)?)?;
            product(device, dtype, (matrix(&slopes), self.all(&self.k)?), 1.0, (to, dtype, false))?;
            let pair = (matrix(&slopes).t(), self.rows(&self.q, first, count)?);
            product(device, dtype, pair, 1.0, (pointer(NAME, &dk)?, DType::F32, first > 0))?;
            let pair = (matrix(&weights).t(), douts);
            product(device, dtype, pair, 1.0, (pointer(NAME, &dv)?, DType::F32, first > 0))?;
        }
        Ok([dq, dk, dv])
    }
}

/// The matrix `(tokens, width)` of a head of a sample (of the only sample, where there is but one).
fn matrix(tensor: &Tensor, sample: usize, head: usize, width: usize) -> Result<Tensor> {
    let sample = if tensor.dim(0)? == 1 { 0 } else { sample };
    Ok(tensor.get(sample)?.narrow(1, head * width, width)?.contiguous()?)
}

/// The head of a sample, its keys and values those of all sources that the sample sees.
fn head(attention: &Attention, inputs: &[Tensor], sample: usize, head: usize) -> Result<Head> {
    let width = inputs[0].dim(2)? / attention.heads;
    let joined = |place: usize| -> Result<Tensor> {
        let own = matrix(&inputs[place], sample, head, width)?;
        match inputs.get(place + 2).filter(|_| attention.sees(sample, 1)) {
            Some(reference) => Ok(Tensor::cat(&[&own, &matrix(reference, sample, head, width)?], 0)?),
            None => Ok(own),
        }
    };
    Ok(Head {
        q: matrix(&inputs[0], sample, head, width)?,
        k: joined(1)?,
        v: joined(2)?,
        width,
        scale: (width as f32).powf(-0.5),
        causal: attention.mask == Mask::Causal,
    })
}

/// Heads of samples `(samples * heads) x (tokens, width)` as `(samples, tokens, heads * width)`.
fn gather(parts: Vec<Tensor>, heads: usize) -> Result<Tensor> {
    let samples: Vec<Tensor> =
        parts.chunks(heads).map(|heads| Tensor::cat(heads, 1)).collect::<candle_core::Result<_>>()?;
    Ok(Tensor::stack(&samples, 0)?)
}

pub(super) fn forward(attention: &Attention, inputs: &[Tensor]) -> Result<Forward> {
    let device = cuda_device(NAME, &inputs[0])?;
    let (batch, tokens, _) = inputs[0].dims3()?;
    let (mut outs, mut sums) = (Vec::new(), Vec::new());
    for sample in 0..batch {
        for i in 0..attention.heads {
            let (out, lse) = head(attention, inputs, sample, i)?.forward(&device)?;
            outs.push(out);
            sums.push(lse);
        }
    }
    let lse = Tensor::cat(&sums, 0)?.reshape((batch, attention.heads, tokens))?;
    Ok(Forward { outputs: vec![Output::Tensor(gather(outs, attention.heads)?)], saved: vec![lse] })
}

pub(super) fn backward(attention: &Attention, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let (inputs, heads) = (context.inputs, attention.heads);
    let device = cuda_device(NAME, &inputs[0])?;
    let batch = inputs[0].dim(0)?;
    let own_tokens = inputs[1].dim(1)?;
    let mut parts: Vec<Vec<Tensor>> = vec![Vec::new(); inputs.len()];
    for sample in 0..batch {
        for i in 0..heads {
            let head = head(attention, inputs, sample, i)?;
            let dout = matrix(context.gradient()?, sample, i, head.width)?;
            let lse = context.saved[0].get(sample)?.get(i)?;
            let [dq, dk, dv] = head.backward(&device, &lse, &dout)?;
            parts[0].push(dq);
            for (place, gradient) in [(1, dk), (2, dv)] {
                parts[place].push(gradient.narrow(0, 0, own_tokens)?.contiguous()?);
                let Some(reference) = inputs.get(place + 2) else { continue };
                let tokens = reference.dim(1)?;
                parts[place + 2].push(match attention.sees(sample, 1) {
                    true => gradient.narrow(0, own_tokens, tokens)?.contiguous()?,
                    false => Tensor::zeros((tokens, head.width), DType::F32, gradient.device())?,
                });
            }
        }
    }
    let gradient = |(parts, input): (Vec<Tensor>, &Tensor)| -> Result<Option<Tensor>> {
        let all = gather(parts, heads)?;
        // A reference shared by the batch.
        let all = if all.dims() == input.dims() { all } else { all.sum_keepdim(0)? };
        Ok(Some(all.to_dtype(input.dtype())?))
    };
    parts.into_iter().zip(inputs).map(gradient).collect()
}

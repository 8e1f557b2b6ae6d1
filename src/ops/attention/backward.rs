use candle_core::Tensor;
use rayon::prelude::*;

use super::exponential::Exponential;
use super::view::{KEYS, QUERIES, Tile, View, dot, exponentials, pieces};
use super::{Attention, Mask};
use crate::autograd::Backward;
use crate::ops::support::{Matrix, Threads, matmul, tensor, values};
use crate::{Error, Result};

/// With probabilities `P = exp(S - L)` made anew from the scores `S` and the saved log-sum-exps `L`:
/// `dV = P^T dO`, `dS = P (dO V^T - rowsum(dO O))`, `dQ = dS K / sqrt(d)`, `dK = dS^T Q / sqrt(d)`.
pub(super) fn backward<T: Exponential>(op: &Attention, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let inputs = context.inputs;
    let (batch, tokens, channels) = inputs[0].dims3()?;
    let (heads, width) = (op.heads, channels / op.heads);
    let (Some(Some(output)), Some(log_sums)) = (context.outputs.first(), context.saved.first()) else {
        return Err(Error::argument(
            "attention",
            "saved",
            "the output and the log-sum-exp of the forward pass",
            "none",
        ));
    };
    let gradient = context.gradient()?;
    let guards = inputs.iter().map(|input| values::<T>("attention", input)).collect::<Result<Vec<_>>>()?;
    let views = guards
        .iter()
        .zip(inputs)
        .map(|(numbers, input)| View::new(numbers, input, heads))
        .collect::<Result<Vec<_>>>()?;
    let (output, gradient) = (output.contiguous()?, gradient.contiguous()?);
    let (o_values, g_values) = (values::<T>("attention", &output)?, values::<T>("attention", &gradient)?);
    let log_sums = values::<T>("attention", log_sums)?;
    let pass = Pass {
        inputs: &views,
        output: View::new(&o_values, &output, heads)?,
        gradient: View::new(&g_values, &gradient, heads)?,
        log_sums: &log_sums,
        needs: context.needs,
        mask: op.mask,
    };
    let computed: Vec<Vec<Vec<T>>> =
        (0..batch * heads).into_par_iter().map(|i| pass.one_head(i / heads, i % heads, i * tokens)).collect();

    let mut gradients = Vec::with_capacity(inputs.len());
    for (index, input) in inputs.iter().enumerate() {
        if !context.needs[index] {
            gradients.push(None);
            continue;
        }
        let (input_batch, input_tokens, _) = input.dims3()?;
        let mut sum = vec![T::of(0.0); input.elem_count()];
        for (i, parts) in computed.iter().enumerate() {
            // Always in the order of the samples, so that the sum over a shared reference is the same every time.
            let (sample, head) = (if input_batch == 1 { 0 } else { i / heads }, i % heads);
            let first = sample * input_tokens * channels + head * width;
            for (token, row) in parts[index].chunks_exact(width).enumerate() {
                let target = &mut sum[first + token * channels..][..width];
                target.iter_mut().zip(row).for_each(|(sum, x)| *sum += *x);
            }
        }
        gradients.push(Some(tensor(sum, input.shape())?));
    }
    Ok(gradients)
}

/// What the backward pass reads.
struct Pass<'a, T> {
    inputs: &'a [View<'a, T>],
    output: View<'a, T>,
    gradient: View<'a, T>,
    log_sums: &'a [T],
    needs: &'a [bool],
    mask: Mask,
}

impl<T: Exponential> Pass<'_, T> {
    /// The gradients of one head, each `(tokens, d)`, empty where not needed. `first` is the index of the head's first
    /// log-sum-exp.
    fn one_head(&self, sample: usize, head: usize, first: usize) -> Vec<Vec<T>> {
        let q = self.inputs[0];
        let (tokens, width) = (q.tokens, q.width);
        let scale = T::of((width as f64).sqrt().recip());
        let one = T::of(1.0);
        let mut gradients: Vec<Vec<T>> = self
            .inputs
            .iter()
            .zip(self.needs)
            .map(|(input, needed)| vec![T::of(0.0); if *needed { input.tokens * width } else { 0 }])
            .collect();
        let log_sums = &self.log_sums[first..first + tokens];
        let deltas = self.deltas(sample, head);
        let mut buffers = [vec![T::of(0.0); QUERIES * KEYS], vec![T::of(0.0); QUERIES * KEYS]];

        for index in (1..self.inputs.len()).step_by(2) {
            let (needs_q, needs_k, needs_v) = (self.needs[0], self.needs[index], self.needs[index + 1]);
            if !(needs_q || needs_k || needs_v) {
                continue;
            }
            for (key, keys) in pieces(self.inputs[index].tokens, KEYS) {
                let k_rows = self.inputs[index].rows(sample, head, key, keys);
                let v_rows = self.inputs[index + 1].rows(sample, head, key, keys);
                for (query, queries) in pieces(tokens, QUERIES) {
                    let tile = Tile { query, queries, key, keys };
                    if tile.is_hidden(self.mask) {
                        continue;
                    }
                    let q_rows = q.rows(sample, head, query, queries);
                    let g_rows = self.gradient.rows(sample, head, query, queries);
                    let [scores, slopes] = &mut buffers;
                    let (scores, slopes) = (&mut scores[..tile.area()], &mut slopes[..tile.area()]);
                    tile.scores(scores, q_rows, k_rows, self.mask);
                    for (row, log_sum) in scores.chunks_exact_mut(keys).zip(&log_sums[query..]) {
                        exponentials(row, *log_sum);
                    }
                    let probabilities = Matrix::row_major(scores, queries, keys);
                    if needs_v {
                        let dv = &mut gradients[index + 1][key * width..];
                        matmul(dv, width, true, probabilities.transposed(), g_rows, one, Threads::No);
                    }
                    if !(needs_q || needs_k) {
                        continue;
                    }
                    matmul(slopes, keys, false, g_rows, v_rows.transposed(), one, Threads::No);
                    let rows = slopes.chunks_exact_mut(keys).zip(scores.chunks_exact(keys));
                    for ((slopes, probabilities), delta) in rows.zip(&deltas[query..]) {
                        slopes.iter_mut().zip(probabilities).for_each(|(s, p)| *s = *p * (*s - *delta));
                    }
                    let slopes = Matrix::row_major(slopes, queries, keys);
                    if needs_q {
                        let dq = &mut gradients[0][query * width..];
                        matmul(dq, width, true, slopes, k_rows, scale, Threads::No);
                    }
                    if needs_k {
                        let dk = &mut gradients[index][key * width..];
                        matmul(dk, width, true, slopes.transposed(), q_rows, scale, Threads::No);
                    }
                }
            }
        }
        gradients
    }

    /// `rowsum(dO O)`, one number a query.
    fn deltas(&self, sample: usize, head: usize) -> Vec<T> {
        let (tokens, width) = (self.output.tokens, self.output.width);
        (0..tokens)
            .map(|token| {
                let o = self.output.rows(sample, head, token, 1);
                let g = self.gradient.rows(sample, head, token, 1);
                dot(&o.values[..width], &g.values[..width])
            })
            .collect()
    }
}

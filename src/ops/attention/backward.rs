use candle_core::Tensor;
use rayon::prelude::*;

use super::Attention;
use super::exponential::Exponential;
use super::view::{KEYS, QUERIES, Tile, View, dot, exponentials, pieces, score_gradient};
use crate::autograd::Backward;
use crate::ops::support::{Matrix, Threads, matmul, tensor, values, zeros};
use crate::{Error, Result};

/// Fewer heads in a batch than this are split into spans of queries, so that a single wide head (of the VAE) keeps several
/// threads busy.
const HEADS: usize = 8;
/// Spans of queries a head is split into. A constant, so that the sums do not depend on the number of threads; each span
/// costs the memory of one more gradient of the keys and values.
const SPANS: usize = 4;

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
    let (o_values, g_values) = (values::<T>("attention", output)?, values::<T>("attention", gradient)?);
    let log_sums = values::<T>("attention", log_sums)?;
    let pass = Pass {
        inputs: &views,
        output: View::new(&o_values, output, heads)?,
        gradient: View::new(&g_values, gradient, heads)?,
        log_sums: &log_sums,
        needs: context.needs,
        heads,
        op,
    };
    let spans = if batch * heads < HEADS { SPANS } else { 1 };
    let span = tokens.div_ceil(spans).next_multiple_of(QUERIES).max(QUERIES);
    let parts: Vec<Part> = (0..batch)
        .flat_map(|sample| (0..heads).map(move |head| (sample, head)))
        .flat_map(|(sample, head)| pieces(tokens, span).map(move |queries| Part { sample, head, queries }))
        .collect();
    let computed: Vec<Vec<Vec<T>>> = parts.par_iter().map(|part| pass.one_part(*part)).collect();

    let mut gradients = Vec::with_capacity(inputs.len());
    for (index, input) in inputs.iter().enumerate() {
        if !context.needs[index] {
            gradients.push(None);
            continue;
        }
        let (input_batch, input_tokens, _) = input.dims3()?;
        let mut sum = zeros::<T>(input.elem_count());
        // All parts add to a shared input, those of a sample to the sample's own. Always in the order of the parts, so
        // that sums over spans and over a batch are the same every time.
        let adding = (parts.len() / input_batch.max(1)).max(1);
        let adding = parts.par_chunks(adding).zip(computed.par_chunks(adding));
        sum.par_chunks_mut((input_tokens * channels).max(1)).zip(adding).for_each(|(sum, (parts, computed))| {
            for (part, computed) in parts.iter().zip(computed) {
                let start = if index == 0 { part.queries.0 } else { 0 };
                for (token, row) in computed[index].chunks_exact(width).enumerate() {
                    let target = &mut sum[(start + token) * channels + part.head * width..][..width];
                    target.iter_mut().zip(row).for_each(|(sum, x)| *sum += *x);
                }
            }
        });
        gradients.push(Some(tensor(sum, input.shape())?));
    }
    Ok(gradients)
}

/// What one task computes: the share of some queries, `(start, count)`, of one head in all gradients.
#[derive(Clone, Copy)]
struct Part {
    sample: usize,
    head: usize,
    queries: (usize, usize),
}

/// What the backward pass reads.
struct Pass<'a, T> {
    inputs: &'a [View<'a, T>],
    output: View<'a, T>,
    gradient: View<'a, T>,
    log_sums: &'a [T],
    needs: &'a [bool],
    heads: usize,
    op: &'a Attention,
}

impl<T: Exponential> Pass<'_, T> {
    /// The part's gradients: that of its queries and those of all keys and values, `(tokens, d)`; empty where not
    /// needed.
    fn one_part(&self, part: Part) -> Vec<Vec<T>> {
        let Part { sample, head, queries: (start, count) } = part;
        let q = self.inputs[0];
        let width = q.width;
        let scale = T::of((width as f64).sqrt().recip());
        let one = T::of(1.0);
        let mut gradients: Vec<Vec<T>> = self
            .inputs
            .iter()
            .zip(self.needs)
            .enumerate()
            .map(|(index, (input, needed))| {
                let tokens = if index == 0 { count } else { input.tokens };
                vec![T::of(0.0); if *needed { tokens * width } else { 0 }]
            })
            .collect();
        let first = (sample * self.heads + head) * q.tokens + start;
        let log_sums = &self.log_sums[first..first + count];
        let deltas = self.deltas(part);
        let mut buffers = [vec![T::of(0.0); QUERIES * KEYS], vec![T::of(0.0); QUERIES * KEYS]];

        for index in (1..self.inputs.len()).step_by(2) {
            let (needs_q, needs_k, needs_v) = (self.needs[0], self.needs[index], self.needs[index + 1]);
            if !(needs_q || needs_k || needs_v) || !self.op.sees(sample, index / 2) {
                continue;
            }
            for (key, keys) in pieces(self.inputs[index].tokens, KEYS) {
                let k_rows = self.inputs[index].rows(sample, head, key, keys);
                let v_rows = self.inputs[index + 1].rows(sample, head, key, keys);
                for (from, queries) in pieces(count, QUERIES) {
                    let query = start + from;
                    let tile = Tile { query, queries, key, keys };
                    if tile.is_hidden(self.op.mask) {
                        continue;
                    }
                    let q_rows = q.rows(sample, head, query, queries);
                    let g_rows = self.gradient.rows(sample, head, query, queries);
                    let [scores, slopes] = &mut buffers;
                    let (scores, slopes) = (&mut scores[..tile.area()], &mut slopes[..tile.area()]);
                    tile.scores(scores, q_rows, k_rows, self.op.mask);
                    for (row, log_sum) in scores.chunks_exact_mut(keys).zip(&log_sums[from..]) {
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
                    for ((slopes, probabilities), delta) in rows.zip(&deltas[from..]) {
                        score_gradient(slopes, probabilities, *delta);
                    }
                    let slopes = Matrix::row_major(slopes, queries, keys);
                    if needs_q {
                        let dq = &mut gradients[0][from * width..];
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

    /// `rowsum(dO O)`, one number a query of the part.
    fn deltas(&self, Part { sample, head, queries: (start, count) }: Part) -> Vec<T> {
        let width = self.output.width;
        (start..start + count)
            .map(|token| {
                let o = self.output.rows(sample, head, token, 1);
                let g = self.gradient.rows(sample, head, token, 1);
                dot(&o.values[..width], &g.values[..width])
            })
            .collect()
    }
}

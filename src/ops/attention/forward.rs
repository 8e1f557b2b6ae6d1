use candle_core::Tensor;
use rayon::prelude::*;

use super::Attention;
use super::exponential::Exponential;
use super::view::{KEYS, QUERIES, Tile, View, exponentials, maximum, pieces};
use crate::Result;
use crate::autograd::{Forward, Output};
use crate::ops::support::{Matrix, Threads, matmul, tensor, values, zeros};

/// Saves the log-sum-exp of the scores of every query, `(batch, heads, tokens)`.
pub(super) fn forward<T: Exponential>(op: &Attention, inputs: &[Tensor]) -> Result<Forward> {
    let (batch, tokens, channels) = inputs[0].dims3()?;
    let (heads, width) = (op.heads, channels / op.heads);
    let guards = inputs.iter().map(|input| values::<T>("attention", input)).collect::<Result<Vec<_>>>()?;
    let views = guards
        .iter()
        .zip(inputs)
        .map(|(numbers, input)| View::new(numbers, input, heads))
        .collect::<Result<Vec<_>>>()?;
    let (q, sources) = (views[0], &views[1..]);

    let tiles: Vec<(usize, usize, usize, usize)> = (0..batch)
        .flat_map(|b| {
            (0..heads).flat_map(move |h| pieces(tokens, QUERIES).map(move |(start, count)| (b, h, start, count)))
        })
        .collect();
    let computed: Vec<(Vec<T>, Vec<T>)> = tiles
        .par_iter()
        .map(|&(sample, head, start, count)| one_tile(q, sources, op, (sample, head), (start, count)))
        .collect();

    let mut output = zeros::<T>(batch * tokens * channels);
    // The tiles come in the order of the samples, heads and queries.
    let of_sample = (tiles.len() / batch.max(1)).max(1);
    let samples = tiles.par_chunks(of_sample).zip(computed.par_chunks(of_sample));
    output.par_chunks_mut((tokens * channels).max(1)).zip(samples).for_each(|(output, (tiles, computed))| {
        for ((_, head, start, _), (rows, _)) in tiles.iter().zip(computed) {
            for (i, row) in rows.chunks_exact(width).enumerate() {
                output[(start + i) * channels + head * width..][..width].copy_from_slice(row);
            }
        }
    });
    let log_sums: Vec<T> = computed.into_iter().flat_map(|(_, sums)| sums).collect();
    Ok(Forward {
        outputs: vec![Output::from_vec(output, (batch, tokens, channels))],
        saved: vec![tensor(log_sums, (batch, heads, tokens))?],
    })
}

/// The outputs `(queries, d)` and the log-sum-exps of one tile of queries, by a softmax that goes over the blocks of
/// keys once: a running maximum and sum a query, by which what has been summed up is rescaled.
fn one_tile<T: Exponential>(
    q: View<'_, T>,
    sources: &[View<'_, T>],
    op: &Attention,
    (sample, head): (usize, usize),
    (query, queries): (usize, usize),
) -> (Vec<T>, Vec<T>) {
    let width = q.width;
    let q_rows = q.rows(sample, head, query, queries);
    let mut output = vec![T::of(0.0); queries * width];
    let mut maxima = vec![T::of(f64::NEG_INFINITY); queries];
    let mut sums = vec![T::of(0.0); queries];
    let mut buffer = vec![T::of(0.0); queries * KEYS];
    for (_, source) in sources.chunks_exact(2).enumerate().filter(|(place, _)| op.sees(sample, *place)) {
        for (key, keys) in pieces(source[0].tokens, KEYS) {
            let tile = Tile { query, queries, key, keys };
            if tile.is_hidden(op.mask) {
                break;
            }
            let scores = &mut buffer[..tile.area()];
            tile.scores(scores, q_rows, source[0].rows(sample, head, key, keys), op.mask);
            for (i, row) in scores.chunks_exact_mut(keys).enumerate() {
                // Finite from the first block on: a causal mask leaves key 0 to every query.
                let largest = maximum(row, maxima[i]);
                let sum = exponentials(row, largest);
                if largest > maxima[i] {
                    let shrink = (maxima[i] - largest).exp();
                    sums[i] *= shrink;
                    output[i * width..][..width].iter_mut().for_each(|x| *x *= shrink);
                    maxima[i] = largest;
                }
                sums[i] += sum;
            }
            let probabilities = Matrix::row_major(scores, queries, keys);
            let v_rows = source[1].rows(sample, head, key, keys);
            matmul(&mut output, width, true, probabilities, v_rows, T::of(1.0), Threads::No);
        }
    }
    for (row, sum) in output.chunks_exact_mut(width).zip(&sums) {
        let share = T::of(1.0) / *sum;
        row.iter_mut().for_each(|x| *x *= share);
    }
    let log_sums = maxima.iter().zip(&sums).map(|(maximum, sum)| *maximum + sum.ln()).collect();
    (output, log_sums)
}

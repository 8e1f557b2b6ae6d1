//! What both directions of attention share: access to one head's tokens, tiles of scores, the mask.

use candle_core::Tensor;

use super::Mask;
use super::exponential::Exponential;
use crate::Result;
use crate::ops::support::{Matrix, Real, Threads, matmul};
use crate::ops::vector::vectorised;

/// Queries in a tile of scores.
pub(super) const QUERIES: usize = 64;
/// Keys in a tile of scores.
pub(super) const KEYS: usize = 128;

/// The numbers of a `(batch, tokens, heads * d)` tensor.
#[derive(Clone, Copy)]
pub(super) struct View<'a, T> {
    numbers: &'a [T],
    batch: usize,
    pub tokens: usize,
    channels: usize,
    /// `d`
    pub width: usize,
}

impl<'a, T: Real> View<'a, T> {
    pub fn new(numbers: &'a [T], tensor: &Tensor, heads: usize) -> Result<Self> {
        let (batch, tokens, channels) = tensor.dims3()?;
        Ok(View { numbers, batch, tokens, channels, width: channels / heads })
    }

    /// `(count, d)`: the tokens from `start` of one sample and head. A batch of one serves every sample.
    pub fn rows(&self, sample: usize, head: usize, start: usize, count: usize) -> Matrix<'a, T> {
        let sample = if self.batch == 1 { 0 } else { sample };
        let first = (sample * self.tokens + start) * self.channels + head * self.width;
        Matrix::strided(&self.numbers[first..], count, self.width, self.channels)
    }
}

/// A tile: queries from `query` against keys from `key`.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub query: usize,
    pub queries: usize,
    pub key: usize,
    pub keys: usize,
}

impl Tile {
    pub fn area(self) -> usize {
        self.queries * self.keys
    }

    /// Whether the mask hides every key of the tile from every query of it.
    pub fn is_hidden(self, mask: Mask) -> bool {
        mask == Mask::Causal && self.key >= self.query + self.queries
    }

    /// The scores `q k^T / sqrt(d)`, row by row, with -infinity at hidden keys.
    pub fn scores<T: Real>(self, scores: &mut [T], q: Matrix<'_, T>, k: Matrix<'_, T>, mask: Mask) {
        let scale = T::of((q.columns as f64).sqrt().recip());
        matmul(scores, self.keys, false, q, k.transposed(), scale, Threads::No);
        if mask == Mask::Causal {
            for (i, row) in scores.chunks_exact_mut(self.keys).enumerate() {
                let visible = (self.query + i + 1).saturating_sub(self.key).min(self.keys);
                row[visible..].fill(T::of(f64::NEG_INFINITY));
            }
        }
    }
}

/// `(start, count)` of the pieces of `size` that make up `total`; the last one may be shorter.
pub(super) fn pieces(total: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..total).step_by(size).map(move |start| (start, size.min(total - start)))
}

const LANES: usize = 8;

vectorised! {
    /// The largest number of a row and `floor`, in lanes that the compiler can keep in vector registers.
    pub(super) fn maximum<T: Real>(row: &[T], floor: T) -> T {
        let mut lanes = [floor; LANES];
        let chunks = row.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = if *x > *lane { *x } else { *lane });
        }
        lanes.iter().chain(rest).fold(floor, |largest, x| Real::max(largest, *x))
    }

    /// The sum of the products of two rows, in lanes as [`maximum`].
    pub(super) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
        let mut lanes = [T::of(0.0); LANES];
        let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
        for (a, b) in a_chunks.zip(b_chunks) {
            lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (a, b))| *lane += *a * *b);
        }
        let rest: T = a_rest.iter().zip(b_rest).map(|(a, b)| *a * *b).sum();
        lanes.iter().copied().sum::<T>() + rest
    }

    /// Replaces every number `x` of a row by `exp(x - shift)` and returns the sum.
    pub(super) fn exponentials<T: Exponential>(row: &mut [T], shift: T) -> T {
        T::exponentials(row, shift);
        let mut lanes = [T::of(0.0); LANES];
        let chunks = row.chunks_exact(LANES);
        let rest: T = chunks.remainder().iter().copied().sum();
        for chunk in chunks {
            lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += *x);
        }
        lanes.iter().copied().sum::<T>() + rest
    }

    /// Replaces the gradient `s` of each probability `p` of a row by that of its score, `p (s - delta)`.
    pub(super) fn score_gradient<T: Real>(row: &mut [T], probabilities: &[T], delta: T) {
        row.iter_mut().zip(probabilities).for_each(|(s, p)| *s = *p * (*s - delta));
    }
}

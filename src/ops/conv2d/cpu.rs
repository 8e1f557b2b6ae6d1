use candle_core::Tensor;
use rayon::prelude::*;

use super::Conv2d;
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::support::{Matrix, Real, Threads, computed, matmul, tensor, values, zeros};

/// Bytes of patches gathered at a time: they stay in a core's second-level cache until the product has read them.
const PATCH_BYTES: usize = 256 << 10;

/// Bytes that partial weight gradients may take in all.
const PARTIAL_BYTES: usize = 64 << 20;

/// Sums of the weight gradient that are formed side by side. The number is a constant, and the partial sums are added
/// in order, so that the result does not depend on the number of threads.
const PARTIALS: usize = 16;

/// Which pixels of a source image the taps of each output pixel fall on. Pixels outside count as zero.
struct Window {
    /// Batch, height, width and channels of the source.
    source: [usize; 4],
    kernel: [usize; 2],
    stride: usize,
    /// Source row and column under the first tap of the first output pixel; negative in the padding.
    origin: [isize; 2],
    /// Output height and width.
    out: [usize; 2],
}

impl Window {
    /// Numbers in the patch under one output pixel.
    fn patch(&self) -> usize {
        self.kernel[0] * self.kernel[1] * self.source[3]
    }

    /// Output pixels of the whole batch.
    fn pixels(&self) -> usize {
        self.source[0] * self.out[0] * self.out[1]
    }

    /// Output pixels to treat at a time: depends on shapes only, never on the machine.
    fn chunk<T>(&self) -> usize {
        let cached = PATCH_BYTES / (self.patch() * size_of::<T>()).max(1);
        cached.clamp(64, 1024).min(self.pixels().div_ceil(4)).max(16)
    }

    /// Copies the patches under consecutive output pixels (of the flattened batch), starting with `first`.
    fn gather<T: Real>(&self, source: &[T], first: usize, patches: &mut [T]) {
        let [_, height, width, channels] = self.source;
        let kernel_width = self.kernel[1];
        let [out_height, out_width] = self.out;
        let (row_length, zero) = (kernel_width * channels, T::of(0.0));
        let (mut column, mut row) = (first % out_width, first / out_width % out_height);
        let mut sample = first / out_width / out_height;
        for patch in patches.chunks_exact_mut(self.patch()) {
            let top = (row * self.stride) as isize + self.origin[0];
            let left = (column * self.stride) as isize + self.origin[1];
            let from = (-left).clamp(0, kernel_width as isize) as usize;
            let to = (width as isize - left).clamp(from as isize, kernel_width as isize) as usize;
            for (tap, segment) in patch.chunks_exact_mut(row_length).enumerate() {
                let y = top + tap as isize;
                if y < 0 || y >= height as isize || from == to {
                    segment.fill(zero);
                    continue;
                }
                let start = ((sample * height + y as usize) * width + (left + from as isize) as usize) * channels;
                let inside = &source[start..start + (to - from) * channels];
                if inside.len() == row_length {
                    segment.copy_from_slice(inside);
                } else {
                    segment[..from * channels].fill(zero);
                    segment[from * channels..to * channels].copy_from_slice(inside);
                    segment[to * channels..].fill(zero);
                }
            }
            column += 1;
            if column == out_width {
                (column, row) = (0, row + 1);
                if row == out_height {
                    (row, sample) = (0, sample + 1);
                }
            }
        }
    }

    /// Whether the patches are the source's pixels, one after the other.
    fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == 1 && self.origin == [0, 0] && self.out == self.source[1..3]
    }

    /// The product of every patch with a matrix `(patch, out)`, added to what `start` writes for the pixels from a
    /// first one on, where it says it has: `(pixels, out)`.
    fn correlate<T: Real>(
        &self,
        source: &[T],
        weight: Matrix<'_, T>,
        start: impl Fn(usize, &mut [T]) -> bool + Sync,
    ) -> Vec<T> {
        let (out, patch, chunk) = (weight.columns, self.patch(), self.chunk::<T>());
        let pointwise = self.is_pointwise();
        computed(self.pixels() * out, chunk * out, |index, y| {
            let (first, pixels) = (index * chunk, y.len() / out);
            let mut gathered = Vec::new();
            let patches = if pointwise {
                &source[first * patch..][..pixels * patch]
            } else {
                gathered.resize(pixels * patch, T::of(0.0));
                self.gather(source, first, &mut gathered);
                &gathered[..]
            };
            let keep = start(first, y);
            matmul(y, out, keep, Matrix::row_major(patches, pixels, patch), weight, T::of(1.0), Threads::No);
        })
    }

    /// `gradient^T . patches`, `(out, patch)`, for a gradient `(pixels, out)`.
    fn weight_gradient<T: Real>(&self, source: &[T], gradient: &[T], out: usize) -> Vec<T> {
        let (patch, chunk, pixels) = (self.patch(), self.chunk::<T>(), self.pixels());
        let partials = (PARTIAL_BYTES / (out * patch * size_of::<T>()).max(1)).clamp(1, PARTIALS);
        let share = pixels.div_ceil(chunk).div_ceil(partials) * chunk;
        let threads = if partials == 1 { Threads::All } else { Threads::No };
        let sum = |first: usize, gradient: &[T]| {
            let mut sum = vec![T::of(0.0); out * patch];
            let mut patches = vec![T::of(0.0); chunk * patch];
            for (index, gradient) in gradient.chunks(chunk * out).enumerate() {
                let pixels = gradient.len() / out;
                let patches = &mut patches[..pixels * patch];
                self.gather(source, first + index * chunk, patches);
                let patches = Matrix::row_major(patches, pixels, patch);
                let gradient = Matrix::row_major(gradient, pixels, out).transposed();
                matmul(&mut sum, patch, index > 0, gradient, patches, T::of(1.0), threads);
            }
            sum
        };
        if partials == 1 {
            return sum(0, gradient);
        }
        let sums: Vec<Vec<T>> =
            gradient.par_chunks(share * out).enumerate().map(|(index, part)| sum(index * share, part)).collect();
        add_in_order(sums)
    }
}

/// The sum of vectors of one length, always in the order given.
fn add_in_order<T: Real>(parts: Vec<Vec<T>>) -> Vec<T> {
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_default();
    for part in parts {
        total.iter_mut().zip(&part).for_each(|(total, value)| *total += *value);
    }
    total
}

/// The window of the convolution itself.
fn window(conv: &Conv2d, x: &Tensor, weight: &Tensor) -> Result<Window> {
    let (batch, height, width, channels) = x.dims4()?;
    let (_, kernel_height, kernel_width, _) = weight.dims4()?;
    let out = |length: usize, kernel: usize| (length + 2 * conv.padding - kernel) / conv.stride + 1;
    Ok(Window {
        source: [batch, height, width, channels],
        kernel: [kernel_height, kernel_width],
        stride: conv.stride,
        origin: [-(conv.padding as isize); 2],
        out: [out(height, kernel_height), out(width, kernel_width)],
    })
}

pub(super) fn forward<T: Real>(conv: &Conv2d, inputs: &[Tensor]) -> Result<Forward> {
    let (x, weight) = (&inputs[0], &inputs[1]);
    let window = window(conv, x, weight)?;
    let out = weight.dims()[0];
    let (xs, ws) = (values::<T>("conv2d", x)?, values::<T>("conv2d", weight)?);
    let addends = conv.places.numbers::<T>("conv2d", inputs, out, window.pixels())?;
    let weight = Matrix::row_major(&ws, out, window.patch()).transposed();
    let y = window.correlate(&xs, weight, |first, y| addends.write(first, y));
    Ok(Output::from_vec(y, (window.source[0], window.out[0], window.out[1], out)).into())
}

pub(super) fn backward<T: Real>(conv: &Conv2d, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (&context.inputs[0], &context.inputs[1]);
    let window = window(conv, x, weight)?;
    let out = weight.dims()[0];
    let gs = values::<T>("conv2d", context.gradient()?)?;
    let mut gradients = vec![None; context.inputs.len()];
    if context.needs[0] {
        let dx = input_gradient(conv, &window, &values::<T>("conv2d", weight)?, &gs, out);
        gradients[0] = Some(tensor(dx, x.dims())?);
    }
    if context.needs[1] {
        let dw = window.weight_gradient(&values::<T>("conv2d", x)?, &gs, out);
        gradients[1] = Some(tensor(dw, weight.dims())?);
    }
    if let Some(bias) = conv.places.bias.filter(|place| context.needs[*place]) {
        let sums = gs.par_chunks(1024 * out).map(|part| {
            let mut sum = vec![T::of(0.0); out];
            for pixel in part.chunks_exact(out) {
                sum.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += *value);
            }
            sum
        });
        gradients[bias] = Some(tensor(add_in_order(sums.collect()), out)?);
    }
    conv.places.gradients(context, &mut gradients)?;
    Ok(gradients)
}

/// The input rows (or columns) `first, first + stride, ...` that the same kernel taps reach.
struct Phase {
    /// The taps, `tap, tap + stride, ...`, that reach them.
    tap: usize,
    taps: usize,
    first: usize,
    count: usize,
    /// Output row under the last of the taps, for input row `first`.
    origin: isize,
}

impl Phase {
    fn new(tap: usize, kernel: usize, length: usize, stride: usize, padding: usize) -> Self {
        // Input row `i` gets from tap `k` the output row `(i + padding - k) / stride`, where that is whole.
        let taps = kernel.saturating_sub(tap).div_ceil(stride);
        let skipped = padding.saturating_sub(tap).div_ceil(stride);
        let end = (length + padding).saturating_sub(tap).div_ceil(stride);
        Phase {
            tap,
            taps,
            first: skipped * stride + tap - padding,
            count: end.saturating_sub(skipped),
            origin: skipped as isize + 1 - taps as isize,
        }
    }
}

/// The gradient of the input, as a correlation of the output's gradient with the mirrored kernel. With a stride, input
/// pixels fall into `stride * stride` phases, each reached by its own taps only: one correlation of stride 1 a phase.
fn input_gradient<T: Real>(conv: &Conv2d, window: &Window, weight: &[T], gradient: &[T], out: usize) -> Vec<T> {
    let [batch, height, width, channels] = window.source;
    let [kernel_height, kernel_width] = window.kernel;
    let stride = conv.stride;
    let mut dx = Vec::new();
    for y_tap in 0..stride {
        let y_phase = Phase::new(y_tap, kernel_height, height, stride, conv.padding);
        for x_tap in 0..stride {
            let x_phase = Phase::new(x_tap, kernel_width, width, stride, conv.padding);
            let phase = Window {
                source: [batch, window.out[0], window.out[1], out],
                kernel: [y_phase.taps, x_phase.taps],
                stride: 1,
                origin: [y_phase.origin, x_phase.origin],
                out: [y_phase.count, x_phase.count],
            };
            if phase.patch() == 0 || phase.pixels() == 0 {
                continue;
            }
            let mut mirrored = Vec::with_capacity(phase.patch() * channels);
            for y in (0..y_phase.taps).rev().map(|i| y_phase.tap + i * stride) {
                for x in (0..x_phase.taps).rev().map(|i| x_phase.tap + i * stride) {
                    for channel in 0..out {
                        let start = ((channel * kernel_height + y) * kernel_width + x) * channels;
                        mirrored.extend_from_slice(&weight[start..start + channels]);
                    }
                }
            }
            let part = phase.correlate(gradient, Matrix::row_major(&mirrored, phase.patch(), channels), |_, _| false);
            if stride == 1 {
                return part;
            }
            if dx.is_empty() {
                dx = zeros(batch * height * width * channels);
            }
            let samples = dx.par_chunks_mut(height * width * channels);
            samples.zip(part.par_chunks(phase.out[0] * phase.out[1] * channels)).for_each(|(dx, part)| {
                for (y, row) in part.chunks_exact(phase.out[1] * channels).enumerate() {
                    let start = (y_phase.first + y * stride) * width + x_phase.first;
                    for (x, pixel) in row.chunks_exact(channels).enumerate() {
                        let at = (start + x * stride) * channels;
                        dx[at..at + channels].copy_from_slice(pixel);
                    }
                }
            });
        }
    }
    if dx.is_empty() { zeros(batch * height * width * channels) } else { dx }
}

use candle_core::Tensor;
use rayon::prelude::*;

use super::DepthwiseConv2d;
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::channels::add_in_order;
use crate::ops::support::{Real, tensor, values};

/// The sizes of one convolution.
struct Sizes {
    batch: usize,
    height: usize,
    width: usize,
    channels: usize,
    kernel: [usize; 2],
    out: [usize; 2],
    stride: usize,
    padding: usize,
}

impl Sizes {
    fn new(conv: &DepthwiseConv2d, x: &Tensor, weight: &Tensor) -> Result<Self> {
        let ((batch, height, width, channels), (kernel_height, kernel_width, _)) = (x.dims4()?, weight.dims3()?);
        let (stride, padding) = (conv.stride, conv.padding);
        let out = |size: usize, kernel: usize| (size + 2 * padding - kernel) / stride + 1;
        Ok(Sizes {
            batch,
            height,
            width,
            channels,
            kernel: [kernel_height, kernel_width],
            out: [out(height, kernel_height), out(width, kernel_width)],
            stride,
            padding,
        })
    }

    /// Calls `visit` for every pair of an output pixel of row `row` and a tap that falls inside the image, with the
    /// places of the output pixel within its row, of the input pixel within its image and of the tap's weights.
    #[inline(always)]
    fn taps(&self, row: usize, mut visit: impl FnMut(usize, usize, usize)) {
        for ky in 0..self.kernel[0] {
            let Some(y) = (row * self.stride + ky).checked_sub(self.padding).filter(|y| *y < self.height) else {
                continue;
            };
            for column in 0..self.out[1] {
                for kx in 0..self.kernel[1] {
                    let x = (column * self.stride + kx).wrapping_sub(self.padding);
                    if x < self.width {
                        let tap = (ky * self.kernel[1] + kx) * self.channels;
                        visit(column * self.channels, (y * self.width + x) * self.channels, tap);
                    }
                }
            }
        }
    }
}

pub(super) fn forward<T: Real>(
    conv: &DepthwiseConv2d,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Forward> {
    let sizes = Sizes::new(conv, x, weight)?;
    let (xs, ws) = (values::<T>("depthwise_conv2d", x)?, values::<T>("depthwise_conv2d", weight)?);
    let (xs, ws): (&[T], &[T]) = (&xs, &ws);
    let bias = match bias {
        Some(bias) => values::<T>("depthwise_conv2d", bias)?.to_vec(),
        None => vec![T::of(0.0); sizes.channels],
    };
    let (channels, [out_height, out_width]) = (sizes.channels, sizes.out);
    let image = sizes.height * sizes.width * channels;
    let mut y = vec![T::of(0.0); sizes.batch * out_height * out_width * channels];
    y.par_chunks_mut(out_width * channels).enumerate().for_each(|(index, y)| {
        y.chunks_exact_mut(channels).for_each(|pixel| pixel.copy_from_slice(&bias));
        let x = &xs[index / out_height * image..][..image];
        sizes.taps(index % out_height, |to, from, tap| {
            let taps = x[from..from + channels].iter().zip(&ws[tap..tap + channels]);
            y[to..to + channels].iter_mut().zip(taps).for_each(|(sum, (x, w))| *sum += *x * *w);
        });
    });
    Ok(Output::from_vec(y, (sizes.batch, out_height, out_width, channels)).into())
}

pub(super) fn backward<T: Real>(conv: &DepthwiseConv2d, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (&context.inputs[0], &context.inputs[1]);
    let sizes = Sizes::new(conv, x, weight)?;
    let (xs, ws) = (values::<T>("depthwise_conv2d", x)?, values::<T>("depthwise_conv2d", weight)?);
    let gs = values::<T>("depthwise_conv2d", context.gradient()?)?;
    let (xs, ws, gs): (&[T], &[T], &[T]) = (&xs, &ws, &gs);
    let (channels, [out_height, out_width]) = (sizes.channels, sizes.out);
    let (image, out_row) = (sizes.height * sizes.width * channels, out_width * channels);
    let mut gradients = vec![None; context.inputs.len()];
    if context.needs[0] {
        let mut dx = vec![T::of(0.0); xs.len()];
        // Rows of an image share inputs, so an image is a task.
        dx.par_chunks_mut(image).zip(gs.par_chunks(out_height * out_row)).for_each(|(dx, g)| {
            for (row, g) in g.chunks_exact(out_row).enumerate() {
                sizes.taps(row, |to, from, tap| {
                    let taps = g[to..to + channels].iter().zip(&ws[tap..tap + channels]);
                    dx[from..from + channels].iter_mut().zip(taps).for_each(|(sum, (g, w))| *sum += *g * *w);
                });
            }
        });
        gradients[0] = Some(tensor(dx, x.dims())?);
    }
    if context.needs[1] {
        let parts = xs.par_chunks(image).zip(gs.par_chunks(out_height * out_row)).map(|(x, g)| {
            let mut dw = vec![T::of(0.0); ws.len()];
            for (row, g) in g.chunks_exact(out_row).enumerate() {
                sizes.taps(row, |to, from, tap| {
                    let taps = g[to..to + channels].iter().zip(&x[from..from + channels]);
                    dw[tap..tap + channels].iter_mut().zip(taps).for_each(|(sum, (g, x))| *sum += *g * *x);
                });
            }
            dw
        });
        gradients[1] = Some(tensor(add_in_order(ws.len(), parts.collect()), weight.dims())?);
    }
    if context.needs.get(2) == Some(&true) {
        let parts =
            gs.par_chunks(out_row).map(|g| add_in_order(channels, g.chunks(channels).map(<[T]>::to_vec).collect()));
        gradients[2] = Some(tensor(add_in_order(channels, parts.collect()), channels)?);
    }
    Ok(gradients)
}

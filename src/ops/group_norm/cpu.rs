use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::GroupNorm;
use crate::Result;
use crate::autograd::{Backward, Forward, Output};
use crate::ops::Activation;
use crate::ops::support::{Real, tensor, values, zeros};
use crate::ops::vector::vectorised;

/// Numbers a task treats at a time. A constant, so that sums do not depend on the number of threads.
const CHUNK: usize = 16 << 10;

/// How the numbers of a tensor fall into samples, positions, channels and groups.
struct Extent {
    batch: usize,
    positions: usize,
    channels: usize,
    groups: usize,
}

impl Extent {
    fn of(norm: &GroupNorm, x: &Tensor) -> Self {
        let (batch, channels) = (x.dims()[0], x.dims()[x.rank() - 1]);
        Extent { batch, positions: x.elem_count() / batch / channels, channels, groups: norm.groups }
    }

    /// Numbers in a sample.
    fn sample(&self) -> usize {
        self.positions * self.channels
    }

    /// Numbers in a chunk: whole positions.
    fn chunk(&self) -> usize {
        (CHUNK / self.channels).max(1) * self.channels
    }

    fn group_of(&self, channel: usize) -> usize {
        channel / (self.channels / self.groups)
    }
}

/// Two sums for every channel of a sample.
struct Sums {
    first: Vec<f64>,
    second: Vec<f64>,
}

impl Sums {
    fn zero(channels: usize) -> Self {
        Sums { first: vec![0.0; channels], second: vec![0.0; channels] }
    }

    /// The sums of the parts of each sample, added in order.
    fn add_in_order(parts: Vec<Vec<Sums>>, channels: usize) -> Vec<Sums> {
        let add = |total: &mut [f64], part: &[f64]| total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
        let sample = |parts: Vec<Sums>| {
            parts.into_iter().fold(Sums::zero(channels), |mut total, part| {
                add(&mut total.first, &part.first);
                add(&mut total.second, &part.second);
                total
            })
        };
        parts.into_iter().map(sample).collect()
    }
}

/// Mean and reciprocal standard deviation of every group of every sample.
fn statistics<T: Real>(norm: &GroupNorm, extent: &Extent, xs: &[T]) -> (Vec<f64>, Vec<f64>) {
    let channels = extent.channels;
    let parts = xs.par_chunks(extent.sample()).map(|sample| {
        // Sums of differences from the first position: nothing cancels where the mean is large.
        let shift = &sample[..channels];
        let chunks = sample.par_chunks(extent.chunk()).map(|chunk| {
            let mut sums = Sums::zero(channels);
            add_moments(chunk, shift, &mut sums);
            sums
        });
        chunks.collect()
    });
    let sums = Sums::add_in_order(parts.collect(), channels);
    let (count, per_group) = (extent.positions as f64, channels / extent.groups);
    let (mut means, mut rstds) = (Vec::new(), Vec::new());
    for (sums, sample) in sums.iter().zip(xs.chunks_exact(extent.sample())) {
        for group in 0..extent.groups {
            let members = group * per_group..(group + 1) * per_group;
            let channel_mean = |c: usize| sample[c].to_f64() + sums.first[c] / count;
            let mean = members.clone().map(channel_mean).sum::<f64>() / per_group as f64;
            let variance = members
                .map(|c| {
                    let within = (sums.second[c] - sums.first[c] * sums.first[c] / count) / count;
                    within.max(0.0) + (channel_mean(c) - mean).powi(2)
                })
                .sum::<f64>()
                / per_group as f64;
            means.push(mean);
            rstds.push(1.0 / (variance + norm.eps).sqrt());
        }
    }
    (means, rstds)
}

/// One number for every channel of a sample, from the channel and its group.
fn per_channel<T: Real>(extent: &Extent, sample: usize, value: impl Fn(usize, usize) -> f64) -> Vec<T> {
    (0..extent.channels).map(|c| T::of(value(c, sample * extent.groups + extent.group_of(c)))).collect()
}

vectorised! {
    /// Adds the sums of the differences from `shift`, and of their squares.
    fn add_moments<T: Real>(xs: &[T], shift: &[T], sums: &mut Sums) {
        let channels = shift.len();
        let (first, second) = (&mut sums.first[..channels], &mut sums.second[..channels]);
        for x in xs.chunks_exact(channels) {
            for c in 0..channels {
                let difference = (x[c] - shift[c]).to_f64();
                first[c] += difference;
                second[c] += difference * difference;
            }
        }
    }

    fn normalise<T: Real>(xs: &[T], mean: &[T], scale: &[T], bias: &[T], ys: &mut [T]) {
        let channels = mean.len();
        let (scale, bias) = (&scale[..channels], &bias[..channels]);
        for (y, x) in ys.chunks_exact_mut(channels).zip(xs.chunks_exact(channels)) {
            for c in 0..channels {
                y[c] = (x[c] - mean[c]) * scale[c] + bias[c];
            }
        }
    }

    fn activate<T: Real>(activation: Activation, ys: &mut [T]) {
        activation.replace(ys);
    }

    fn activation_gradient<T: Real>(activation: Activation, gs: &[T], ys: &mut [T]) {
        activation.replace_by_gradient(ys, gs);
    }

    /// Adds the sums of a gradient, plain and times the normalised input.
    fn add_gradient_sums<T: Real>(gs: &[T], xs: &[T], mean: &[T], rstd: &[T], sums: &mut Sums) {
        let channels = mean.len();
        let (rstd, first, second) = (&rstd[..channels], &mut sums.first[..channels], &mut sums.second[..channels]);
        for (g, x) in gs.chunks_exact(channels).zip(xs.chunks_exact(channels)) {
            for c in 0..channels {
                first[c] += g[c].to_f64();
                second[c] += (g[c] * ((x[c] - mean[c]) * rstd[c])).to_f64();
            }
        }
    }

    /// From the gradient behind the normalisation to the one before it.
    fn finish_gradient<T: Real>(xs: &[T], coefficients: [&[T]; 4], gs: &mut [T]) {
        let channels = coefficients[0].len();
        let [mean, scale, offset, slope] = coefficients.map(|coefficient| &coefficient[..channels]);
        for (g, x) in gs.chunks_exact_mut(channels).zip(xs.chunks_exact(channels)) {
            for c in 0..channels {
                g[c] = g[c] * scale[c] - offset[c] - (x[c] - mean[c]) * slope[c];
            }
        }
    }
}

pub(super) fn forward<T: Real>(norm: &GroupNorm, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Forward> {
    let extent = Extent::of(norm, x);
    let channels = extent.channels;
    let (xs, ws) = (values::<T>("group_norm", x)?, values::<T>("group_norm", weight)?);
    let bias = values::<T>("group_norm", bias)?;
    let (xs, ws, bias): (&[T], &[T], &[T]) = (&xs, &ws, &bias);
    let (means, rstds) = statistics(norm, &extent, xs);
    let mut y = zeros::<T>(xs.len());
    y.par_chunks_mut(extent.sample()).zip(xs.par_chunks(extent.sample())).enumerate().for_each(|(sample, (y, x))| {
        let mean = per_channel::<T>(&extent, sample, |_, group| means[group]);
        let scale = per_channel::<T>(&extent, sample, |c, group| rstds[group] * ws[c].to_f64());
        let (mean, scale, bias) = (&mean[..channels], &scale[..channels], &bias[..channels]);
        y.par_chunks_mut(extent.chunk()).zip(x.par_chunks(extent.chunk())).for_each(|(y, x)| {
            normalise(x, mean, scale, bias, y);
            activate(norm.activation, y);
        });
    });
    let shape = (extent.batch, extent.groups);
    let saved = vec![Tensor::from_vec(means, shape, &Device::Cpu)?, Tensor::from_vec(rstds, shape, &Device::Cpu)?];
    Ok(Forward { outputs: vec![Output::from_vec(y, x.shape())], saved })
}

pub(super) fn backward<T: Real>(norm: &GroupNorm, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
    let extent = Extent::of(norm, &context.inputs[0]);
    let (channels, sample_length) = (extent.channels, extent.sample());
    let [xs, ws, bias] = [0, 1, 2].map(|i| values::<T>("group_norm", &context.inputs[i]));
    let (xs, ws, bias, gs) = (xs?, ws?, bias?, values::<T>("group_norm", context.gradient()?)?);
    let (xs, ws, bias, gs): (&[T], &[T], &[T], &[T]) = (&xs, &ws, &bias, &gs);
    let (means, rstds) =
        (values::<f64>("group_norm", &context.saved[0])?, values::<f64>("group_norm", &context.saved[1])?);
    let (means, rstds): (&[f64], &[f64]) = (&means, &rstds);

    // First the gradient before the activation, left in `dx`, and its sums, plain and times the normalised input.
    let mut dx = zeros::<T>(xs.len());
    let samples = dx.par_chunks_mut(sample_length).zip(xs.par_chunks(sample_length)).zip(gs.par_chunks(sample_length));
    let parts = samples.enumerate().map(|(sample, ((dx, x), g))| {
        let mean = per_channel::<T>(&extent, sample, |_, group| means[group]);
        let rstd = per_channel::<T>(&extent, sample, |_, group| rstds[group]);
        let scale = per_channel::<T>(&extent, sample, |c, group| rstds[group] * ws[c].to_f64());
        let (mean, rstd, scale) = (&mean[..], &rstd[..], &scale[..]);
        let length = extent.chunk();
        let chunks = dx.par_chunks_mut(length).zip(x.par_chunks(length)).zip(g.par_chunks(length));
        let sums = chunks.map(|((dx, x), g)| {
            if norm.activation == Activation::None {
                dx.copy_from_slice(g);
            } else {
                normalise(x, mean, scale, bias, dx);
                activation_gradient(norm.activation, g, dx);
            }
            let mut sums = Sums::zero(channels);
            add_gradient_sums(dx, x, mean, rstd, &mut sums);
            sums
        });
        sums.collect()
    });
    let sums = Sums::add_in_order(parts.collect(), channels);

    let total = |pick: fn(&Sums) -> &[f64]| -> Result<Option<Tensor>> {
        let total = (0..channels).map(|c| T::of(sums.iter().map(|sums| pick(sums)[c]).sum())).collect();
        Ok(Some(tensor::<T>(total, channels)?))
    };
    let mut gradients = vec![None; 3];
    if context.needs[1] {
        gradients[1] = total(|sums| &sums.second)?;
    }
    if context.needs[2] {
        gradients[2] = total(|sums| &sums.first)?;
    }
    if context.needs[0] {
        let count = (sample_length / extent.groups) as f64;
        dx.par_chunks_mut(sample_length).zip(xs.par_chunks(sample_length)).enumerate().for_each(|(sample, (dx, x))| {
            // Means over each group of the gradient of the normalised input, plain and times that input.
            let (mut plain, mut along) = (vec![0.0; extent.groups], vec![0.0; extent.groups]);
            for c in 0..channels {
                plain[extent.group_of(c)] += ws[c].to_f64() * sums[sample].first[c] / count;
                along[extent.group_of(c)] += ws[c].to_f64() * sums[sample].second[c] / count;
            }
            let own = |group: usize| group - sample * extent.groups;
            let mean = per_channel::<T>(&extent, sample, |_, group| means[group]);
            let scale = per_channel::<T>(&extent, sample, |c, group| rstds[group] * ws[c].to_f64());
            let offset = per_channel::<T>(&extent, sample, |_, group| rstds[group] * plain[own(group)]);
            let slope = per_channel::<T>(&extent, sample, |_, group| rstds[group].powi(2) * along[own(group)]);
            let (mean, scale, offset, slope) =
                (&mean[..channels], &scale[..channels], &offset[..channels], &slope[..channels]);
            dx.par_chunks_mut(extent.chunk()).zip(x.par_chunks(extent.chunk())).for_each(|(dx, x)| {
                finish_gradient(x, [mean, scale, offset, slope], dx);
            });
        });
        gradients[0] = Some(tensor(dx, context.inputs[0].dims())?);
    }
    Ok(gradients)
}

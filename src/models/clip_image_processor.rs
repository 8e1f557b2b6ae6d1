//! Pictures to the input of CLIP's image encoder, byte for byte as Pillow and transformers make it.

use candle_core::{Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;

use super::clip_vision::{CLIP_MEAN, CLIP_STD};
use crate::ops::resize_bicubic::taps;
use crate::{Error, Result};

/// Bits behind the point of Pillow's filter weights.
const PRECISION: u32 = 22;

/// The input of CLIP's image encoder for a picture (transformers: `CLIPImageProcessorPil`): the shorter side resized to
/// `size` by Pillow's bicubic filter on bytes, the middle `size` by `size` cut out, colours normalised.
///
/// Returns f32 `(3, size, size)`. Only the pixels of the middle are computed, so extreme aspect ratios cost no memory.
///
/// # Errors
/// [`Error::Argument`] for a picture without pixels, or a size of 0.
pub fn clip_pixel_values(picture: &RgbImage, size: usize, device: &Device) -> Result<Tensor> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    if size == 0 || width == 0 || height == 0 {
        let found = format!("{width} x {height}, size {size}");
        return Err(Error::argument("clip_pixel_values", "picture", "at least one pixel", found));
    }
    let scaled = |side: usize| side * size / width.min(height);
    let axis = |side: usize| Axis::new(side, scaled(side), (scaled(side) - size) / 2, size);
    let bytes = resize(picture.as_raw(), width, &axis(width), &axis(height));
    let mut values = Vec::with_capacity(bytes.len());
    for channel in 0..3 {
        let (mean, deviation) = (CLIP_MEAN[channel] as f32, CLIP_STD[channel] as f32);
        values.extend(bytes.iter().skip(channel).step_by(3).map(|&byte| (f32::from(byte) / 255.0 - mean) / deviation));
    }
    Ok(Tensor::from_vec(values, (3, size, size), device)?)
}

/// The part of a resized axis that is wanted: for every output pixel the input pixels and their weights in fixed point.
struct Axis {
    taps: Vec<Vec<(usize, i32)>>,
}

impl Axis {
    fn new(from: usize, to: usize, start: usize, count: usize) -> Self {
        let fixed = |weight: f64| (weight * f64::from(1u32 << PRECISION)).round() as i32;
        let row = |output: usize| {
            // Pillow leaves out a pass that changes nothing.
            let taps = if from == to { vec![(output, 1.0)] } else { taps(from, to, output) };
            taps.into_iter().map(|(i, weight)| (i, fixed(weight))).collect()
        };
        Axis { taps: (start..start + count).map(row).collect() }
    }
}

/// Rounds a sum in fixed point to a byte.
fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// Pillow's `ImagingResample` of 8-bit RGB: along the rows first, rounded to bytes, then along the columns.
fn resize(source: &[u8], width: usize, horizontal: &Axis, vertical: &Axis) -> Vec<u8> {
    const HALF: i32 = 1 << (PRECISION - 1);
    let out_row = 3 * horizontal.taps.len();
    let used = vertical.taps.iter().flatten().map(|(i, _)| *i);
    let (first, end) = used.fold((usize::MAX, 0), |(first, end), i| (first.min(i), end.max(i + 1)));
    let mut wide = vec![0u8; (end - first) * out_row];
    wide.par_chunks_mut(out_row).zip(source[first * 3 * width..].par_chunks(3 * width)).for_each(|(to, from)| {
        for (pixel, taps) in to.chunks_exact_mut(3).zip(&horizontal.taps) {
            for (channel, value) in pixel.iter_mut().enumerate() {
                let sum = taps.iter().fold(HALF, |sum, (i, w)| sum + i32::from(from[3 * i + channel]) * w);
                *value = to_byte(sum);
            }
        }
    });
    let mut result = vec![0u8; vertical.taps.len() * out_row];
    result.par_chunks_mut(out_row).zip(&vertical.taps).for_each(|(to, taps)| {
        for (column, value) in to.iter_mut().enumerate() {
            let at = |i: usize| i32::from(wide[(i - first) * out_row + column]);
            *value = to_byte(taps.iter().fold(HALF, |sum, (i, w)| sum + at(*i) * w));
        }
    });
    result
}

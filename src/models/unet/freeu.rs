//! FreeU (Si et al. 2023): at inference, the up blocks' own features are strengthened and the low frequencies of the
//! skip connections weakened.

use std::f64::consts::TAU;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::Result;

/// The factors of FreeU, named as in diffusers' `enable_freeu`. 1 changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FreeU {
    /// Factor of the first half of the channels in the first (coarsest) up block.
    pub b1: f64,
    /// The same in the second up block.
    pub b2: f64,
    /// Factor of the lowest frequencies of the skip connections into the first up block.
    pub s1: f64,
    /// The same for the second up block.
    pub s2: f64,
}

impl FreeU {
    /// What the paper's authors run: `b1 = 1.0, b2 = 1.1, s1 = 0.9, s2 = 0.2`, of which their code applies only `b2`
    /// and `s2` (its test whether a block has a number takes the number 0 for none).
    pub fn official() -> Self {
        FreeU { b1: 1.0, b2: 1.1, s1: 1.0, s2: 0.2 }
    }

    /// What FreeU's authors recommend for SDXL.
    pub fn sdxl() -> Self {
        FreeU { b1: 1.3, b2: 1.4, s1: 0.9, s2: 0.2 }
    }

    /// The hidden states and the skip connection, both `(batch, height, width, channels)`, as they enter a resnet of
    /// up block `index` (diffusers: `apply_freeu`).
    pub(super) fn apply(&self, index: usize, hidden: Tensor, skip: Tensor) -> Result<(Tensor, Tensor)> {
        let (b, s) = match index {
            0 => (self.b1, self.s1),
            1 => (self.b2, self.s2),
            _ => return Ok((hidden, skip)),
        };
        let channels = hidden.dim(3)?;
        let half = channels / 2;
        let hidden = match b == 1.0 || half == 0 {
            true => hidden,
            false => {
                let strong = (hidden.narrow(3, 0, half)? * b)?;
                Tensor::cat(&[&strong, &hidden.narrow(3, half, channels - half)?], 3)?
            }
        };
        let skip = if s == 1.0 { skip } else { scale_low_frequencies(&skip, s)? };
        Ok((hidden, skip))
    }
}

/// Multiplies the frequencies 0 and -1 of both axes by a factor (diffusers: `fourier_filter` with threshold 1).
///
/// These are four of the image's frequencies, so instead of two Fourier transforms the image is projected on their
/// waves, of which the real part is kept as there.
fn scale_low_frequencies(x: &Tensor, factor: f64) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    let pixels = height * width;
    // An axis of one pixel has the frequency 0 only.
    let frequencies = |size: usize| if size == 1 { 0..1 } else { 0..2 };
    let mut waves = Vec::new();
    for (fy, fx) in frequencies(height).flat_map(|fy| frequencies(width).map(move |fx| (fy, fx))) {
        let phase =
            |i: usize| TAU * ((fy * (i / width)) as f64 / height as f64 + (fx * (i % width)) as f64 / width as f64);
        waves.extend((0..pixels).map(|i| phase(i).cos()));
        if (fy, fx) != (0, 0) {
            waves.extend((0..pixels).map(|i| phase(i).sin()));
        }
    }
    let count = waves.len() / pixels;
    let waves = Tensor::from_vec(waves, (count, pixels), &Device::Cpu)?.to_dtype(x.dtype())?.to_device(x.device())?;
    let shared = |matrix: Tensor| matrix.unsqueeze(0)?.repeat((batch, 1, 1));
    let amplitudes = shared(waves.clone())?.matmul(&x.reshape((batch, pixels, channels))?)?;
    let low = shared(waves.t()?.contiguous()?)?.matmul(&amplitudes)?.reshape(x.shape())?;
    Ok((x + (low * ((factor - 1.0) / pixels as f64))?)?)
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::random::Address;

    fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
        Ok((a - b)?.abs()?.max_all()?.to_scalar::<f64>()?)
    }

    #[test]
    fn the_mean_is_scaled_and_a_high_frequency_is_not() -> Result<()> {
        let constant = Tensor::full(3.0, (1, 4, 6, 1), &Device::Cpu)?;
        assert!(difference(&scale_low_frequencies(&constant, 0.2)?, &(&constant * 0.2)?)? < 1e-12);
        let stripes: Vec<f64> = (0..24).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let stripes = Tensor::from_vec(stripes, (1, 4, 6, 1), &Device::Cpu)?;
        assert!(difference(&scale_low_frequencies(&stripes, 0.2)?, &stripes)? < 1e-12);
        Ok(())
    }

    #[test]
    fn factors_of_one_and_blocks_beyond_the_second_change_nothing() -> Result<()> {
        let x = Address::new(1, "x").normal((1, 2, 2, 4), DType::F64, &Device::Cpu)?;
        let none = FreeU { b1: 1.0, b2: 1.0, s1: 1.0, s2: 1.0 };
        for (freeu, index) in [(none, 0), (none, 1), (FreeU::sdxl(), 2)] {
            let (hidden, skip) = freeu.apply(index, x.clone(), x.clone())?;
            assert_eq!((difference(&hidden, &x)?, difference(&skip, &x)?), (0.0, 0.0));
        }
        let (hidden, _) = FreeU::sdxl().apply(1, x.clone(), x.clone())?;
        let expected = Tensor::cat(&[&(x.narrow(3, 0, 2)? * 1.4)?, &x.narrow(3, 2, 2)?], 3)?;
        assert_eq!(difference(&hidden, &expected)?, 0.0);
        Ok(())
    }
}

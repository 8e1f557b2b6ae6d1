//! Randomness that is addressed, not consumed.
//!
//! Every random draw of the crate is a pure function of an [`Address`]: the seed of the run, what the draw is for, and
//! the step, rank and sample it belongs to. Nothing is drawn from a shared stream, so resuming a run, changing the
//! number of workers or skipping validation changes no draw.

use candle_core::{DType, Device, Shape, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;

use crate::Result;

/// Where a random draw belongs. Two draws with equal addresses are equal, on every machine.
///
/// The address is the key of a ChaCha generator with 8 rounds, a counter-based generator, so draws at neighbouring
/// addresses are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The seed of the run.
    pub seed: u64,
    /// What the draw is for (`"noise"`, `"timestep"`, `"pair"` ...).
    pub purpose: &'static str,
    /// Training iteration, or index of the picture at inference.
    pub step: u64,
    /// Rank of the process.
    pub rank: u32,
    /// Index of the sample within the batch of this rank, or any finer index the purpose calls for.
    pub sample: u32,
}

impl Address {
    /// The address of a purpose at step 0, rank 0, sample 0.
    pub fn new(seed: u64, purpose: &'static str) -> Self {
        Address { seed, purpose, step: 0, rank: 0, sample: 0 }
    }

    /// The same address at another step.
    pub fn step(self, step: u64) -> Self {
        Address { step, ..self }
    }

    /// The same address at another rank.
    pub fn rank(self, rank: u32) -> Self {
        Address { rank, ..self }
    }

    /// The same address for another sample.
    pub fn sample(self, sample: usize) -> Self {
        Address { sample: sample as u32, ..self }
    }

    /// The generator that starts at this address.
    pub fn rng(self) -> ChaCha8Rng {
        // FNV-1a keeps the purpose's hash the same on every platform and compiler, which std's hashers do not promise.
        let purpose = self
            .purpose
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        let mut key = [0u8; 32];
        key[0..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&purpose.to_le_bytes());
        key[16..24].copy_from_slice(&self.step.to_le_bytes());
        key[24..28].copy_from_slice(&self.rank.to_le_bytes());
        key[28..32].copy_from_slice(&self.sample.to_le_bytes());
        ChaCha8Rng::from_seed(key)
    }

    /// One number, uniform in `[0, 1)`.
    pub fn uniform(self) -> f64 {
        self.rng().random()
    }

    /// A tensor of standard normal numbers.
    ///
    /// The numbers are drawn in f32 and then converted, so they are the same for every `dtype` and device.
    ///
    /// # Errors
    /// Where the device cannot hold the tensor.
    pub fn normal(self, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let rng = self.rng();
        let values: Vec<f32> = rng.sample_iter(StandardNormal).take(shape.elem_count()).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
    }

    /// A tensor of numbers uniform in `[0, 1)`, drawn in f32.
    ///
    /// # Errors
    /// Where the device cannot hold the tensor.
    pub fn uniform_tensor(self, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let mut rng = self.rng();
        let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.random()).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
    }

    /// Standard normal noise for a batch, `shape` being one sample's: sample `i` of the batch has the address
    /// `self.sample(i)`, so a sample's noise does not depend on the size of the batch. Shape `(batch, ..shape)`.
    ///
    /// # Errors
    /// Where the device cannot hold the tensor.
    pub fn normal_batch(self, batch: usize, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let size = shape.elem_count();
        let mut values = vec![0f32; batch * size];
        // Each sample by a thread, all in one copy: this stands between two networks on a GPU.
        values.par_chunks_mut(size.max(1)).enumerate().for_each(|(i, values)| {
            values.iter_mut().zip(self.sample(i).rng().sample_iter(StandardNormal)).for_each(|(to, value)| *to = value);
        });
        let shape = [&[batch], shape.dims()].concat();
        let noise = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            return crate::cuda::upload_tensor(device, &noise);
        }
        Ok(noise.to_device(device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_addresses_give_equal_draws_and_different_ones_do_not() {
        let address = Address::new(7, "noise").step(3).sample(2);
        assert_eq!(address.uniform(), address.uniform());
        for other in [
            address.step(4),
            address.sample(1),
            address.rank(1),
            Address { purpose: "timestep", ..address },
            Address { seed: 8, ..address },
        ] {
            assert_ne!(address.uniform(), other.uniform());
        }
    }

    #[test]
    fn a_samples_noise_does_not_depend_on_the_batch() -> Result<()> {
        let address = Address::new(1, "noise");
        let small = address.normal_batch(2, (3, 4), DType::F32, &Device::Cpu)?;
        let large = address.normal_batch(5, (3, 4), DType::F32, &Device::Cpu)?.narrow(0, 0, 2)?;
        assert_eq!(small.flatten_all()?.to_vec1::<f32>()?, large.flatten_all()?.to_vec1::<f32>()?);
        let second = address.sample(1).normal((3, 4), DType::F32, &Device::Cpu)?;
        assert_eq!(small.get(1)?.to_vec2::<f32>()?, second.to_vec2::<f32>()?);
        Ok(())
    }

    #[test]
    fn normal_draws_have_mean_zero_and_variance_one() -> Result<()> {
        let x = Address::new(0, "noise").normal(40_000, DType::F64, &Device::Cpu)?;
        let mean = x.mean_all()?.to_scalar::<f64>()?;
        let variance = x.sqr()?.mean_all()?.to_scalar::<f64>()?;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "mean {mean}, variance {variance}");
        Ok(())
    }
}

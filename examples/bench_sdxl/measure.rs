//! Times on the GPU, their relation to the ceiling, and memory.

use candle_core::{DType, Device, Tensor};
use lcm_lookahead::{Result, cuda, ops};

/// Prints measurements.
pub struct Report {
    /// The GPU.
    pub device: Device,
    /// Floating-point operations per second of a large bf16 matrix product.
    ceiling: f64,
}

impl Report {
    /// Measures the ceiling.
    pub fn new(device: &Device) -> Result<Self> {
        let side = 8192;
        let matrix =
            || -> Result<Tensor> { Ok(Tensor::randn(0f32, 1.0, (side, side), device)?.to_dtype(DType::BF16)?) };
        let (a, b) = (matrix()?, matrix()?);
        let seconds = median(device, 10, || ops::linear(&a, &b, None).map(|_| ()))?;
        let ceiling = 2.0 * (side as f64).powi(3) / seconds;
        println!("ceiling: bf16 matrix product {side}^3 at {:.0} TFLOP/s", ceiling / 1e12);
        Ok(Report { device: device.clone(), ceiling })
    }

    /// Measures a function of so many floating-point operations and prints a line.
    pub fn line(
        &self,
        what: &str,
        operations: f64,
        repeats: usize,
        mut run: impl FnMut() -> Result<()>,
    ) -> Result<f64> {
        cuda::memory_use(&self.device, true)?;
        let seconds = median(&self.device, repeats, &mut run)?;
        self.print(what, operations, seconds)?;
        Ok(seconds)
    }

    fn print(&self, what: &str, operations: f64, seconds: f64) -> Result<()> {
        let memory = cuda::memory_use(&self.device, false)?;
        let rate = operations / seconds;
        let share = match operations {
            0.0 => String::new(),
            _ => format!("{:.0} TFLOP/s, {:.0} % of the ceiling, ", rate / 1e12, 100.0 * rate / self.ceiling),
        };
        let peak = memory.peak as f64 / f64::from(1 << 30);
        println!("{what}: {:.3} ms, {share}peak {peak:.1} GiB", seconds * 1e3);
        Ok(())
    }
}

/// Median seconds of a function's work on the GPU, after three runs to warm up (one where it is measured once).
pub fn median(device: &Device, repeats: usize, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..if repeats > 1 { 3 } else { 1 } {
        run()?;
    }
    let mut times = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        cuda::synchronize(device)?;
        times.push(cuda::timed(device, &mut run)?.1.as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[repeats / 2])
}

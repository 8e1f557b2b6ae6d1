//! Where the benchmarks run, and how time is taken there: on the CPU, or, built with the feature `cuda`, on the first GPU.
#![allow(dead_code, reason = "not every benchmark needs all of this")]

pub mod networks;

use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device};
use criterion::measurement::WallTime;
use criterion::{Bencher, BenchmarkGroup, Criterion, SamplingMode};
use lcm_lookahead::Result;

/// Whether GPU sizes are measured.
pub const ON_GPU: bool = cfg!(feature = "cuda");

/// What the networks compute in: what they are trained in there.
pub const DTYPE: DType = if ON_GPU { DType::BF16 } else { DType::F32 };

/// The device measured. A build for the GPU ends here, with one sentence, where there is none.
pub fn device() -> Device {
    #[cfg(feature = "cuda")]
    return lcm_lookahead::cuda::open(0).unwrap_or_else(|reason| {
        eprintln!("error: {reason}; without the feature `cuda` the benchmarks measure the CPU");
        std::process::exit(1)
    });
    #[cfg(not(feature = "cuda"))]
    Device::Cpu
}

/// A group of few samples; on a GPU, whose times hardly scatter, each sample repeats the work equally often.
pub fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10);
    if ON_GPU {
        group.sampling_mode(SamplingMode::Flat);
    }
    group
}

/// The same for work of milliseconds at most.
pub fn quick_group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = group(criterion, name);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
}

/// Times a function. On a GPU it is launched as often as criterion asks, one after the other, and the clock stops when
/// the GPU has done the last: launches that the GPU does not wait for cost nothing, as in a run of a network.
pub fn time<T>(bencher: &mut Bencher<'_>, device: &Device, mut function: impl FnMut() -> Result<T>) {
    #[cfg(feature = "cuda")]
    bencher.iter_custom(|times| {
        let wait = || lcm_lookahead::cuda::synchronize(device).expect("the GPU's work");
        wait();
        let start = std::time::Instant::now();
        for _ in 0..times {
            black_box(function().expect("what is measured"));
        }
        wait();
        start.elapsed()
    });
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        bencher.iter(|| black_box(function().expect("what is measured")));
    }
}

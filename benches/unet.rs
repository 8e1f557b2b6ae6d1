//! Forward passes of the U-Net: the miniature's on the CPU, in f32; with `--features cuda` SDXL's on the GPU, at 1024
//! pixels, of random weights, in bf16.
//!
//! `cargo bench --bench unet`. On the GPU an element of the throughput is one floating-point operation.

mod support;

use candle_core::Tensor;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lcm_lookahead::models::unet::Recording;
use lcm_lookahead::random::Address;
use lcm_lookahead::{Base, Conditioning, Loras, Pass, Result};
use support::networks;

/// Latents and conditioning of a batch.
fn inputs(base: &Base, batch: usize) -> Result<(Tensor, Conditioning)> {
    let random = |purpose, shape: &[usize]| Address::new(0, purpose).normal(shape, base.dtype, &base.device);
    // The miniature's autoencoder makes the sides 4 times smaller, SDXL's 8 times.
    let side = base.resolution / if support::ON_GPU { 8 } else { 4 };
    let conditioning = base.conditioning(&vec!["a photo of a face".to_string(); batch])?;
    Ok((random("latents", &[batch, 4, side, side])?, conditioning))
}

/// Floating-point operations of one sample's pass through SDXL's U-Net.
const OPERATIONS: u64 = 5_980_000_000_000;

fn forward(criterion: &mut Criterion) {
    let device = support::device();
    let base = networks::base(&device).expect("the networks");
    let mut group = support::group(criterion, "U-Net forward");
    for batch in [1, 2, 4] {
        let (latents, text) = inputs(&base, batch).expect("inputs");
        let timesteps = vec![500; batch];
        let reference = base.unet.record(&latents, &timesteps, &text, &Pass::default(), &Recording::default());
        let passes = [
            ("plain", Pass::default()),
            ("with a LoRA", Pass { loras: Loras::one(&base.lcm_lora, 0.7), ..Pass::default() }),
            ("extended", Pass { reference: Some(reference.expect("keys and values")), ..Pass::default() }),
        ];
        if support::ON_GPU {
            group.throughput(Throughput::Elements(OPERATIONS * batch as u64));
        }
        for (name, pass) in passes {
            group.bench_function(format!("batch {batch}, {name}"), |bencher| {
                support::time(bencher, &device, || base.unet.forward(&latents, &timesteps, &text, &pass));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, forward);
criterion_main!(benches);

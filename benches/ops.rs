//! How long each operation takes, forward and with its backward pass, at the sizes of the miniature.
//!
//! `cargo bench --bench ops` runs all; `cargo bench --bench ops -- conv2d` one group. Where a group has a throughput,
//! an element is one floating-point operation, so criterion's `Gelem/s` are GFLOP/s (a backward pass counts two
//! products of the size of the forward one); for the others it is one number of the output.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device, Tensor, Var};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use lcm_lookahead::Result;
use lcm_lookahead::ops::{self, Activation};
use lcm_lookahead::random::Address;

fn variable(purpose: &'static str, shape: &[usize]) -> Var {
    let values = Address::new(3, purpose).normal(shape, DType::F32, &Device::Cpu).expect("random numbers");
    Var::from_tensor(&values).expect("a variable")
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
}

/// Times a function of variables: the values alone, and values with the gradients of all variables. `work` is the cost
/// of the forward pass, `backward_work` that of the backward pass.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    case: &str,
    (work, backward_work): (u64, u64),
    variables: &[Var],
    function: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let frozen: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().detach()).collect();
    let tracked: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
    group.throughput(Throughput::Elements(work));
    group.bench_function(format!("{case} forward"), |bencher| {
        bencher.iter(|| black_box(function(&frozen).expect("the forward pass")));
    });
    group.throughput(Throughput::Elements(work + backward_work));
    group.bench_function(format!("{case} forward and backward"), |bencher| {
        bencher.iter(|| {
            let output = function(&tracked).expect("the forward pass");
            black_box(output.backward().expect("the backward pass"))
        });
    });
}

fn linear(criterion: &mut Criterion) {
    let mut group = group(criterion, "linear");
    let (rows, channels, out) = (8 * 1024, 128, 128);
    let variables = [variable("x", &[rows, channels]), variable("w", &[out, channels]), variable("b", &[out])];
    let work = (2 * rows * channels * out) as u64;
    measure(&mut group, "8192x128 to 128", (work, 2 * work), &variables, |v| ops::linear(&v[0], &v[1], Some(&v[2])));
}

fn conv2d(criterion: &mut Criterion) {
    let mut group = group(criterion, "conv2d");
    let cases = [
        ([8, 32, 32, 64], 64, 3, 1),
        ([1, 32, 32, 64], 64, 3, 1),
        ([4, 128, 128, 16], 16, 3, 1),
        ([4, 128, 128, 3], 16, 3, 1),
        ([8, 32, 32, 64], 64, 3, 2),
    ];
    for (shape, out, kernel, stride) in cases {
        let [batch, height, width, channels] = shape;
        let variables = [variable("x", &shape), variable("w", &[out, kernel, kernel, channels]), variable("b", &[out])];
        let work = (2 * batch * height * width / stride / stride * out * kernel * kernel * channels) as u64;
        let case = format!("{batch}x{height}x{width}x{channels} to {out}, kernel {kernel}, stride {stride}");
        measure(&mut group, &case, (work, 2 * work), &variables, |v| {
            ops::conv2d(&v[0], &v[1], Some(&v[2]), stride, kernel / 2)
        });
    }
}

fn group_norm(criterion: &mut Criterion) {
    let mut group = group(criterion, "group_norm");
    for (name, activation) in [("plain", Activation::None), ("SiLU", Activation::Silu)] {
        let variables = [variable("x", &[8, 32, 32, 64]), variable("w", &[64]), variable("b", &[64])];
        measure(&mut group, &format!("8x32x32x64, {name}"), (8 * 32 * 32 * 64, 0), &variables, |v| {
            ops::group_norm(&v[0], 16, &v[1], &v[2], 1e-5, activation)
        });
    }
}

fn activation(criterion: &mut Criterion) {
    let mut group = group(criterion, "activation");
    for activation in [Activation::Silu, Activation::Gelu] {
        let variables = [variable("x", &[8, 32, 32, 64])];
        measure(&mut group, &format!("8x32x32x64, {activation:?}"), (8 * 32 * 32 * 64, 0), &variables, |v| {
            ops::activation(&v[0], activation)
        });
    }
}

fn upsample_nearest_2x(criterion: &mut Criterion) {
    let mut group = group(criterion, "upsample_nearest_2x");
    let variables = [variable("x", &[8, 16, 16, 64])];
    measure(&mut group, "8x16x16x64", (8 * 32 * 32 * 64, 0), &variables, |v| ops::upsample_nearest_2x(&v[0]));
}

fn resize_bilinear(criterion: &mut Criterion) {
    let mut group = group(criterion, "resize_bilinear");
    for (size, antialias) in [(112, true), (64, true), (64, false), (256, false)] {
        let variables = [variable("x", &[4, 128, 128, 3])];
        let case = format!("4x128x128x3 to {size}, antialias {antialias}");
        measure(&mut group, &case, (4 * size as u64 * size as u64 * 3, 0), &variables, |v| {
            ops::resize_bilinear(&v[0], size, size, antialias)
        });
    }
}

fn warp_affine(criterion: &mut Criterion) {
    let mut group = group(criterion, "warp_affine");
    let matrices = [[[0.9, -0.3, 20.0], [0.3, 0.9, -5.0]]; 4];
    let variables = [variable("x", &[4, 128, 128, 3])];
    measure(&mut group, "4x128x128x3 to 112", (4 * 112 * 112 * 3, 0), &variables, |v| {
        ops::warp_affine(&v[0], &matrices, 112, 112)
    });
}

criterion_group!(benches, linear, conv2d, group_norm, activation, upsample_nearest_2x, resize_bilinear, warp_affine);
criterion_main!(benches);

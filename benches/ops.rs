//! How long each operation takes, forward and with its backward pass: on the CPU at the sizes of the miniature, in f32;
//! with `--features cuda` on the GPU at those of SDXL at 1024 pixels, batch 2, in bf16.
//!
//! `cargo bench --bench ops` runs all; `cargo bench --bench ops -- conv2d` one group. Where a group has a throughput,
//! an element is one floating-point operation, so criterion's `Gelem/s` are GFLOP/s; for the others it is one number of
//! the output. The weights are trained on the CPU, as the miniature's were, and frozen on the GPU, as SDXL's are: a
//! backward pass of a product counts two products of the forward pass's size on the CPU, one on the GPU.

mod support;

use candle_core::{DType, Device, Tensor, Var};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use lcm_lookahead::Result;
use lcm_lookahead::ops::{self, Activation, Mask};
use lcm_lookahead::random::Address;
use support::{DTYPE, ON_GPU, quick_group as group};

/// Where the operations run.
fn device() -> Device {
    // candle's tensors on one GPU work together only where they come from one opening of it.
    static DEVICE: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    DEVICE.get_or_init(support::device).clone()
}

fn variable(purpose: &'static str, shape: &[usize]) -> Var {
    let values = Address::new(3, purpose).normal(shape, DType::F32, &Device::Cpu).expect("random numbers");
    let values = values.to_dtype(DTYPE).and_then(|values| values.to_device(&device()));
    Var::from_tensor(&values.expect("a copy")).expect("a variable")
}

/// What the throughput of a case counts.
#[derive(Clone, Copy)]
enum Work {
    /// Floating-point operations of the forward pass; the backward pass has so many times as many.
    Operations(usize, f64),
    /// Numbers of the output.
    Numbers(usize),
}

/// The work of a product of an input with weights.
fn product(operations: usize) -> Work {
    Work::Operations(operations, if ON_GPU { 1.0 } else { 2.0 })
}

/// Times a function of inputs and weights: the values alone, and values with the gradients of the inputs and, on the
/// CPU, of the weights.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    case: &str,
    work: Work,
    inputs: &[Var],
    weights: &[Var],
    function: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let detached = |variables: &[Var]| variables.iter().map(Var::as_detached_tensor).collect::<Vec<_>>();
    let tracked = |variables: &[Var]| variables.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>();
    let frozen = [detached(inputs), detached(weights)].concat();
    let trained = [tracked(inputs), if ON_GPU { detached(weights) } else { tracked(weights) }].concat();
    let (forward, both) = match work {
        Work::Operations(forward, backward) => (forward as u64, (forward as f64 * (1.0 + backward)) as u64),
        Work::Numbers(numbers) => (numbers as u64, numbers as u64),
    };
    let device = device();
    group.throughput(Throughput::Elements(forward));
    group.bench_function(format!("{case} forward"), |bencher| support::time(bencher, &device, || function(&frozen)));
    group.throughput(Throughput::Elements(both));
    group.bench_function(format!("{case} forward and backward"), |bencher| {
        support::time(bencher, &device, || Ok(function(&trained)?.backward()?));
    });
}

fn linear(criterion: &mut Criterion) {
    let mut group = group(criterion, "linear");
    let cases: &[(usize, usize, usize)] = match ON_GPU {
        false => &[(8192, 128, 128)],
        // The projections, and both layers of the feed-forward network.
        true => &[(8192, 640, 640), (2048, 1280, 1280), (8192, 640, 5120), (2048, 1280, 10240), (2048, 5120, 1280)],
    };
    for &(rows, channels, out) in cases {
        let weights = [variable("w", &[out, channels]), variable("b", &[out])];
        let (case, work) = (format!("{rows}x{channels} to {out}"), product(2 * rows * channels * out));
        measure(&mut group, &case, work, &[variable("x", &[rows, channels])], &weights, |v| {
            ops::linear(&v[0], &v[1], Some(&v[2]))
        });
    }
}

fn conv2d(criterion: &mut Criterion) {
    let mut group = group(criterion, "conv2d");
    let cases: &[([usize; 4], usize, usize, usize)] = match ON_GPU {
        false => &[
            ([8, 32, 32, 64], 64, 3, 1),
            ([1, 32, 32, 64], 64, 3, 1),
            ([4, 128, 128, 16], 16, 3, 1),
            ([4, 128, 128, 3], 16, 3, 1),
            ([8, 32, 32, 64], 64, 3, 2),
        ],
        true => &[
            ([2, 128, 128, 320], 320, 3, 1),
            ([2, 128, 128, 320], 320, 3, 2),
            ([2, 128, 128, 640], 320, 3, 1),
            ([2, 64, 64, 640], 640, 3, 1),
            ([2, 32, 32, 1280], 1280, 3, 1),
            ([2, 32, 32, 2560], 1280, 3, 1),
            ([2, 128, 128, 4], 320, 3, 1),
        ],
    };
    for &(shape, out, kernel, stride) in cases {
        let [batch, height, width, channels] = shape;
        let weights = [variable("w", &[out, kernel, kernel, channels]), variable("b", &[out])];
        let work = 2 * batch * height * width / stride / stride * out * kernel * kernel * channels;
        let case = format!("{batch}x{height}x{width}x{channels} to {out}, kernel {kernel}, stride {stride}");
        measure(&mut group, &case, product(work), &[variable("x", &shape)], &weights, |v| {
            ops::conv2d(&v[0], &v[1], Some(&v[2]), stride, kernel / 2)
        });
    }
}

/// Extended self-attention: as many reference keys as own ones.
fn attention(criterion: &mut Criterion) {
    let mut group = group(criterion, "attention");
    let cases: &[(usize, usize, usize, usize)] = match ON_GPU {
        false => &[(4, 4, 256, 16)],
        true => &[(4, 10, 4096, 64), (4, 20, 1024, 64), (2, 10, 4096, 64), (2, 20, 1024, 64)],
    };
    for &(batch, heads, tokens, width) in cases {
        let inputs = ["q", "k", "v", "k2", "v2"].map(|name| variable(name, &[batch, tokens, heads * width]));
        let work = Work::Operations(4 * batch * heads * tokens * 2 * tokens * width, 2.5);
        let case = format!("{batch} samples, {heads} heads of {width}, {tokens} + {tokens} keys");
        measure(&mut group, &case, work, &inputs, &[], |v| {
            ops::attention(&v[0], (&v[1], &v[2]), Some((&v[3], &v[4])), heads, Mask::None)
        });
    }
}

/// Cross-attention to the text, whose keys and values are frozen, and to the image tokens.
fn cross_attention(criterion: &mut Criterion) {
    let mut group = group(criterion, "cross_attention");
    let cases: &[(usize, usize, usize, usize, usize)] = match ON_GPU {
        false => &[(4, 4, 256, 16, 4)],
        true => &[(2, 10, 4096, 64, 16), (2, 20, 1024, 64, 16)],
    };
    for &(batch, heads, tokens, width, image) in cases {
        let tokens_of = |name, count| variable(name, &[batch, count, heads * width]);
        let inputs = [tokens_of("q", tokens), tokens_of("k2", image), tokens_of("v2", image)];
        let text = [tokens_of("k", 77).as_detached_tensor(), tokens_of("v", 77).as_detached_tensor()];
        let case = format!("{batch} samples, {heads} heads of {width}, {tokens} queries, 77 + {image} keys");
        measure(&mut group, &case, Work::Numbers(batch * tokens * heads * width), &inputs, &[], |v| {
            ops::cross_attention(&v[0], (&text[0], &text[1]), Some(((&v[1], &v[2]), 1.0)), heads)
        });
    }
}

fn group_norm(criterion: &mut Criterion) {
    let mut group = group(criterion, "group_norm");
    let cases: &[([usize; 4], usize)] = match ON_GPU {
        false => &[([8, 32, 32, 64], 16)],
        true => &[([2, 128, 128, 320], 32), ([2, 64, 64, 640], 32), ([2, 32, 32, 1280], 32)],
    };
    for &(shape, groups) in cases {
        for (name, activation) in [("plain", Activation::None), ("SiLU", Activation::Silu)] {
            let weights = [variable("w", &shape[3..]), variable("b", &shape[3..])];
            let case = format!("{}, {name}", by(&shape));
            measure(&mut group, &case, numbers(&shape), &[variable("x", &shape)], &weights, |v| {
                ops::group_norm(&v[0], groups, &v[1], &v[2], 1e-5, activation)
            });
        }
    }
}

fn layer_norm(criterion: &mut Criterion) {
    let mut group = group(criterion, "layer_norm");
    let cases: &[[usize; 2]] = if ON_GPU { &[[8192, 640], [2048, 1280]] } else { &[[1024, 128]] };
    for shape in cases {
        let weights = [variable("w", &shape[1..]), variable("b", &shape[1..])];
        measure(&mut group, &by(shape), numbers(shape), &[variable("x", shape)], &weights, |v| {
            ops::layer_norm(&v[0], &v[1], &v[2], 1e-5)
        });
    }
}

fn geglu(criterion: &mut Criterion) {
    let mut group = group(criterion, "geglu");
    let cases: &[[usize; 2]] = if ON_GPU { &[[8192, 5120], [2048, 10240]] } else { &[[1024, 1024]] };
    for &shape in cases {
        let work = Work::Numbers(shape[0] * shape[1] / 2);
        measure(&mut group, &by(&shape), work, &[variable("x", &shape)], &[], |v| ops::geglu(&v[0]));
    }
}

fn activation(criterion: &mut Criterion) {
    let mut group = group(criterion, "activation");
    let shape = if ON_GPU { [2, 128, 128, 320] } else { [8, 32, 32, 64] };
    for activation in [Activation::Silu, Activation::Gelu] {
        let case = format!("{}, {activation:?}", by(&shape));
        measure(&mut group, &case, numbers(&shape), &[variable("x", &shape)], &[], |v| {
            ops::activation(&v[0], activation)
        });
    }
}

fn upsample_nearest_2x(criterion: &mut Criterion) {
    let mut group = group(criterion, "upsample_nearest_2x");
    let shape = if ON_GPU { [2, 64, 64, 640] } else { [8, 16, 16, 64] };
    let work = Work::Numbers(4 * shape.iter().product::<usize>());
    measure(&mut group, &by(&shape), work, &[variable("x", &shape)], &[], |v| ops::upsample_nearest_2x(&v[0]));
}

fn resize_bilinear(criterion: &mut Criterion) {
    let mut group = group(criterion, "resize_bilinear");
    let (side, cases): (usize, &[(usize, bool)]) = match ON_GPU {
        false => (128, &[(112, true), (64, true), (64, false), (256, false)]),
        true => (1024, &[(112, true), (256, true), (224, false)]),
    };
    for &(size, antialias) in cases {
        let shape = [4, side, side, 3];
        let case = format!("{} to {size}, antialias {antialias}", by(&shape));
        measure(&mut group, &case, Work::Numbers(4 * size * size * 3), &[variable("x", &shape)], &[], |v| {
            ops::resize_bilinear(&v[0], size, size, antialias)
        });
    }
}

fn warp_affine(criterion: &mut Criterion) {
    let mut group = group(criterion, "warp_affine");
    let side = if ON_GPU { 1024 } else { 128 };
    let scale = side as f64 / 128.0;
    let matrices = [[[0.9 * scale, -0.3 * scale, 20.0 * scale], [0.3 * scale, 0.9 * scale, -5.0 * scale]]; 4];
    let shape = [4, side, side, 3];
    let case = format!("{} to 112", by(&shape));
    measure(&mut group, &case, Work::Numbers(4 * 112 * 112 * 3), &[variable("x", &shape)], &[], |v| {
        ops::warp_affine(&v[0], &matrices, 112, 112)
    });
}

fn numbers(shape: &[usize]) -> Work {
    Work::Numbers(shape.iter().product())
}

/// `8x32x32x64`.
fn by(shape: &[usize]) -> String {
    shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
}

criterion_group!(
    benches,
    linear,
    conv2d,
    attention,
    cross_attention,
    group_norm,
    layer_norm,
    geglu,
    activation,
    upsample_nearest_2x,
    resize_bilinear,
    warp_affine
);
criterion_main!(benches);

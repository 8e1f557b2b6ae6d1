//! Every operation on the GPU against the same operation on the CPU in f64: values and all gradients, f32 and bf16.
//!
//! Needs the feature `cuda` and a GPU; without one every test says that it was skipped.
#![cfg(feature = "cuda")]

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use candle_core::{DType, Device, Tensor, Var};
use lcm_lookahead::autograd::gradients;
use lcm_lookahead::nn::{Linear, LoraSet, Loras, Parameters, StackedLinear, Weights};
use lcm_lookahead::ops::{self, Activation, Addends, Mask};
use lcm_lookahead::random::Address;
use lcm_lookahead::{Result, cuda};

/// The GPU, or `None` and a line that says why the test was skipped. One device for all tests: matrix products are planned
/// once a device.
fn gpu() -> Option<Device> {
    static DEVICE: LazyLock<Option<Device>> = LazyLock::new(|| match cuda::open(0) {
        Ok(device) => Some(device),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    });
    DEVICE.clone()
}

fn random(purpose: &'static str, shape: &[usize]) -> Tensor {
    Address::new(11, purpose).normal(shape, DType::F64, &Device::Cpu).unwrap()
}

/// `||a - b|| / ||b||`, in f64; infinite where a number is not finite.
fn error(a: &Tensor, b: &Tensor) -> f64 {
    let numbers = |t: &Tensor| -> Vec<f64> {
        t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (numbers(a), numbers(b));
    let difference: f64 = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum();
    let norm: f64 = b.iter().map(|b| b * b).sum();
    if !difference.is_finite() {
        return f64::INFINITY;
    }
    (difference / norm.max(1e-300)).sqrt()
}

/// Value and the gradients of all inputs of a function, for a fixed random gradient of its output.
fn run(inputs: &[Tensor], function: &dyn Fn(&[Tensor]) -> Result<Tensor>) -> Result<Vec<Tensor>> {
    let variables: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<_>>()?;
    let tracked: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
    let value = function(&tracked)?;
    let seed = random("gradient of the output", value.dims()).to_dtype(value.dtype())?.to_device(value.device())?;
    let gradients = (&value * seed)?.sum_all()?.backward()?;
    let gradients = variables.iter().map(|variable| gradients.get(variable).expect("every input has one").clone());
    Ok(std::iter::once(value).chain(gradients).collect())
}

/// Compares a function on the GPU with the CPU in f64, on inputs that are exact in the dtype compared.
fn compare(name: &str, inputs: &[Tensor], function: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (dtype, limit) in [(DType::F32, 2e-5), (DType::BF16, 2e-2)] {
        let rounded: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(dtype)).collect::<candle_core::Result<_>>()?;
        let exact: Vec<Tensor> = rounded.iter().map(|t| t.to_dtype(DType::F64)).collect::<candle_core::Result<_>>()?;
        let moved: Vec<Tensor> = rounded.iter().map(|t| t.to_device(&device)).collect::<candle_core::Result<_>>()?;
        let expected = run(&exact, &function)?;
        let found = run(&moved, &function)?;
        let again = run(&moved, &function)?;
        for (i, ((found, expected), again)) in found.iter().zip(&expected).zip(&again).enumerate() {
            let what = if i == 0 { "value".to_string() } else { format!("gradient of input {}", i - 1) };
            let error = error(found, expected);
            println!("{name} {dtype:?} {what}: {error:.2e}");
            assert!(error < limit, "{name} {dtype:?}, {what}: error {error:.2e}, limit {limit:.0e}");
            assert!(self::error(again, found) < 1e-2, "{name} {dtype:?}, {what}: differs between runs");
        }
    }
    Ok(())
}

#[test]
fn linear_equals_the_cpu() -> Result<()> {
    for (rows, inner, out) in
        [(7, 12, 20), (130, 64, 96), (1, 320, 1280), (32, 272, 272), (75, 72, 168), (300, 1288, 40), (90, 640, 1000)]
    {
        let inputs = [random("x", &[2, rows, inner]), random("w", &[out, inner]), random("b", &[out])];
        compare(&format!("linear {rows} {inner} {out}"), &inputs, |t| ops::linear(&t[0], &t[1], Some(&t[2])))?;
    }
    Ok(())
}

/// Frozen layers of one input with a trainable LoRA of a rank each, which may be 0: their outputs side by side, then the
/// gradients of `x` and of all factors.
fn adapted_layers(
    (dtype, device): (DType, &Device),
    (tokens, input): (usize, usize),
    layers: &[(usize, usize)],
) -> Result<Vec<Tensor>> {
    let factors = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    // Exact in every dtype compared.
    let exact = |t: Tensor, dtype: DType| t.to_dtype(DType::BF16)?.to_dtype(dtype)?.to_device(device);
    let (parameters, mut weights, mut loras) = (Parameters::new(), HashMap::new(), Loras::none());
    let trainable = Weights::trainable(&parameters, 0, factors, device);
    for (i, (output, rank)) in layers.iter().enumerate() {
        weights.insert(format!("{i}.weight"), exact((random("w", &[*output, input]) * 0.1)?, dtype)?);
        if *rank > 0 {
            for (name, shape) in [("lora_A", [*rank, input]), ("lora_B", [*output, *rank])] {
                let value = Address::new(11, "factors").sample(i).normal(&shape[..], DType::F64, &Device::Cpu)?;
                let variable = Var::from_tensor(&exact((value * 0.3)?, factors)?)?;
                parameters.insert(format!("{i}.{name}.weight"), variable);
            }
            let set = LoraSet::load(&BTreeMap::from([(i.to_string(), vec![*output, input])]), *rank, &trainable)?;
            loras = loras.with(&set, 0.5 + i as f64);
        }
    }
    let weights = Weights::frozen("test", weights);
    let layers = layers.iter().enumerate().map(|(i, (output, _))| Linear::load(input, *output, false, &weights.pp(i)));
    let mut layers = layers.collect::<Result<Vec<_>>>()?;
    let x = Var::from_tensor(&exact(random("x", &[1, tokens, input]), dtype)?)?;
    let stacked = StackedLinear::new(&mut layers.iter_mut().collect::<Vec<_>>())?;
    let mut value = None;
    let store = gradients(|| {
        let y = match &stacked {
            Some(stacked) if layers.len() > 1 => stacked.forward(&x, &loras)?.expect("layers that go together"),
            _ => {
                let each = layers.iter().map(|layer| layer.forward_adapted(&x, &loras)).collect::<Result<Vec<_>>>()?;
                Tensor::cat(&each, 2)?
            }
        };
        value = Some(y.detach());
        Ok(Some((&y * exact(random("gradient of the output", y.dims()), dtype)?)?.sum_all()?))
    })?
    .expect("there is a loss");
    let of = |variable: &Tensor| store.get(variable).expect("every variable has a gradient").clone();
    let factors = parameters.all().into_iter().map(|(_, variable)| of(&variable));
    Ok(value.into_iter().chain([of(&x)]).chain(factors).collect())
}

#[test]
fn layers_with_a_trainable_lora_equal_the_cpu() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    type Case = ((usize, usize), &'static [(usize, usize)]);
    let cases: [Case; 8] = [
        ((70, 64), &[(96, 4)]),
        ((300, 128), &[(64, 4), (64, 4), (64, 4)]),
        ((33, 72), &[(40, 4), (8, 0), (104, 3)]),
        ((2100, 40), &[(24, 5), (48, 5), (8, 5)]),
        ((1, 8), &[(8, 1)]),
        // What goes by matrix products: larger ranks together, odd widths.
        ((50, 64), &[(32, 20)]),
        ((50, 64), &[(32, 9), (32, 8)]),
        ((50, 35), &[(21, 4), (10, 2)]),
    ];
    for (size, layers) in cases {
        let expected = adapted_layers((DType::F64, &Device::Cpu), size, layers)?;
        for (dtype, limit) in [(DType::F32, 2e-5), (DType::BF16, 2e-2)] {
            let found = adapted_layers((dtype, &device), size, layers)?;
            let again = adapted_layers((dtype, &device), size, layers)?;
            assert_eq!(found.len(), expected.len());
            for (i, ((found, expected), again)) in found.iter().zip(&expected).zip(&again).enumerate() {
                let error = error(found, expected);
                println!("LoRA {size:?} {layers:?} {dtype:?} {i}: {error:.2e}");
                assert!(error < limit, "{size:?} {layers:?} {dtype:?}, tensor {i}: error {error:.2e}");
                assert_eq!(
                    self::error(again, found),
                    0.0,
                    "{size:?} {layers:?} {dtype:?}, tensor {i} differs between runs"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn convolution_equals_the_cpu() -> Result<()> {
    for (size, input, output, kernel, stride) in [
        (8, 64, 64, 3, 1),
        (9, 16, 24, 3, 1),
        (16, 64, 128, 3, 2),
        (12, 4, 32, 3, 1),
        (8, 32, 4, 3, 1),
        (12, 64, 3, 3, 1),
        (9, 16, 21, 3, 2),
        (16, 128, 4, 1, 1),
        (8, 64, 32, 1, 1),
        (8, 272, 272, 3, 1),
        (8, 16, 272, 3, 1),
        (9, 272, 24, 3, 2),
        (8, 272, 272, 1, 1),
    ] {
        let shape = [2, size, size + 4, input];
        let weight = random("w", &[output, kernel, kernel, input]);
        let inputs = [random("x", &shape), weight, random("b", &[output])];
        compare(&format!("conv2d {size} {input} {output} {kernel} {stride}"), &inputs, |t| {
            ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, kernel / 2)
        })?;
    }
    Ok(())
}

#[test]
fn convolution_between_a_few_channels_and_many_equals_the_cpu() -> Result<()> {
    for (height, width, input, output, padding) in [
        (33, 20, 3, 128, 1),
        (16, 16, 128, 3, 1),
        (20, 35, 320, 4, 1),
        (9, 40, 4, 72, 0),
        (18, 17, 40, 1, 2),
        (5, 3, 72, 2, 1),
    ] {
        let weight = random("w", &[output, 3, 3, input]);
        let inputs = [random("x", &[2, height, width, input]), weight, random("b", &[output])];
        compare(&format!("narrow conv2d {height} {width} {input} {output} {padding}"), &inputs, |t| {
            ops::conv2d(&t[0], &t[1], Some(&t[2]), 1, padding)
        })?;
    }
    Ok(())
}

#[test]
fn convolution_padded_at_the_end_equals_the_cpu() -> Result<()> {
    for (size, input, output) in [(16, 64, 64), (8, 16, 24), (10, 4, 4)] {
        let inputs =
            [random("x", &[2, size, size + 2, input]), random("w", &[output, 3, 3, input]), random("b", &[output])];
        compare(&format!("conv2d padded at the end {size} {input} {output}"), &inputs, |t| {
            ops::conv2d_padded(&t[0], &t[1], &Addends::bias(Some(&t[2])), 2, [0, 1])
        })?;
    }
    Ok(())
}

#[test]
fn blocks_of_rectified_convolutions_equal_the_cpu_and_single_operations() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (size, channels) in [(40, 64), (9, 24), (6, 12)] {
        let weight = |factor: f64| random("w", &[channels, 3, 3, channels]).affine(0.1 * factor, 0.0);
        let (weights, bias) = ([weight(1.0)?, weight(-1.0)?, weight(0.5)?], random("b", &[channels]));
        let x = random("x", &[2, size, size + 3, channels]);
        let single = |t: &[Tensor], w: &[Tensor; 3], b: &Tensor| {
            let relu = |y: &Tensor| ops::activation(y, Activation::Relu);
            let y = relu(&ops::conv2d(&t[0], &w[0], Some(b), 1, 1)?)?;
            let y = relu(&ops::conv2d(&y, &w[1], Some(b), 1, 1)?)?;
            let addends = Addends { bias: Some(b), residual: Some(&t[0]), ..Addends::default() };
            relu(&ops::conv2d_with(&y, &w[2], &addends, 1, 1)?)
        };
        // Where a rectifier bends depends on rounding: in bf16 the reference is what single operations make of the same
        // numbers on the same GPU; in f32 it is the CPU in f64.
        for (dtype, limit) in [(DType::F32, 2e-5), (DType::BF16, 1e-2)] {
            let rounded = |t: &Tensor| t.to_dtype(dtype)?.to_dtype(DType::F64);
            let here = |t: &Tensor| t.to_dtype(dtype)?.to_device(&device);
            let (w, b) = ([here(&weights[0])?, here(&weights[1])?, here(&weights[2])?], here(&bias)?);
            let block = run(&[here(&x)?], &|t| ops::rectified_block(&t[0], [(&w[0], &b), (&w[1], &b), (&w[2], &b)]))?;
            let expected = match dtype {
                DType::BF16 => run(&[here(&x)?], &|t| single(t, &w, &b))?,
                _ => {
                    let w = [rounded(&weights[0])?, rounded(&weights[1])?, rounded(&weights[2])?];
                    let b = rounded(&bias)?;
                    run(&[rounded(&x)?], &|t| single(t, &w, &b))?
                }
            };
            for (what, (found, expected)) in ["value", "gradient"].iter().zip(block.iter().zip(&expected)) {
                let error = error(found, expected);
                println!("rectified block {size} {channels} {dtype:?} {what}: {error:.2e}");
                assert!(
                    error < limit,
                    "rectified block {size} {channels} {dtype:?}, {what}: {error:.2e}, limit {limit:.0e}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn convolution_of_64_and_128_channels_equals_the_cpu() -> Result<()> {
    for (size, input, output) in [(64, 64, 64), (40, 128, 128), (37, 64, 120), (33, 72, 56)] {
        let inputs =
            [random("x", &[3, size, size, input]), random("w", &[output, 3, 3, input]), random("b", &[output])];
        compare(&format!("conv2d {size} {input} {output}"), &inputs, |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), 1, 1))?;
    }
    Ok(())
}

#[test]
fn addends_equal_the_cpu() -> Result<()> {
    for (size, input, output, kernel) in [(16, 64, 128, 3), (8, 128, 64, 3), (8, 64, 64, 1), (9, 16, 24, 3)] {
        let weight = random("w", &[output, kernel, kernel, input]);
        let inputs = [
            random("x", &[3, size, size, input]),
            weight,
            random("b", &[output]),
            random("v", &[3, output]),
            random("r", &[3, size, size, output]),
        ];
        compare(&format!("conv2d with addends {size} {input} {output} {kernel}"), &inputs, |t| {
            let addends = Addends { bias: Some(&t[2]), per_sample: Some(&t[3]), residual: Some(&t[4]) };
            ops::conv2d_with(&t[0], &t[1], &addends, 1, kernel / 2)
        })?;
    }
    let inputs = [
        random("x", &[3, 40, 64]),
        random("w", &[96, 64]),
        random("b", &[96]),
        random("v", &[3, 96]),
        random("r", &[3, 40, 96]),
    ];
    compare("linear with addends", &inputs, |t| {
        let addends = Addends { bias: Some(&t[2]), per_sample: Some(&t[3]), residual: Some(&t[4]) };
        ops::linear_with(&t[0], &t[1], &addends)
    })
}

#[test]
fn cross_attention_to_text_and_image_tokens_equals_the_cpu() -> Result<()> {
    for (heads, width, tokens) in [(2, 64, 200), (1, 64, 1024), (2, 32, 50)] {
        let channels = heads * width;
        let inputs = [
            random("q", &[2, tokens, channels]),
            random("k", &[2, 77, channels]),
            random("v", &[2, 77, channels]),
            random("ki", &[2, 16, channels]),
            random("vi", &[2, 16, channels]),
        ];
        compare(&format!("cross-attention {heads}x{width} {tokens}"), &inputs, |t| {
            ops::cross_attention(&t[0], (&t[1], &t[2]), Some(((&t[3], &t[4]), 0.6)), heads)
        })?;
        let packed = [inputs[0].clone(), random("kv", &[2, 77, 2 * channels])];
        compare(&format!("packed cross-attention {heads}x{width} {tokens}"), &packed, |t| {
            ops::cross_attention_packed(&t[0], &t[1], None, heads)
        })?;
    }
    Ok(())
}

#[test]
fn samples_without_the_reference_equal_the_cpu() -> Result<()> {
    let inputs = [
        random("q", &[3, 150, 128]),
        random("k", &[3, 150, 128]),
        random("v", &[3, 150, 128]),
        random("k2", &[3, 130, 128]),
        random("v2", &[3, 130, 128]),
    ];
    compare("attention where", &inputs, |t| {
        ops::attention_where(&t[0], (&t[1], &t[2]), (&t[3], &t[4]), &[false, true, false], 2)
    })
}

#[test]
fn attention_over_two_sources_equals_the_cpu() -> Result<()> {
    for (batch, heads, width, tokens, own, reference, reference_batch) in [
        (2, 2, 64, 128, 128, 128, 2),
        (3, 1, 64, 100, 77, 130, 1),
        (1, 2, 64, 65, 200, 33, 1),
        (2, 3, 16, 40, 40, 64, 2),
        (2, 2, 32, 70, 16, 5, 1),
        (2, 1, 80, 33, 50, 20, 2),
    ] {
        let channels = heads * width;
        let inputs = [
            random("q", &[batch, tokens, channels]),
            random("k", &[batch, own, channels]),
            random("v", &[batch, own, channels]),
            random("k2", &[reference_batch, reference, channels]),
            random("v2", &[reference_batch, reference, channels]),
        ];
        compare(&format!("attention {batch} {heads}x{width} {tokens} {own}+{reference}"), &inputs, |t| {
            ops::attention(&t[0], (&t[1], &t[2]), Some((&t[3], &t[4])), heads, Mask::None)
        })?;
    }
    Ok(())
}

#[test]
fn plain_and_causal_attention_equal_the_cpu() -> Result<()> {
    for (heads, width, tokens, own, mask) in [
        (2, 64, 256, 256, Mask::None),
        (2, 64, 200, 77, Mask::None),
        (2, 64, 77, 77, Mask::Causal),
        (2, 32, 32, 32, Mask::Causal),
        (1, 24, 19, 19, Mask::None),
    ] {
        let channels = heads * width;
        let keys = [2, own, channels];
        let inputs = [random("q", &[2, tokens, channels]), random("k", &keys), random("v", &keys)];
        compare(&format!("attention {heads}x{width} {tokens} {own} {mask:?}"), &inputs, |t| {
            ops::attention(&t[0], (&t[1], &t[2]), None, heads, mask)
        })?;
    }
    Ok(())
}

#[test]
fn packed_self_attention_equals_the_cpu() -> Result<()> {
    for (heads, width, tokens, reference) in [(2, 64, 200, 70), (3, 16, 40, 40)] {
        let channels = heads * width;
        let inputs = [
            random("qkv", &[2, tokens, 3 * channels]),
            random("k2", &[2, reference, channels]),
            random("v2", &[2, reference, channels]),
        ];
        compare(&format!("packed attention {heads}x{width} {tokens}+{reference}"), &inputs, |t| {
            ops::attention_packed(&t[0], Some((&t[1], &t[2])), Some(&[true, false]), heads)
        })?;
        compare(&format!("packed attention {heads}x{width} {tokens}"), &inputs[..1], |t| {
            ops::attention_packed(&t[0], None, None, heads)
        })?;
    }
    Ok(())
}

#[test]
fn residual_and_norm_equal_the_cpu() -> Result<()> {
    for channels in [20, 320, 640, 768, 1280, 1664] {
        let x = [3, 5, channels];
        let inputs = [random("x", &x), random("r", &x), random("w", &[channels]), random("b", &[channels])];
        compare(&format!("add_layer_norm {channels}"), &inputs, |t| {
            let (sum, normed) = ops::add_layer_norm(&t[0], &t[1], &t[2], &t[3], 1e-5)?;
            Ok((sum * 0.7)?.add(&normed)?)
        })?;
    }
    Ok(())
}

#[test]
fn normalisations_equal_the_cpu() -> Result<()> {
    for (channels, groups, activation) in [
        (32, 8, Activation::Silu),
        (320, 32, Activation::Silu),
        (12, 3, Activation::None),
        (80, 8, Activation::Silu),
        (272, 16, Activation::Silu),
        (272, 16, Activation::None),
    ] {
        let x = (random("x", &[2, 9, 7, channels]) + 3.0)?;
        let inputs = [x, random("w", &[channels]), random("b", &[channels])];
        compare(&format!("group_norm {channels}/{groups} {activation:?}"), &inputs, |t| {
            ops::group_norm(&t[0], groups, &t[1], &t[2], 1e-5, activation)
        })?;
    }
    for channels in [20, 64, 640, 768, 1280, 1664] {
        let x = (random("x", &[3, 5, channels]) - 2.0)?;
        let inputs = [x, random("w", &[channels]), random("b", &[channels])];
        compare(&format!("layer_norm {channels}"), &inputs, |t| ops::layer_norm(&t[0], &t[1], &t[2], 1e-5))?;
    }
    Ok(())
}

#[test]
fn pointwise_operations_equal_the_cpu() -> Result<()> {
    compare("geglu", &[random("x", &[3, 10, 128])], |t| ops::geglu(&t[0]))?;
    compare("geglu, odd", &[random("x", &[3, 7, 10])], |t| ops::geglu(&t[0]))?;
    for kind in [Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::Relu] {
        compare(&format!("{kind:?}"), &[random("x", &[5, 37])], |t| ops::activation(&t[0], kind))?;
    }
    Ok(())
}

#[test]
fn the_gated_gelu_in_a_linear_layer_equals_the_cpu_and_itself() -> Result<()> {
    for (rows, inner, out) in
        [(7, 12, 5), (1, 64, 8), (130, 72, 88), (300, 640, 160), (1000, 200, 168), (257, 128, 1000)]
    {
        let inputs = [random("x", &[2, rows, inner]), random("w", &[2 * out, inner]), random("b", &[2 * out])];
        let name = format!("linear_geglu {rows} {inner} {out}");
        compare(&name, &inputs, |t| ops::linear_geglu(&t[0], &t[1], Some(&t[2])))?;
        // Where nothing is to be differentiated, another kernel does it.
        let Some(device) = gpu() else { return Ok(()) };
        for (dtype, limit) in [(DType::F32, 2e-5), (DType::BF16, 4e-3), (DType::F16, 1e-3)] {
            let rounded = inputs.each_ref().map(|t| t.to_dtype(dtype).unwrap());
            let exact = rounded.each_ref().map(|t| t.to_dtype(DType::F64).unwrap());
            let moved = rounded.each_ref().map(|t| t.to_device(&device).unwrap());
            for bias in [false, true] {
                let run = |t: &[Tensor; 3]| ops::linear_geglu(&t[0], &t[1], bias.then_some(&t[2]));
                let (found, again) = (run(&moved)?, run(&moved)?);
                let error = error(&found, &run(&exact)?);
                println!("{name} {dtype:?}: {error:.2e}");
                assert!(error < limit, "{name} {dtype:?}: error {error:.2e}, limit {limit:.0e}");
                assert_eq!(self::error(&again, &found), 0.0, "{name} {dtype:?}: differs between runs");
            }
        }
    }
    compare_large(
        "linear_geglu 2x1024 1280 5120",
        &[("x", &[2, 1024, 1280]), ("w", &[10240, 1280]), ("b", &[10240])],
        |t| {
            // Of the size that weights have: gates of hundreds would hide errors of small ones.
            ops::linear_geglu(&t[0], &(&t[1] * 0.03)?, Some(&t[2]))
        },
    )
}

#[test]
fn changes_of_size_equal_the_cpu() -> Result<()> {
    compare("upsample", &[random("x", &[2, 5, 6, 24])], |t| ops::upsample_nearest_2x(&t[0]))?;
    for (height, width, antialias) in [(7, 5, true), (24, 20, false), (4, 30, true)] {
        compare(&format!("resize {height}x{width} {antialias}"), &[random("x", &[2, 12, 16, 3])], |t| {
            ops::resize_bilinear(&t[0], height, width, antialias)
        })?;
    }
    let matrices = [[[0.7, -0.2, 2.0], [0.25, 0.8, -1.0]], [[1.3, 0.1, -3.0], [-0.1, 0.9, 4.0]]];
    compare("warp", &[random("x", &[2, 14, 13, 3])], |t| ops::warp_affine(&t[0], &matrices, 11, 12))
}

/// `||a - b|| / ||b||` of values and gradients on the GPU in bf16, against f32 there, where the CPU would take minutes.
fn compare_large(
    name: &str,
    inputs: &[(&'static str, &[usize])],
    function: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let rounded: Vec<Tensor> = inputs
        .iter()
        .map(|(_, shape)| Tensor::randn(0f32, 1.0, *shape, &device)?.to_dtype(DType::BF16))
        .collect::<candle_core::Result<_>>()?;
    let exact: Vec<Tensor> = rounded.iter().map(|t| t.to_dtype(DType::F32)).collect::<candle_core::Result<_>>()?;
    let value = |tensors: &[Tensor]| function(&tensors.iter().map(Tensor::detach).collect::<Vec<_>>());
    let (found, expected) = (value(&rounded)?, value(&exact)?);
    let error = error(&found, &expected);
    println!("{name}: {error:.2e}");
    assert!(error < 1e-2, "{name}: error {error:.2e}");
    Ok(())
}

#[test]
fn operations_of_face_networks_equal_the_cpu() -> Result<()> {
    for channels in [3, 8, 64] {
        let x = random("x", &[2, 9, 7, channels]);
        let (a, b) = (random("a", &[channels]), random("b", &[channels]));
        compare(&format!("channel_affine {channels}"), &[x.clone(), a.clone(), b], |t| {
            ops::channel_affine(&t[0], &t[1], &t[2])
        })?;
        compare(&format!("prelu {channels}"), &[x.clone(), a], |t| ops::prelu(&t[0], &t[1]))?;
        for (kernel, stride) in [(2, 2), (3, 2), (1, 2), (3, 1), (2, 3)] {
            compare(&format!("max_pool2d {channels} {kernel} {stride}"), std::slice::from_ref(&x), |t| {
                ops::max_pool2d(&t[0], kernel, stride)
            })?;
        }
        for (kernel, stride, padding) in [([3, 3], 1, 1), ([3, 3], 2, 1), ([7, 7], 1, 0), ([1, 4], 3, 2)] {
            let weight = random("w", &[kernel[0], kernel[1], channels]);
            let inputs = [x.clone(), weight, random("b", &[channels])];
            compare(&format!("depthwise_conv2d {channels} {kernel:?} {stride} {padding}"), &inputs, |t| {
                ops::depthwise_conv2d(&t[0], &t[1], Some(&t[2]), stride, padding)
            })?;
        }
    }
    compare("bicubic", &[random("x", &[2, 12, 16, 3])], |t| ops::resize_bicubic(&t[0], 7, 21))
}

#[test]
fn sums_copies_and_casts_equal_the_cpu() -> Result<()> {
    for shape in [vec![2, 5, 8], vec![3, 7, 5], vec![2, 3, 4, 24]] {
        let channels = shape[shape.len() - 1];
        let (a, b) = (random("a", &shape), random("b", &shape));
        let name = |what: &str| format!("{what} {shape:?}");
        compare(&name("add_scaled"), &[a.clone(), b.clone()], |t| ops::add_scaled(&t[0], &t[1], -0.7))?;
        compare(&name("add"), &[a.clone(), b.clone()], |t| ops::add(&t[0], &t[1]))?;
        compare(&name("scale"), std::slice::from_ref(&a), |t| ops::scale(&t[0], 1.7))?;
        compare(&name("cast"), std::slice::from_ref(&a), |t| {
            let to = if t[0].dtype() == DType::BF16 { DType::F32 } else { t[0].dtype() };
            ops::cast(&ops::scale(&ops::cast(&t[0], to)?, 0.3)?, t[0].dtype())
        })?;
        let vectors = random("v", &[shape[0], channels]);
        compare(&name("add_per_sample"), &[a.clone(), vectors], |t| ops::add_per_sample(&t[0], &t[1]))?;
        compare(&name("concat_channels"), &[a.clone(), b.clone()], |t| ops::concat_channels(&t[0], &t[1]))?;
        compare(&name("split"), &[a], |t| {
            let parts = ops::split(&t[0], &[3, channels - 3])?;
            ops::concat_channels(&ops::scale(&parts[1], 2.0)?, &parts[0])
        })?;
    }
    Ok(())
}

#[test]
fn operations_at_the_sizes_of_sdxl_equal_f32() -> Result<()> {
    for (size, input, output, stride) in [
        (128usize, 320usize, 320usize, 1usize),
        (128, 960, 320, 1),
        (64, 320, 640, 1),
        (64, 1920, 640, 1),
        (32, 640, 1280, 1),
        (32, 2560, 1280, 1),
        (64, 1280, 1280, 1),
        (128, 320, 320, 2),
        (64, 640, 640, 2),
        (128, 4, 320, 1),
        (128, 320, 4, 1),
    ] {
        let out = size / stride;
        let shapes: [(&'static str, &[usize]); 4] = [
            ("x", &[2, size, size, input]),
            ("w", &[output, 3, 3, input]),
            ("v", &[2, output]),
            ("r", &[2, out, out, output]),
        ];
        compare_large(&format!("conv2d {size} {input}->{output} /{stride}"), &shapes, |t| {
            let addends = Addends { bias: None, per_sample: Some(&t[2]), residual: Some(&t[3]) };
            ops::conv2d_with(&t[0], &t[1], &addends, stride, 1)
        })?;
    }
    for (size, channels) in [(128usize, 320usize), (128, 640), (128, 960), (64, 1920), (32, 2560), (32, 1280)] {
        let shapes: [(&'static str, &[usize]); 3] =
            [("x", &[2, size, size, channels]), ("w", &[channels]), ("b", &[channels])];
        compare_large(&format!("group_norm {size} {channels}"), &shapes, |t| {
            ops::group_norm(&t[0], 32, &t[1], &t[2], 1e-5, Activation::Silu)
        })?;
    }
    for (tokens, keys, heads) in [(4096usize, 4096usize, 10usize), (1024, 1024, 20), (4096, 77, 10), (1024, 77, 20)] {
        let channels = 64 * heads;
        let (q, k): (&[usize], &[usize]) = (&[2, tokens, channels], &[2, keys, channels]);
        compare_large(&format!("attention {tokens} {keys} {heads}"), &[("q", q), ("k", k), ("v", k)], |t| {
            ops::attention(&t[0], (&t[1], &t[2]), None, heads, Mask::None)
        })?;
    }
    for (rows, inner, out) in
        [(1024usize, 1280usize, 1280usize), (1024, 1280, 10240), (1024, 5120, 1280), (77, 2048, 1280), (1, 1280, 1280)]
    {
        let shapes: [(&'static str, &[usize]); 4] =
            [("x", &[2, rows, inner]), ("w", &[out, inner]), ("b", &[out]), ("r", &[2, rows, out])];
        compare_large(&format!("linear {rows} {inner} {out}"), &shapes, |t| {
            let addends = Addends { bias: Some(&t[2]), per_sample: None, residual: Some(&t[3]) };
            ops::linear_with(&t[0], &t[1], &addends)
        })?;
    }
    for (rows, channels) in [(4096usize, 640usize), (1024, 1280)] {
        let shapes: [(&'static str, &[usize]); 3] =
            [("x", &[2, rows, channels]), ("w", &[channels]), ("b", &[channels])];
        compare_large(&format!("layer_norm {channels}"), &shapes, |t| ops::layer_norm(&t[0], &t[1], &t[2], 1e-5))?;
        compare_large(&format!("geglu {channels}"), &[("x", &[2, rows, 8 * channels])], |t| ops::geglu(&t[0]))?;
    }
    compare_large("concat", &[("a", &[2, 64, 64, 640]), ("b", &[2, 64, 64, 320])], |t| {
        ops::concat_channels(&t[0], &t[1])
    })?;
    compare_large("upsample", &[("x", &[2, 32, 32, 1280])], |t| ops::upsample_nearest_2x(&t[0]))
}

#[test]
fn attention_over_wide_heads_equals_the_cpu() -> Result<()> {
    for (heads, width, tokens, own, reference, mask) in [
        (1, 512, 70, 70, None, Mask::None),
        (2, 264, 33, 40, None, Mask::None),
        (1, 320, 24, 24, None, Mask::Causal),
        (2, 272, 30, 20, Some((2, 16)), Mask::None),
        (1, 512, 30, 20, Some((1, 40)), Mask::None),
    ] {
        let channels = heads * width;
        let mut inputs = vec![
            random("q", &[2, tokens, channels]),
            random("k", &[2, own, channels]),
            random("v", &[2, own, channels]),
        ];
        if let Some((batch, tokens)) = reference {
            inputs.extend([random("k2", &[batch, tokens, channels]), random("v2", &[batch, tokens, channels])]);
        }
        let name = format!("attention {heads}x{width} {tokens} {own} {reference:?} {mask:?}");
        compare(&name, &inputs, |t| ops::attention(&t[0], (&t[1], &t[2]), t.get(3).zip(t.get(4)), heads, mask))?;
    }
    Ok(())
}

#[test]
fn attention_without_the_reference_in_some_samples_equals_the_cpu() -> Result<()> {
    for (heads, width) in [(2, 64), (3, 16), (1, 320)] {
        let channels = heads * width;
        let inputs = [
            random("q", &[3, 40, channels]),
            random("k", &[3, 40, channels]),
            random("v", &[3, 40, channels]),
            random("k2", &[3, 24, channels]),
            random("v2", &[3, 24, channels]),
        ];
        compare(&format!("attention_where {heads}x{width}"), &inputs, |t| {
            ops::attention_where(&t[0], (&t[1], &t[2]), (&t[3], &t[4]), &[true, false, true], heads)
        })?;
    }
    Ok(())
}

//! Linear layers: with their sums, their LoRA, and the gated GELU behind them.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use lcm_lookahead::Result;
use lcm_lookahead::autograd::{gradients, recompute, recompute_needed};
use lcm_lookahead::nn::{Conv2d, Linear, LoraSet, Loras, Parameters, StackedLinear, Weights};
use lcm_lookahead::ops::{self, Addends};
use lcm_lookahead::random::Address;

use crate::{compare, compare_large, error, gpu, random};

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
    on_tape: bool,
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
            // One by one: the layers after the first to be differentiated add their gradients of `x` to what is there.
            _ if on_tape => {
                let (layers, loras) = (layers.clone(), loras.clone());
                let segment = move |x: &[Tensor]| {
                    let mut each = layers.iter().map(|layer| layer.forward_adapted(&x[0], &loras));
                    let first = each.next().expect("a layer")?;
                    Ok(vec![each.try_fold(first, |all, next| ops::concat_channels(&all, &next?))?])
                };
                recompute_needed(&[&x], false, segment)?.swap_remove(0)
            }
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
    for ((size, layers), on_tape) in cases.into_iter().flat_map(|case| [(case, false), (case, true)]) {
        let expected = adapted_layers((DType::F64, &Device::Cpu), size, layers, false)?;
        for (dtype, limit) in [(DType::F32, 2e-5), (DType::BF16, 2e-2)] {
            let found = adapted_layers((dtype, &device), size, layers, on_tape)?;
            let again = adapted_layers((dtype, &device), size, layers, on_tape)?;
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

/// Frozen layers of one input, each with a frozen LoRA of a rank, which may be 0, whose factors have a dtype of their own.
fn frozen_layers(
    (dtype, factors, device): (DType, DType, &Device),
    input: usize,
    layers: &[(usize, usize)],
) -> Result<(Vec<Linear>, Loras)> {
    // Exact in every dtype compared.
    let exact = |t: Tensor, dtype: DType| t.to_dtype(DType::BF16)?.to_dtype(dtype)?.to_device(device);
    let (mut weights, mut loras) = (HashMap::new(), Loras::none());
    for (i, (output, rank)) in layers.iter().enumerate() {
        weights.insert(format!("{i}.weight"), exact((random("w", &[*output, input]) * 0.1)?, dtype)?);
        if *rank > 0 {
            let mut tensors = HashMap::new();
            for (name, shape) in [("lora_A", [*rank, input]), ("lora_B", [*output, *rank])] {
                let value = Address::new(11, name).sample(i).normal(&shape[..], DType::F64, &Device::Cpu)?;
                tensors.insert(format!("{i}.{name}.weight"), exact((value * 0.3)?, factors)?);
            }
            let shapes = BTreeMap::from([(i.to_string(), vec![*output, input])]);
            loras = loras.with(&LoraSet::load(&shapes, *rank, &Weights::frozen("LoRA", tensors))?, 0.5 + i as f64);
        }
    }
    let weights = Weights::frozen("test", weights);
    let layers = layers.iter().enumerate().map(|(i, (output, _))| Linear::load(input, *output, false, &weights.pp(i)));
    Ok((layers.collect::<Result<_>>()?, loras))
}

/// The largest error of a number as a part of the number, beyond the errors of f32 in sums whose terms cancel.
fn worst_relative_error(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let found = found.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let beyond = ((found - expected)?.abs()? - 1e-5)?;
    let errors = (beyond / (expected.abs()? + 1e-30)?)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(errors.into_iter().fold(0.0, |worst, error| if error.is_nan() { f64::INFINITY } else { worst.max(error) }))
}

#[test]
fn weights_with_a_frozen_lora_added_are_rounded_once() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let cases: [(usize, &[(usize, usize)]); 9] = [
        (64, &[(96, 4)]),
        (128, &[(64, 4), (64, 4), (64, 4)]),
        (72, &[(40, 4), (8, 0), (104, 3)]),
        (40, &[(24, 5), (44, 16), (9, 1)]),
        // More layers than a launch takes, odd widths, a row of several blocks of threads.
        (64, &[(16, 4), (8, 4), (24, 0), (16, 2), (16, 4), (8, 1)]),
        (35, &[(21, 4), (10, 2)]),
        (2048, &[(24, 4), (24, 4)]),
        // Larger ranks, which are matrix products.
        (64, &[(32, 20)]),
        (64, &[(32, 20), (16, 0), (32, 4)]),
    ];
    for (input, layers) in cases {
        // What the identity is mapped to are the weights.
        let identity = |dtype, device: &Device| Tensor::eye(input, DType::F32, device)?.to_dtype(dtype)?.unsqueeze(0);
        let (exact, loras) = frozen_layers((DType::F64, DType::F64, &Device::Cpu), input, layers)?;
        let x = identity(DType::F64, &Device::Cpu)?;
        let expected = exact.iter().map(|layer| layer.forward_adapted(&x, &loras)).collect::<Result<Vec<_>>>()?;
        let by_kernel = layers.iter().all(|(_, rank)| *rank <= 16);
        // Half a unit in the last place, as a part of the number.
        for (dtype, limit) in [(DType::F32, 0.0), (DType::BF16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0)] {
            let narrow = (dtype != DType::F32).then_some(dtype);
            // Products take factors of the weights' dtype only.
            let wide = (dtype == DType::F32 || by_kernel).then_some(DType::F32);
            for factors in narrow.into_iter().chain(wide) {
                let (mut frozen, loras) = frozen_layers((dtype, factors, &device), input, layers)?;
                let x = identity(dtype, &device)?;
                let alone = frozen.iter().map(|layer| layer.forward_adapted(&x, &loras)).collect::<Result<Vec<_>>>()?;
                let stacked = StackedLinear::new(&mut frozen.iter_mut().collect::<Vec<_>>())?.expect("frozen layers");
                let together = stacked.forward(&x, &loras)?.expect("frozen LoRA");
                let each = stacked.forward_each(&x, &loras)?.expect("frozen LoRA");
                let mut start = 0;
                for (i, ((alone, each), expected)) in alone.iter().zip(&each).zip(&expected).enumerate() {
                    let what = format!("LoRA {input} {layers:?} {dtype:?}, factors {factors:?}, layer {i}");
                    let part = together.narrow(2, start, layers[i].0)?;
                    start += layers[i].0;
                    for (how, found) in [("alone", alone), ("each", each), ("together", &part)] {
                        let worst = worst_relative_error(found, expected)?;
                        let norm = error(found, expected);
                        println!("{what} {how}: worst {worst:.2e}, {norm:.2e}");
                        assert!(norm < 1e-6 + 0.5 * limit, "{what} {how}: {norm:.2e}");
                        assert!(worst < 1e-6 + 1.001 * limit, "{what} {how}: worst {worst:.2e}");
                    }
                }
                if layers.iter().all(|(output, _)| *output == layers[0].0) {
                    let parts = stacked.forward_parts(&x, layers.len(), &loras)?.expect("frozen LoRA");
                    for (part, alone) in parts.iter().zip(&alone) {
                        assert_eq!(error(part, alone), 0.0, "{input} {layers:?} {dtype:?}: parts");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_frozen_lora_of_a_convolution_equals_the_cpu() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (rank, input, output) in [(4, 16, 24), (3, 5, 7), (20, 16, 24)] {
        let run = |dtype, device: &Device| -> Result<Tensor> {
            let exact = |t: Tensor| t.to_dtype(DType::BF16)?.to_dtype(dtype)?.to_device(device);
            let named = |name: &str, shape: &[usize]| -> Result<(String, Tensor)> {
                Ok((format!("conv.{name}"), exact((random("w", shape) * 0.2)?)?))
            };
            let weights = HashMap::from([named("weight", &[output, input, 3, 3])?]);
            let (down, up) = ([rank, input, 3, 3], [output, rank, 1, 1]);
            let lora = HashMap::from([named("lora_A.weight", &down)?, named("lora_B.weight", &up)?]);
            let shapes = BTreeMap::from([("conv".to_string(), vec![output, input, 3, 3])]);
            let set = LoraSet::load(&shapes, rank, &Weights::frozen("LoRA", lora))?;
            let conv = Conv2d::load(input, output, 3, 1, 1, false, &Weights::frozen("test", weights).pp("conv"))?;
            conv.forward_adapted(&exact(random("x", &[2, 6, 7, input]))?, &Loras::one(&set, 0.7))
        };
        let expected = run(DType::F64, &Device::Cpu)?;
        for (dtype, limit) in [(DType::F32, 2e-5), (DType::BF16, 1e-2), (DType::F16, 2e-3)] {
            let error = error(&run(dtype, &device)?, &expected);
            println!("LoRA of a convolution {rank} {input} {output} {dtype:?}: {error:.2e}");
            assert!(error < limit, "{rank} {input} {output} {dtype:?}: {error:.2e}");
        }
    }
    Ok(())
}

#[test]
fn gradients_that_are_added_as_they_are_written_equal_the_cpu() -> Result<()> {
    for (rows, inner, out) in [(7, 24, 40), (130, 64, 96), (257, 72, 168), (90, 640, 1000)] {
        let inputs = [
            random("x", &[2, rows, inner]),
            random("w", &[inner]),
            random("b", &[inner]),
            random("w1", &[out, inner]),
            random("w2", &[out, inner]),
        ];
        compare(&format!("layers of one normed input {rows} {inner} {out}"), &inputs, |t| {
            let segment = |t: &[Tensor]| {
                let normed = ops::layer_norm(&t[0], &t[1], &t[2], 1e-5)?;
                let (a, b) = (ops::linear(&normed, &t[3], None)?, ops::linear(&normed, &t[4], None)?);
                // The input itself as well: its gradient is there before the normalisation's.
                Ok(vec![ops::concat_channels(&ops::add(&a, &b)?, &t[0])?])
            };
            Ok(recompute(&t.iter().collect::<Vec<_>>(), segment)?.swap_remove(0))
        })?;
    }
    Ok(())
}

#[test]
fn a_recomputed_gate_equals_the_cpu() -> Result<()> {
    for (rows, inner, out) in [(33, 24, 40), (257, 128, 256)] {
        // Small enough that the gate of a gate stays within f16's range.
        let weight = (random("w", &[2 * out, inner]) * (inner as f64).powf(-0.5))?;
        let inputs = [random("x", &[2, rows, inner]), weight, random("b", &[2 * out])];
        // The gate's value leaves the segment, so that only the projection is computed again; or it is read inside.
        for read in [false, true] {
            compare(&format!("linear_geglu, recomputed {rows} {inner} {out} {read}"), &inputs, |t| {
                let segment = move |t: &[Tensor]| {
                    let gated = ops::linear_geglu(&t[0], &t[1], Some(&t[2]))?;
                    Ok(vec![if read { ops::geglu(&gated)? } else { gated }])
                };
                Ok(recompute_needed(&t.iter().collect::<Vec<_>>(), false, segment)?.swap_remove(0))
            })?;
        }
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
    // Where nothing is to be differentiated the product itself adds the residual.
    if let Some(device) = gpu() {
        for (rows, inner, out) in [(40, 64, 96), (257, 72, 168), (130, 640, 1000), (1, 16, 8)] {
            let all = [
                random("x", &[2, rows, inner]),
                random("w", &[out, inner]),
                random("b", &[out]),
                random("r", &[2, rows, out]),
            ];
            for (dtype, limit) in [(DType::F32, 2e-5), (DType::BF16, 1e-2), (DType::F16, 2e-3)] {
                let rounded = all.each_ref().map(|t| t.to_dtype(dtype).unwrap());
                let exact = rounded.each_ref().map(|t| t.to_dtype(DType::F64).unwrap());
                let moved = rounded.each_ref().map(|t| t.to_device(&device).unwrap());
                for bias in [false, true] {
                    let run = |t: &[Tensor; 4]| {
                        let addends = Addends { bias: bias.then_some(&t[2]), per_sample: None, residual: Some(&t[3]) };
                        ops::linear_with(&t[0], &t[1], &addends)
                    };
                    let error = error(&run(&moved)?, &run(&exact)?);
                    println!("linear with a residual {rows} {inner} {out} {bias} {dtype:?}: {error:.2e}");
                    assert!(error < limit, "linear with a residual {rows} {inner} {out} {bias} {dtype:?}: {error:.2e}");
                }
            }
        }
    }
    compare("linear with addends", &inputs, |t| {
        let addends = Addends { bias: Some(&t[2]), per_sample: Some(&t[3]), residual: Some(&t[4]) };
        ops::linear_with(&t[0], &t[1], &addends)
    })
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

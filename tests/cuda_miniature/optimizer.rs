//! AdamW, clipping, moving averages and their states.

use candle_core::{DType, Device, Tensor, Var};
use lcm_lookahead::Result;
use lcm_lookahead::nn::Parameters;
use lcm_lookahead::random::Address;
use lcm_lookahead::train::{AdamW, AdamWConfig, Ema, Gradients, ParameterGroup};

use crate::{error, gpu, numbers, random};

/// Lengths of the parameters: several chunks of the kernel, ragged ones, a single number.
const SHAPES: [&[usize]; 5] = [&[100, 257], &[8192], &[3, 5, 7], &[1], &[16]];

struct Run {
    device: Device,
    parameters: Parameters,
    optimizer: AdamW,
    ema: Ema,
}

impl Run {
    fn new(device: &Device) -> Result<Self> {
        let parameters = Parameters::new();
        for (i, shape) in SHAPES.iter().enumerate() {
            let value = Address::new(3, "value").sample(i).normal(*shape, DType::F32, &Device::Cpu)?;
            parameters.insert(format!("p{i}"), Var::from_tensor(&value.to_device(device)?)?);
        }
        let group = |parameters: Parameters, learning_rate, weight_decay| ParameterGroup {
            parameters,
            learning_rate,
            weight_decay,
        };
        let groups = vec![
            group(parameters.filter(|name| name < "p2"), 1e-2, 0.1),
            group(parameters.filter(|name| name >= "p2"), 3e-3, 0.0),
        ];
        let optimizer = AdamW::new(groups, AdamWConfig::default())?;
        let ema = Ema::new(&parameters, 0.9, true)?;
        Ok(Run { device: device.clone(), parameters, optimizer, ema })
    }

    /// Gradients of a step; the last parameter has one in every other step only, the second one's is bf16 on the GPU.
    fn gradients(&self, step: u64, scale: f64) -> Result<Gradients> {
        let mut gradients = Gradients::new();
        for (i, shape) in SHAPES.iter().enumerate() {
            if i == 4 && step % 2 == 1 {
                continue;
            }
            let value = Address::new(4, "gradient").step(step).sample(i).normal(*shape, DType::F32, &Device::Cpu)?;
            let mut value = (value * scale)?;
            if i == 1 {
                value = value.to_dtype(DType::BF16)?;
                if self.device.is_cpu() {
                    value = value.to_dtype(DType::F32)?;
                }
            }
            gradients.insert(format!("p{i}"), value.to_device(&self.device)?);
        }
        Ok(gradients)
    }

    fn step(&mut self, step: u64, scale: f64, max_norm: f64) -> Result<f64> {
        let norm = self.optimizer.clip_and_step(self.gradients(step, scale)?, 0.7, max_norm)?;
        self.ema.update()?;
        Ok(norm)
    }

    /// Parameters, averages and moments, by name.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all: Vec<(String, Tensor)> =
            self.parameters.all().into_iter().map(|(name, v)| (name, v.as_detached_tensor())).collect();
        let named = |prefix: &str, (name, tensor): (String, Tensor)| (format!("{prefix}.{name}"), tensor);
        all.extend(self.ema.state()?.into_iter().map(|entry| named("ema", entry)));
        all.extend(self.optimizer.state()?.into_iter().map(|entry| named("optimizer", entry)));
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }
}

fn compare(found: &Run, expected: &Run, limit: f64) -> Result<f64> {
    let mut worst = 0.0f64;
    for ((name, found), (other, expected)) in found.tensors()?.iter().zip(&expected.tensors()?) {
        assert_eq!(name, other);
        let error = error(found, expected);
        assert!(error <= limit, "{name}: error {error:.2e}, limit {limit:.0e}");
        worst = worst.max(error);
    }
    Ok(worst)
}

#[test]
fn updates_clipping_and_averages_equal_the_cpu() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let (mut on_gpu, mut on_cpu) = (Run::new(&device)?, Run::new(&Device::Cpu)?);
    for (step, (scale, max_norm)) in [(1.0, 0.0), (1.0, 5.0), (1e-4, 5.0), (30.0, 1.0), (0.5, 1e9)].iter().enumerate() {
        let norm = on_gpu.step(step as u64, *scale, *max_norm)?;
        let expected = on_cpu.step(step as u64, *scale, *max_norm)?;
        assert!((norm / expected - 1.0).abs() < 1e-6, "step {step}: norms {norm} and {expected}");
        let worst = compare(&on_gpu, &on_cpu, 2e-6)?;
        println!("optimizer, step {step}: worst error {worst:.2e}");
    }
    Ok(())
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let mut run = Run::new(&device)?;
    run.step(0, 1.0, 1.0)?;
    let before: Vec<Vec<f64>> = run.tensors()?.iter().map(|(_, tensor)| numbers(tensor)).collect();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut gradients = run.gradients(1, 1.0)?;
        gradients.insert("p3", Tensor::new(&[bad], &device)?);
        assert!(!run.optimizer.clip_and_step(gradients, 1.0, 1.0)?.is_finite());
        let after: Vec<Vec<f64>> = run.tensors()?.iter().map(|(_, tensor)| numbers(tensor)).collect();
        assert_eq!(before, after);
    }
    Ok(())
}

#[test]
fn going_on_from_a_state_is_bit_identical_and_states_do_not_change_afterwards() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let (mut straight, mut resumed) = (Run::new(&device)?, Run::new(&device)?);
    straight.step(0, 1.0, 1.0)?;
    straight.step(1, 1.0, 1.0)?;
    let (optimizer, ema) = (straight.optimizer.state()?, straight.ema.state()?);
    let moment = numbers(&optimizer["p0.exp_avg"]);
    for (name, variable) in straight.parameters.all() {
        resumed.parameters.get(&name).unwrap().set(&variable.as_detached_tensor())?;
    }
    straight.step(2, 1.0, 1.0)?;
    assert_eq!(moment, numbers(&optimizer["p0.exp_avg"]));
    resumed.optimizer.load_state("state", &optimizer)?;
    resumed.ema.load_state("state", &ema)?;
    resumed.step(2, 1.0, 1.0)?;
    compare(&resumed, &straight, 0.0)?;
    Ok(())
}

#[test]
fn a_norm_over_gradients_on_the_gpu_is_that_of_the_cpu() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let value = random("gradient", &[300, 77]);
    let norm = |device: &Device, dtype: DType| -> Result<f64> {
        let mut gradients = Gradients::new();
        gradients.insert("g", value.to_dtype(DType::BF16)?.to_dtype(dtype)?.to_device(device)?);
        gradients.clip(1.0)
    };
    let expected = norm(&Device::Cpu, DType::F32)?;
    for dtype in [DType::F32, DType::BF16] {
        assert!((norm(&device, dtype)? / expected - 1.0).abs() < 1e-6);
    }
    Ok(())
}

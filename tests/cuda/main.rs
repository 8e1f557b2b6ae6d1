//! Every operation on the GPU against the same operation on the CPU in f64: values and all gradients, f32 and bf16.
//!
//! Needs the feature `cuda` and a GPU; without one every test says that it was skipped.
#![cfg(feature = "cuda")]

mod attention;
mod convolution;
mod elementwise;
#[path = "../common/gpu.rs"]
mod gpu;
mod linear;
mod sizes_of_sdxl;

use candle_core::{DType, Device, Tensor, Var};
use gpu::{error, gpu};
use lcm_lookahead::Result;
use lcm_lookahead::random::Address;

fn random(purpose: &'static str, shape: &[usize]) -> Tensor {
    Address::new(11, purpose).normal(shape, DType::F64, &Device::Cpu).unwrap()
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
    for (dtype, limit) in [(DType::F32, 5e-6), (DType::BF16, 1e-2), (DType::F16, 1.5e-3)] {
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

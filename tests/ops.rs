//! Every operation against PyTorch: the value, and the gradient of every input.
//!
//! The fixture is made by `tests/fixtures/ops.py`, in f64.

use std::collections::HashMap;

use candle_core::{Device, Tensor, Var};
use lcm_lookahead::Result;
use lcm_lookahead::ops::{self, Activation, Mask};

/// The cases of the fixture. Images are taken channels-last, as the operations work.
struct Fixture(HashMap<String, Tensor>);

impl Fixture {
    fn open() -> Result<Self> {
        Ok(Fixture(candle_core::safetensors::load("tests/fixtures/ops.safetensors", &Device::Cpu)?))
    }

    fn get(&self, name: &str) -> Tensor {
        let tensor = self.0.get(&format!("{name}.nhwc")).or_else(|| self.0.get(name));
        tensor.unwrap_or_else(|| panic!("the fixture lacks {name}")).clone()
    }

    /// Runs an operation on the inputs of a case and compares its value and all gradients.
    fn check(&self, case: &str, inputs: &[&str], run: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
        let variables: Vec<Var> = inputs
            .iter()
            .map(|input| Ok(Var::from_tensor(&self.get(&format!("{case}.{input}")))?))
            .collect::<Result<_>>()?;
        let tensors: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
        let output = run(&tensors)?;
        self.compare(case, "output", &output)?;
        let gradients = (output * self.get(&format!("{case}.upstream")))?.sum_all()?.backward()?;
        for (input, variable) in inputs.iter().zip(&variables) {
            let name = format!("grad.{input}");
            if self.0.contains_key(&format!("{case}.{name}")) {
                let gradient = gradients.get(variable).unwrap_or_else(|| panic!("{case}: no gradient for {input}"));
                self.compare(case, &name, gradient)?;
            }
        }
        Ok(())
    }

    fn compare(&self, case: &str, name: &str, found: &Tensor) -> Result<()> {
        let expected = self.get(&format!("{case}.{name}"));
        assert_eq!(found.dims(), expected.dims(), "{case}.{name}");
        let norm = |t: &Tensor| -> Result<f64> { Ok(t.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
        let error = norm(&(found - &expected)?)? / norm(&expected)?;
        assert!(error < 1e-10, "{case}.{name}: relative error {error:.2e}");
        Ok(())
    }
}

/// PyTorch's `(out, in, height, width)` in the order of [`ops::conv2d`].
fn ohwi(weight: &Tensor) -> Result<Tensor> {
    Ok(weight.permute((0, 2, 3, 1))?)
}

#[test]
fn linear_equals_pytorchs() -> Result<()> {
    let fixture = Fixture::open()?;
    fixture.check("linear", &["input", "weight", "bias"], |t| ops::linear(&t[0], &t[1], Some(&t[2])))?;
    fixture.check("linear_lora", &["input", "weight", "lora_a", "lora_b"], |t| {
        let low = (ops::linear(&t[0], &t[2], None)? * 0.7)?;
        Ok((ops::linear(&t[0], &t[1], None)? + ops::linear(&low, &t[3], None)?)?)
    })
}

#[test]
fn conv2d_equals_pytorchs() -> Result<()> {
    let fixture = Fixture::open()?;
    for (kind, stride, padding) in [("conv2d_3x3", 1, 1), ("conv2d_3x3_stride2", 2, 1), ("conv2d_1x1", 1, 0)] {
        for size in ["odd", "even"] {
            fixture.check(&format!("{kind}.{size}"), &["input", "weight", "bias"], |t| {
                ops::conv2d(&t[0], &ohwi(&t[1])?, Some(&t[2]), stride, padding)
            })?;
        }
    }
    Ok(())
}

#[test]
fn attention_equals_pytorchs_on_concatenated_keys_and_values() -> Result<()> {
    let fixture = Fixture::open()?;
    let inputs = ["query", "key", "value"];
    for (case, mask) in [("attention", Mask::None), ("attention_causal", Mask::Causal), ("attention_cross", Mask::None)]
    {
        fixture.check(case, &inputs, |t| ops::attention(&t[0], (&t[1], &t[2]), None, 2, mask))?;
    }
    fixture.check("attention_extended", &["query", "key", "value", "extra_key", "extra_value"], |t| {
        ops::attention(&t[0], (&t[1], &t[2]), Some((&t[3], &t[4])), 2, Mask::None)
    })
}

#[test]
fn norms_equal_pytorchs() -> Result<()> {
    let fixture = Fixture::open()?;
    let inputs = ["input", "weight", "bias"];
    fixture.check("group_norm", &inputs, |t| ops::group_norm(&t[0], 3, &t[1], &t[2], 1e-6, Activation::None))?;
    fixture.check("group_norm_silu", &inputs, |t| ops::group_norm(&t[0], 3, &t[1], &t[2], 1e-5, Activation::Silu))?;
    fixture.check("layer_norm", &inputs, |t| ops::layer_norm(&t[0], &t[1], &t[2], 1e-5))
}

#[test]
fn activations_equal_pytorchs() -> Result<()> {
    let fixture = Fixture::open()?;
    fixture.check("geglu", &["input"], |t| ops::geglu(&t[0]))?;
    fixture.check("gelu", &["input"], |t| ops::activation(&t[0], Activation::Gelu))?;
    fixture.check("silu", &["input"], |t| ops::activation(&t[0], Activation::Silu))
}

#[test]
fn resampling_equals_pytorchs() -> Result<()> {
    let fixture = Fixture::open()?;
    fixture.check("upsample_nearest2x", &["input"], |t| ops::upsample_nearest_2x(&t[0]))?;
    for (kind, antialias) in [("resize_antialiased", true), ("resize_plain", false)] {
        for (direction, height, width) in [("down", 4, 3), ("up", 9, 7), ("mixed", 4, 8)] {
            fixture.check(&format!("{kind}.{direction}"), &["input"], |t| {
                ops::resize_bilinear(&t[0], height, width, antialias)
            })?;
        }
    }
    let matrices: Vec<[[f64; 3]; 2]> = fixture
        .get("warp_affine.matrix")
        .to_vec3::<f64>()?
        .iter()
        .map(|rows| std::array::from_fn(|i| std::array::from_fn(|j| rows[i][j])))
        .collect();
    fixture.check("warp_affine", &["input"], |t| ops::warp_affine(&t[0], &matrices, 5, 4))
}

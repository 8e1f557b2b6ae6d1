//! Gradients of the trainable parameters, by name.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Storage, Tensor, WithDType};
use rayon::prelude::*;

use crate::nn::Parameters;
use crate::{Error, Result};

/// Gradients of trainable parameters, by the parameters' full names.
///
/// A parameter the loss does not depend on is absent, which counts as a gradient of zero in [`norm`](Self::global_norm)
/// and [`accumulate`](Self::accumulate), and which the optimizer skips altogether (as torch skips `grad is None`).
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    tensors: BTreeMap<String, Tensor>,
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The gradients that a backward pass left for these parameters.
    pub fn extract(store: &GradStore, parameters: &Parameters) -> Self {
        let of = |(name, variable): (String, candle_core::Var)| Some((name, store.get(variable.as_tensor())?.detach()));
        Gradients { tensors: parameters.all().into_iter().filter_map(of).collect() }
    }

    /// Sets the gradient of one parameter.
    pub fn insert(&mut self, name: impl Into<String>, gradient: Tensor) {
        self.tensors.insert(name.into(), gradient);
    }

    /// The gradient of this parameter, of the parameter's shape.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// All gradients with their names, in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, gradient)| (name.as_str(), gradient))
    }

    /// How many parameters have a gradient.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether no parameter has one.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Adds other gradients, parameter by parameter.
    ///
    /// # Errors
    /// [`Error::Tensor`] where the two have different shapes for a parameter; then nothing was added.
    pub fn accumulate(&mut self, other: Gradients) -> Result<()> {
        for (name, gradient) in &other.tensors {
            if let Some(mine) = self.tensors.get(name).filter(|mine| mine.dims() != gradient.dims()) {
                return Err(shape_mismatch(name, mine.dims(), gradient));
            }
        }
        for (name, gradient) in other.tensors {
            let sum = match self.tensors.get(&name) {
                Some(mine) => (mine + gradient)?,
                None => gradient,
            };
            self.tensors.insert(name, sum);
        }
        Ok(())
    }

    /// Multiplies all gradients by a factor.
    ///
    /// # Errors
    /// Where the device runs out of memory.
    pub fn scale(&mut self, factor: f64) -> Result<()> {
        for gradient in self.tensors.values_mut() {
            *gradient = gradient.affine(factor, 0.0)?;
        }
        Ok(())
    }

    /// The Euclidean norm over all gradients together, accumulated in f64. The same on every run, for on a CPU the order
    /// of the sum does not depend on the number of threads.
    ///
    /// # Errors
    /// Where a gradient is not of a floating-point dtype or the device fails.
    pub fn global_norm(&self) -> Result<f64> {
        let mut sum = 0.0;
        for gradient in self.tensors.values() {
            sum += sum_of_squares(gradient)?;
        }
        Ok(sum.sqrt())
    }

    /// Scales the gradients down so that their norm is at most `max_norm`, and returns the norm they had before.
    ///
    /// The factor is that of `torch.nn.utils.clip_grad_norm_`: `max_norm / (norm + 1e-6)` where that is below 1. Nothing
    /// changes where `max_norm` is 0, or where the norm is not finite (the caller must look at what is returned).
    ///
    /// # Errors
    /// Those of [`global_norm`](Self::global_norm) and [`scale`](Self::scale).
    pub fn clip(&mut self, max_norm: f64) -> Result<f64> {
        let norm = self.global_norm()?;
        let factor = max_norm / (norm + 1e-6);
        if max_norm > 0.0 && norm.is_finite() && factor < 1.0 {
            self.scale(factor)?;
        }
        Ok(norm)
    }

    /// Whether no gradient holds an infinity or NaN.
    ///
    /// # Errors
    /// Those of [`global_norm`](Self::global_norm).
    pub fn is_finite(&self) -> Result<bool> {
        // Squares of finite f32 numbers are far from f64's largest, so the norm is finite exactly where all numbers are.
        Ok(self.global_norm()?.is_finite())
    }
}

/// The error of a gradient whose shape is not that of its parameter.
pub(super) fn shape_mismatch(name: &str, expected: &[usize], gradient: &Tensor) -> Error {
    Error::Tensor {
        file: "gradients".into(),
        tensor: name.to_string(),
        expected: format!("shape {expected:?}"),
        found: format!("shape {:?}", gradient.dims()),
    }
}

fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    match (tensor.device(), tensor.dtype()) {
        (Device::Cpu, DType::F32) => with_cpu_slice(tensor, |values: &[f32]| Ok(sum_of_squares_in(values))),
        (Device::Cpu, DType::F64) => with_cpu_slice(tensor, |values: &[f64]| Ok(sum_of_squares_in(values))),
        _ => Ok(tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?),
    }
}

fn sum_of_squares_in<T: WithDType>(values: &[T]) -> f64 {
    // Sums of fixed chunks, added in order: the result does not depend on which thread took which chunk.
    let sums: Vec<f64> =
        values.par_chunks(1 << 14).map(|chunk| chunk.iter().map(|value| value.to_f64().powi(2)).sum()).collect();
    sums.into_iter().sum()
}

/// Lends the numbers of a CPU tensor, in row-major order, without a copy where it is contiguous.
pub(super) fn with_cpu_slice<T: WithDType, R>(tensor: &Tensor, read: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::argument(
            "with_cpu_slice",
            "tensor",
            "a tensor on the CPU",
            format!("{:?}", tensor.device()),
        ));
    };
    let values = T::cpu_storage_as_slice(storage)?;
    let start = layout.start_offset();
    read(&values[start..start + layout.shape().elem_count()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    fn gradients(entries: &[(&str, &[f32])]) -> Gradients {
        let mut gradients = Gradients::new();
        for (name, values) in entries {
            gradients.insert(*name, Tensor::new(*values, &Device::Cpu).unwrap());
        }
        gradients
    }

    fn values(gradients: &Gradients, name: &str) -> Vec<f32> {
        gradients.get(name).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn extraction_leaves_out_parameters_the_loss_does_not_depend_on() {
        let parameters = Parameters::new();
        let used = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        parameters.insert("used", used.clone());
        parameters.insert("unused", Var::new(&[1f32], &Device::Cpu).unwrap());
        let store = used.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let gradients = Gradients::extract(&store, &parameters);
        assert_eq!(gradients.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["used"]);
        assert_eq!(values(&gradients, "used"), [2.0, 4.0]);
    }

    #[test]
    fn an_absent_gradient_counts_as_zero_when_accumulating() {
        let mut sum = gradients(&[("a", &[1.0, 2.0])]);
        sum.accumulate(gradients(&[("a", &[0.5, 0.5]), ("b", &[3.0])])).unwrap();
        sum.scale(2.0).unwrap();
        assert_eq!(values(&sum, "a"), [3.0, 5.0]);
        assert_eq!(values(&sum, "b"), [6.0]);
    }

    #[test]
    fn accumulating_other_shapes_is_refused_by_name_and_changes_nothing() {
        let mut sum = gradients(&[("a", &[1.0]), ("b", &[1.0, 2.0])]);
        let error = sum.accumulate(gradients(&[("a", &[1.0]), ("b", &[1.0])])).unwrap_err().to_string();
        assert_eq!(error, "gradients: tensor `b`: expected shape [2], found shape [1]");
        assert_eq!(values(&sum, "a"), [1.0]);
    }

    #[test]
    fn clipping_is_over_all_parameters_and_returns_the_norm_before() {
        let mut clipped = gradients(&[("a", &[3.0, 0.0]), ("b", &[4.0])]);
        assert_eq!(clipped.clip(1.0).unwrap(), 5.0);
        let norm = clipped.global_norm().unwrap();
        assert!((norm - 1.0).abs() < 1e-6, "{norm}");
        assert!((values(&clipped, "a")[0] - 0.6).abs() < 1e-6);
        assert_eq!(clipped.clone().clip(2.0).unwrap(), norm);
        assert_eq!(gradients(&[("a", &[3.0])]).clip(0.0).unwrap(), 3.0);
    }

    #[test]
    fn the_norm_is_accumulated_in_f64() {
        let many = Tensor::full(1e-3f32, 1 << 20, &Device::Cpu).unwrap();
        let mut gradients = Gradients::new();
        gradients.insert("many", many);
        let expected = f64::from(1e-3f32) * 1024.0;
        assert!((gradients.global_norm().unwrap() / expected - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_transposed_gradient_has_the_same_norm() {
        let tensor = Tensor::arange(0f64, 6.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        let mut gradients = Gradients::new();
        gradients.insert("t", tensor.t().unwrap().narrow(0, 1, 2).unwrap());
        assert_eq!(gradients.global_norm().unwrap(), (1.0f64 + 16.0 + 4.0 + 25.0).sqrt());
    }

    #[test]
    fn infinities_and_nan_are_noticed() {
        assert!(gradients(&[("a", &[1e38, -1e38])]).is_finite().unwrap());
        for bad in [f32::NAN, f32::INFINITY] {
            let mut gradients = gradients(&[("a", &[1.0, bad]), ("b", &[1.0])]);
            assert!(!gradients.is_finite().unwrap());
            assert!(!gradients.clip(1.0).unwrap().is_finite());
            assert_eq!(values(&gradients, "b"), [1.0]);
        }
    }
}

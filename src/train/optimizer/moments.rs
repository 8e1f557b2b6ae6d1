//! The moments of one parameter, and one update with them.

use candle_core::{DType, Device, Tensor, Var, WithDType};
use rayon::prelude::*;

use super::AdamWConfig;
use crate::Result;
use crate::train::gradients::with_cpu_slice;

/// The numbers of one AdamW update of one parameter.
pub(in crate::train) struct Update {
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) epsilon: f64,
    /// What is left of a parameter after weight decay.
    pub(super) keep: f64,
    /// Learning rate over the bias correction of the first moment.
    pub(super) step_size: f64,
    /// Root of the bias correction of the second moment.
    pub(super) root_correction: f64,
}

impl Update {
    /// Of the parameter's `step`-th update, counted from 1.
    pub(super) fn new(config: &AdamWConfig, learning_rate: f64, weight_decay: f64, step: u64) -> Self {
        let AdamWConfig { beta1, beta2, epsilon } = *config;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Update {
            beta1,
            beta2,
            epsilon,
            keep: 1.0 - learning_rate * weight_decay,
            step_size: learning_rate / correction(beta1),
            root_correction: correction(beta2).sqrt(),
        }
    }
}

/// First and second moment of one parameter, in f32, or f64 for an f64 parameter.
#[derive(Debug)]
pub(super) enum Moments {
    /// Of an f32 parameter on the CPU.
    F32(Vec<f32>, Vec<f32>),
    /// Of an f64 parameter on the CPU.
    F64(Vec<f64>, Vec<f64>),
    /// Of a parameter of another device or dtype.
    Tensors(Tensor, Tensor),
}

fn moment_dtype(variable: &Var) -> DType {
    if variable.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

impl Moments {
    pub(super) fn zeros(variable: &Var) -> Result<Self> {
        let count = variable.elem_count();
        Ok(match (variable.device(), variable.dtype()) {
            (Device::Cpu, DType::F32) => Moments::F32(vec![0.0; count], vec![0.0; count]),
            (Device::Cpu, DType::F64) => Moments::F64(vec![0.0; count], vec![0.0; count]),
            (device, _) => {
                let zeros = || Tensor::zeros(variable.shape(), moment_dtype(variable), device);
                Moments::Tensors(zeros()?, zeros()?)
            }
        })
    }

    /// From tensors of the variable's shape.
    pub(super) fn from_tensors(variable: &Var, first: &Tensor, second: &Tensor) -> Result<Self> {
        let place = |moment: &Tensor| moment.to_dtype(moment_dtype(variable))?.to_device(variable.device());
        let (first, second) = (place(first)?, place(second)?);
        Ok(match (variable.device(), variable.dtype()) {
            (Device::Cpu, DType::F32) => {
                Moments::F32(first.flatten_all()?.to_vec1()?, second.flatten_all()?.to_vec1()?)
            }
            (Device::Cpu, DType::F64) => {
                Moments::F64(first.flatten_all()?.to_vec1()?, second.flatten_all()?.to_vec1()?)
            }
            _ => Moments::Tensors(first, second),
        })
    }

    /// Both moments as tensors of the variable's shape, on the CPU.
    pub(super) fn tensors(&self, variable: &Var) -> Result<(Tensor, Tensor)> {
        let shape = variable.shape();
        Ok(match self {
            Moments::F32(first, second) => {
                (Tensor::from_slice(first, shape, &Device::Cpu)?, Tensor::from_slice(second, shape, &Device::Cpu)?)
            }
            Moments::F64(first, second) => {
                (Tensor::from_slice(first, shape, &Device::Cpu)?, Tensor::from_slice(second, shape, &Device::Cpu)?)
            }
            // Copies: an update changes the moments in place.
            Moments::Tensors(first, second) => (on_cpu(first)?, on_cpu(second)?),
        })
    }

    /// Updates the moments and the variable. The gradient has the variable's shape.
    pub(super) fn update(&mut self, variable: &Var, gradient: &Tensor, update: &Update) -> Result<()> {
        match self {
            Moments::F32(first, second) => update_on_cpu(variable, gradient, first, second, update),
            Moments::F64(first, second) => update_on_cpu(variable, gradient, first, second, update),
            Moments::Tensors(first, second) => update_by_ops(variable, gradient, first, second, update),
        }
    }
}

/// A copy on the CPU, that shares nothing with the tensor.
fn on_cpu(tensor: &Tensor) -> Result<Tensor> {
    Ok(if tensor.device().is_cpu() { tensor.copy()? } else { tensor.to_device(&Device::Cpu)? })
}

/// A number the fused update computes in.
trait Real: WithDType {
    fn root(self) -> Self;
}

impl Real for f32 {
    fn root(self) -> Self {
        self.sqrt()
    }
}

impl Real for f64 {
    fn root(self) -> Self {
        self.sqrt()
    }
}

/// Elements that one task of the fused update takes.
const CHUNK: usize = 1 << 14;

/// One pass over parameter, gradient and moments.
fn update_on_cpu<T: Real>(
    variable: &Var,
    gradient: &Tensor,
    first: &mut [T],
    second: &mut [T],
    update: &Update,
) -> Result<()> {
    let gradient = gradient.to_dtype(T::DTYPE)?.to_device(&Device::Cpu)?;
    // A copy, for a variable's own storage can only be read while it is lent.
    let mut values = with_cpu_slice(variable.as_tensor(), |values: &[T]| Ok(values.to_vec()))?;
    let [keep, step_size] = [update.keep, update.step_size].map(T::from_f64);
    let [beta2, rest1, rest2] = [update.beta2, 1.0 - update.beta1, 1.0 - update.beta2].map(T::from_f64);
    let [root_correction, epsilon] = [update.root_correction, update.epsilon].map(T::from_f64);
    with_cpu_slice(&gradient, |gradient: &[T]| {
        let chunks = values.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        let chunks = chunks.zip(first.par_chunks_mut(CHUNK)).zip(second.par_chunks_mut(CHUNK));
        chunks.for_each(|(((values, gradient), first), second)| {
            for (((value, &g), m), v) in values.iter_mut().zip(gradient).zip(first).zip(second) {
                *m = *m + (g - *m) * rest1;
                *v = *v * beta2 + g * g * rest2;
                let denominator = v.root() / root_correction + epsilon;
                *value = *value * keep - step_size * *m / denominator;
            }
        });
        Ok(())
    })?;
    variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu)?)?;
    Ok(())
}

/// The same by tensor operations, for other devices and dtypes.
fn update_by_ops(
    variable: &Var,
    gradient: &Tensor,
    first: &mut Tensor,
    second: &mut Tensor,
    update: &Update,
) -> Result<()> {
    let gradient = gradient.to_dtype(first.dtype())?.detach();
    *first = (first.affine(update.beta1, 0.0)? + gradient.affine(1.0 - update.beta1, 0.0)?)?;
    *second = (second.affine(update.beta2, 0.0)? + gradient.sqr()?.affine(1.0 - update.beta2, 0.0)?)?;
    let denominator = second.sqrt()?.affine(1.0 / update.root_correction, update.epsilon)?;
    let change = first.affine(update.step_size, 0.0)?.div(&denominator)?;
    let value = variable.as_detached_tensor().to_dtype(first.dtype())?.affine(update.keep, 0.0)?;
    variable.set(&(value - change)?.to_dtype(variable.dtype())?)?;
    Ok(())
}

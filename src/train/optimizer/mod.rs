//! AdamW over groups of parameters.

#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod moments;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};

use candle_core::{DType, Tensor, Var};

use super::config::OptimizerConfig;
use super::gradients::{Gradients, shape_mismatch};
use crate::nn::Parameters;
use crate::{Error, Result};
use moments::{Moments, Update};

/// Parameters that share a learning rate.
#[derive(Clone, Debug)]
pub struct ParameterGroup {
    /// The parameters; no other group may have them too.
    pub parameters: Parameters,
    /// Learning rate, before the schedule's factor.
    pub learning_rate: f64,
    /// Decoupled weight decay, times the learning rate per update.
    pub weight_decay: f64,
}

/// The numbers of AdamW that all groups share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment; default 0.9.
    pub beta1: f64,
    /// Decay of the second moment; default 0.999.
    pub beta2: f64,
    /// Added to the root of the second moment; default 1e-8.
    pub epsilon: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

impl From<&OptimizerConfig> for AdamWConfig {
    fn from(config: &OptimizerConfig) -> Self {
        AdamWConfig { beta1: config.adam_beta1, beta2: config.adam_beta2, epsilon: config.adam_epsilon }
    }
}

/// AdamW with decoupled weight decay, as `torch.optim.AdamW` computes it, over groups of parameters.
///
/// Moments are f32 (f64 for f64 parameters) and owned here. Each parameter counts its own updates, as in torch: one that
/// had no gradient in an update is left alone by it, weight decay included.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    groups: Vec<Group>,
    step_count: u64,
}

#[derive(Debug)]
struct Group {
    learning_rate: f64,
    weight_decay: f64,
    slots: Vec<Slot>,
}

/// One parameter and what AdamW remembers of it.
#[derive(Debug)]
struct Slot {
    name: String,
    variable: Var,
    step: u64,
    moments: Moments,
}

impl AdamW {
    /// An optimizer whose moments are zero.
    ///
    /// # Errors
    /// [`Error::Argument`] where two groups have a parameter of the same name; where the device cannot hold the moments.
    pub fn new(groups: Vec<ParameterGroup>, config: AdamWConfig) -> Result<Self> {
        let mut seen = BTreeSet::new();
        let mut made = Vec::with_capacity(groups.len());
        for group in groups {
            let mut slots = Vec::new();
            for (name, variable) in group.parameters.all() {
                if !seen.insert(name.clone()) {
                    let found = format!("`{name}` in two of them");
                    return Err(Error::argument("AdamW::new", "groups", "each parameter in one group", found));
                }
                let moments = Moments::zeros(&variable)?;
                slots.push(Slot { name, variable, step: 0, moments });
            }
            made.push(Group { learning_rate: group.learning_rate, weight_decay: group.weight_decay, slots });
        }
        Ok(AdamW { config, groups: made, step_count: 0 })
    }

    /// How many updates were made.
    pub fn step_count(&self) -> u64 {
        self.step_count
    }

    /// The groups' learning rates, before the schedule's factor.
    pub fn learning_rates(&self) -> Vec<f64> {
        self.groups.iter().map(|group| group.learning_rate).collect()
    }

    /// Updates every parameter that has a gradient, with its group's learning rate times `lr_factor`.
    ///
    /// # Errors
    /// [`Error::Tensor`] where a gradient has not its parameter's shape or belongs to no parameter of this optimizer; then
    /// nothing was updated. Otherwise where the device fails.
    pub fn step(&mut self, gradients: &Gradients, lr_factor: f64) -> Result<()> {
        self.check(gradients)?;
        #[cfg(feature = "cuda")]
        if self.is_on_gpu() {
            return self.step_on_gpu(gradients.clone(), lr_factor, 0.0).map(|_| ());
        }
        self.step_count += 1;
        for group in &mut self.groups {
            let learning_rate = group.learning_rate * lr_factor;
            for slot in &mut group.slots {
                let Some(gradient) = gradients.get(&slot.name) else { continue };
                slot.step += 1;
                let update = Update::new(&self.config, learning_rate, group.weight_decay, slot.step);
                slot.moments.update(&slot.variable, gradient, &update)?;
            }
        }
        Ok(())
    }

    /// Clips the gradients to a norm (0: not at all), as [`Gradients::clip`], and does a [`step`](Self::step) with them.
    /// Returns the norm before clipping; where it is not finite, nothing was updated. On a GPU all of it is three
    /// kernels, whatever the number of parameters.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn clip_and_step(&mut self, mut gradients: Gradients, lr_factor: f64, max_norm: f64) -> Result<f64> {
        self.check(&gradients)?;
        #[cfg(feature = "cuda")]
        if self.is_on_gpu() {
            return self.step_on_gpu(gradients, lr_factor, max_norm);
        }
        let norm = gradients.clip(max_norm)?;
        if norm.is_finite() {
            self.step(&gradients, lr_factor)?;
        }
        Ok(norm)
    }

    /// Whether the kernels take all parameters: f32, on one GPU.
    #[cfg(feature = "cuda")]
    fn is_on_gpu(&self) -> bool {
        let location = self.slots().next().map(|slot| slot.variable.device().location());
        let fits = |slot: &Slot| slot.variable.device().is_cuda() && slot.variable.dtype() == DType::F32;
        self.slots().all(|slot| fits(slot) && Some(slot.variable.device().location()) == location)
    }

    #[cfg(feature = "cuda")]
    fn step_on_gpu(&mut self, gradients: Gradients, lr_factor: f64, max_norm: f64) -> Result<f64> {
        let mut updates = Vec::new();
        for group in &self.groups {
            for slot in &group.slots {
                if let Some(gradient) = gradients.get(&slot.name) {
                    let rate = group.learning_rate * lr_factor;
                    let update = Update::new(&self.config, rate, group.weight_decay, slot.step + 1);
                    updates.push((slot, gradient.contiguous()?, update));
                }
            }
        }
        let parts: Vec<cuda::Part<'_>> = updates
            .iter()
            .filter_map(|(slot, gradient, update)| match &slot.moments {
                Moments::Tensors(first, second) => Some(cuda::Part {
                    parameter: slot.variable.as_tensor(),
                    update: Some((first, second, gradient, update)),
                    average: None,
                }),
                // On a GPU moments are always tensors.
                _ => None,
            })
            .collect();
        let norm = cuda::step(&parts, max_norm)?;
        let stepped: Vec<bool> = self.slots().map(|slot| gradients.get(&slot.name).is_some()).collect();
        // A thousand tensors are freed while the GPU works, not while the next step should begin.
        drop(parts);
        drop(updates);
        drop(gradients);
        let norm = norm.wait()?;
        if norm.is_finite() {
            self.step_count += 1;
            for (slot, stepped) in self.groups.iter_mut().flat_map(|group| &mut group.slots).zip(stepped) {
                slot.step += u64::from(stepped);
            }
        }
        Ok(norm)
    }

    fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.groups.iter().flat_map(|group| &group.slots)
    }

    fn check(&self, gradients: &Gradients) -> Result<()> {
        let mut used = 0;
        for slot in self.slots() {
            if let Some(gradient) = gradients.get(&slot.name) {
                used += 1;
                if gradient.dims() != slot.variable.dims() {
                    return Err(shape_mismatch(&slot.name, slot.variable.dims(), gradient));
                }
            }
        }
        if used == gradients.len() {
            return Ok(());
        }
        let known: BTreeSet<&str> = self.slots().map(|slot| slot.name.as_str()).collect();
        let stranger = gradients.iter().map(|(name, _)| name).find(|name| !known.contains(name)).unwrap_or_default();
        Err(Error::Tensor {
            file: "gradients".into(),
            tensor: stranger.to_string(),
            expected: "a parameter of the optimizer".into(),
            found: "none of this name".into(),
        })
    }

    /// All that is needed to go on later: per parameter `<name>.exp_avg` and `<name>.exp_avg_sq` (of the parameter's
    /// shape, f32 or f64) and `<name>.step` (i64 scalar), and the i64 scalar `step_count`.
    ///
    /// # Errors
    /// Where memory does not suffice for the copies.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        state.insert(STEP_COUNT.to_string(), integer(self.step_count)?);
        for slot in self.slots() {
            let (first, second) = slot.moments.tensors(&slot.variable)?;
            state.insert(format!("{}.exp_avg", slot.name), first);
            state.insert(format!("{}.exp_avg_sq", slot.name), second);
            state.insert(format!("{}.step", slot.name), integer(slot.step)?);
        }
        Ok(state)
    }

    /// Goes on from a [`state`](Self::state); `source` is what errors call it.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming the first tensor that is missing or has another shape; then nothing was changed. Tensors
    /// that no parameter asks for are ignored.
    pub fn load_state(&mut self, source: &str, state: &HashMap<String, Tensor>) -> Result<()> {
        let step_count = read_integer(source, state, STEP_COUNT)?;
        let mut loaded = Vec::new();
        for slot in self.slots() {
            let dims = slot.variable.dims();
            let first = read_tensor(source, state, &format!("{}.exp_avg", slot.name), dims)?;
            let second = read_tensor(source, state, &format!("{}.exp_avg_sq", slot.name), dims)?;
            let step = read_integer(source, state, &format!("{}.step", slot.name))?;
            loaded.push((Moments::from_tensors(&slot.variable, first, second)?, step));
        }
        let slots = self.groups.iter_mut().flat_map(|group| &mut group.slots);
        for (slot, (moments, step)) in slots.zip(loaded) {
            slot.moments = moments;
            slot.step = step;
        }
        self.step_count = step_count;
        Ok(())
    }
}

const STEP_COUNT: &str = "step_count";

fn integer(value: u64) -> Result<Tensor> {
    Ok(Tensor::new(value as i64, &candle_core::Device::Cpu)?)
}

/// The tensor of this name and shape, or an error that names it.
pub(super) fn read_tensor<'a>(
    source: &str,
    state: &'a HashMap<String, Tensor>,
    name: &str,
    dims: &[usize],
) -> Result<&'a Tensor> {
    let mismatch = |found: String| Error::Tensor {
        file: source.to_string(),
        tensor: name.to_string(),
        expected: format!("shape {dims:?}"),
        found,
    };
    let tensor = state.get(name).ok_or_else(|| mismatch("nothing".into()))?;
    if tensor.dims() == dims { Ok(tensor) } else { Err(mismatch(format!("shape {:?}", tensor.dims()))) }
}

/// The scalar of this name as a count, or an error that names it.
pub(super) fn read_integer(source: &str, state: &HashMap<String, Tensor>, name: &str) -> Result<u64> {
    let value = read_tensor(source, state, name, &[])?.to_dtype(DType::I64)?.to_scalar::<i64>()?;
    u64::try_from(value).map_err(|_| Error::Tensor {
        file: source.to_string(),
        tensor: name.to_string(),
        expected: "a count".into(),
        found: value.to_string(),
    })
}

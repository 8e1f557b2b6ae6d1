//! The trainable tensors of a model, by name.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use candle_core::{Tensor, Var};

use crate::{Error, Result};

/// The trainable tensors of a model, by their full names, in the order of their names.
///
/// A handle: clones share the same tensors. Layers created through
/// [`Weights::trainable`](crate::nn::Weights::trainable) put their variables here; the optimizer, the moving average
/// and the checkpoint read them from here.
#[derive(Clone, Debug, Default)]
pub struct Parameters {
    variables: Arc<RwLock<BTreeMap<String, Var>>>,
}

impl Parameters {
    /// No parameters yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Var>> {
        // A map of handles cannot be left half-written by a panic, so a poisoned lock is still good.
        self.variables.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Puts a variable in, replacing one of the same name.
    pub fn insert(&self, name: impl Into<String>, variable: Var) {
        let mut variables = self.variables.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        variables.insert(name.into(), variable);
    }

    /// The variable of this name.
    pub fn get(&self, name: &str) -> Option<Var> {
        self.read().get(name).cloned()
    }

    /// All variables with their names, in the order of the names.
    pub fn all(&self) -> Vec<(String, Var)> {
        self.read().iter().map(|(name, variable)| (name.clone(), variable.clone())).collect()
    }

    /// The variables whose name satisfies a condition: a parameter group.
    pub fn filter(&self, condition: impl Fn(&str) -> bool) -> Parameters {
        let chosen = self.all().into_iter().filter(|(name, _)| condition(name)).collect();
        Parameters { variables: Arc::new(RwLock::new(chosen)) }
    }

    /// How many tensors.
    pub fn len(&self) -> usize {
        self.read().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many numbers, over all tensors.
    pub fn element_count(&self) -> usize {
        self.read().values().map(|variable| variable.elem_count()).sum()
    }

    /// Overwrites every variable with the tensor of the same name.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming the first tensor that is missing or has another shape; then no variable was changed.
    /// Tensors that no variable asks for are ignored.
    pub fn assign(&self, source: &str, tensors: &std::collections::HashMap<String, Tensor>) -> Result<()> {
        let variables = self.all();
        let mut values = Vec::with_capacity(variables.len());
        for (name, variable) in &variables {
            let mismatch = |found: String| Error::Tensor {
                file: source.to_string(),
                tensor: name.clone(),
                expected: format!("shape {:?}", variable.dims()),
                found,
            };
            let value = tensors.get(name).ok_or_else(|| mismatch("nothing".into()))?;
            if value.dims() != variable.dims() {
                return Err(mismatch(format!("shape {:?}", value.dims())));
            }
            values.push(value.to_dtype(variable.dtype())?.to_device(variable.device())?);
        }
        for ((_, variable), value) in variables.iter().zip(&values) {
            variable.set(value)?;
        }
        Ok(())
    }
}

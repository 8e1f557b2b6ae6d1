//! The walk back along a tape.

use std::collections::HashMap;

use candle_core::{Tensor, TensorId};

use super::recording::{Note, Tape};
use crate::Result;

/// The gradients of a segment's inputs and variables.
pub struct Gradients {
    inputs: Vec<Option<Tensor>>,
    leaves: HashMap<TensorId, Tensor>,
}

impl Gradients {
    /// The gradient of the input at a position; `None` where it is constant or no part of the loss.
    pub fn input(&self, position: usize) -> Option<&Tensor> {
        self.inputs.get(position).and_then(Option::as_ref)
    }

    /// The gradient of a variable; `None` where it is no part of the loss.
    pub fn of(&self, variable: &Tensor) -> Option<&Tensor> {
        self.leaves.get(&variable.id())
    }

    /// The gradients of all inputs, and those of the tensors that segments close over in the order given.
    pub(in crate::autograd) fn into_parts(mut self, leaves: &[Tensor]) -> (Vec<Option<Tensor>>, usize) {
        let of_leaves = leaves.iter().map(|leaf| self.leaves.remove(&leaf.id()));
        self.inputs.extend(of_leaves);
        (self.inputs, self.leaves.len())
    }
}

/// The gradients of tensors: the first one is moved in, later ones are added (or come as sums with it).
#[derive(Default)]
struct Sums(HashMap<TensorId, Tensor>);

impl Sums {
    fn accumulate(&mut self, id: TensorId, gradient: Tensor) -> Result<()> {
        let sum = match self.0.remove(&id) {
            None => gradient,
            Some(sum) => crate::ops::sum(&sum, &gradient)?,
        };
        self.0.insert(id, sum);
        Ok(())
    }
}

pub(super) fn backward(tape: Tape, inputs: Vec<Option<TensorId>>, seeds: Vec<(TensorId, Tensor)>) -> Result<Gradients> {
    let mut sums = Sums::default();
    for (id, gradient) in seeds {
        sums.accumulate(id, gradient)?;
    }
    let Tape { mut notes, .. } = tape;
    // Popped, so that each note, and what it kept, is dropped before the next is looked at.
    while let Some(Note { node, inputs, outputs }) = notes.pop() {
        let gradients: Vec<Option<Tensor>> = outputs.iter().map(|(id, _)| sums.0.remove(id)).collect();
        if gradients.iter().all(Option::is_none) {
            continue;
        }
        let values: Vec<Option<Tensor>> = outputs.into_iter().map(|(_, value)| value).collect();
        // What an input has already got is offered once, where it is given several times.
        let so_far = inputs.iter().enumerate().map(|(index, id)| match id {
            Some(known) if !inputs[..index].contains(id) => sums.0.get(known).cloned(),
            _ => None,
        });
        let computed = node.backward(&values, &gradients, so_far.collect())?;
        for (id, (gradient, is_sum)) in inputs.into_iter().zip(computed) {
            let (Some(id), Some(gradient)) = (id, gradient) else { continue };
            match is_sum {
                true => drop(sums.0.insert(id, gradient.detach())),
                false => sums.accumulate(id, gradient.detach())?,
            }
        }
    }
    let mut leaves = sums.0;
    let inputs = inputs.into_iter().map(|id| leaves.remove(&id?)).collect();
    Ok(Gradients { inputs, leaves })
}

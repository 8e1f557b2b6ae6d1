//! A tape: what a segment of a network computed, noted down so that it can be differentiated without candle's graph.
//!
//! candle's backward pass fills a tensor with zeros and adds to it for the first gradient of every node, and frees
//! nothing before its end. [`record`] runs a segment whose operations are those of [`ops`](crate::ops) (anything that
//! goes through [`apply`](super::apply)) and notes them; [`Recording::backward`] walks the notes from the last to the
//! first. There the first gradient of a tensor is moved into place, later ones are added, functions whose outputs are
//! no part of the loss are passed by, and all that a function kept is freed as soon as its own backward pass is done.
//!
//! Nothing is cut silently. Every tensor that depends on one to be differentiated looks like a part of a graph to
//! candle, so whatever one of candle's operations makes of it does so too. The tape knows the tensors it made; one that
//! is part of a graph but not on the tape is an [`Error::OffTape`] where it reaches the next function or the end of the
//! segment.
//!
//! A thread has a stack of *frames* (`frames.rs`). The topmost decides what [`apply`](super::apply) does: candle's graph,
//! notes on a tape (`recording.rs`), or, in the first run of a recomputed segment, neither (`discovery.rs`).

mod backward;
mod discovery;
mod frames;
mod plan;
mod recording;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use candle_core::{Shape, Tensor, TensorId};

use crate::{Error, Result};
pub use backward::Gradients;
pub(super) use discovery::{Discovery, Kept, discover, discover_views, nested, see};
pub(super) use frames::{Mode, apart, has_frames, mode, outside, run_discovery};
pub(super) use plan::Plan;
use recording::Tape;
pub(super) use recording::{note, note_computed, note_views};

/// A segment that has been run, and can be differentiated.
pub struct Recording {
    tape: Tape,
    inputs: Vec<Option<TensorId>>,
    outputs: Vec<Tensor>,
    /// What the backward pass has to know of the outputs: ids of those to be differentiated, and shapes.
    ends: Vec<(Option<TensorId>, Shape)>,
}

impl Recording {
    /// Whether nothing is to be differentiated.
    pub(super) fn is_constant(&self) -> bool {
        self.tape.notes.is_empty() && !self.outputs.iter().any(Tensor::track_op)
    }
}

/// Runs a segment on a tape.
///
/// Gradients will be there for the `inputs` that are part of a graph (candle's or an outer tape's), and for every
/// variable that the segment closes over. All else is constant.
///
/// # Errors
/// Those of the segment; [`Error::OffTape`] where an operation of candle was used on a tensor to be differentiated.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lcm_lookahead::{autograd::tape, ops};
///
/// let weight = Var::new(&[[3f32]], &Device::Cpu)?;
/// let x = Tensor::new(&[[2f32]], &Device::Cpu)?;
/// let recording = tape::record(&[x], |x| Ok(vec![ops::linear(&x[0], &weight, None)?]))?;
/// assert_eq!(recording.outputs()[0].to_vec2::<f32>()?, [[6.0]]);
/// let gradients = recording.backward(&[Some(Tensor::new(&[[1f32]], &Device::Cpu)?)])?;
/// assert_eq!(gradients.of(&weight).unwrap().to_vec2::<f32>()?, [[2.0]]);
/// # Ok::<(), lcm_lookahead::Error>(())
/// ```
pub fn record(inputs: &[Tensor], segment: impl FnOnce(&[Tensor]) -> Result<Vec<Tensor>>) -> Result<Recording> {
    record_with(inputs, &[], Vec::new(), None, segment)
}

/// The same with tensors besides `inputs` that are known to be leaves, values kept from a first run, and what it found
/// need not be computed again.
pub(super) fn record_with(
    inputs: &[Tensor],
    leaves: &[Tensor],
    kept: Vec<Kept>,
    plan: Option<Plan>,
    segment: impl FnOnce(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<Recording> {
    let aliases = inputs.iter().map(alias).collect::<Result<Vec<_>>>()?;
    let known: HashSet<TensorId> =
        aliases.iter().filter(|alias| alias.track_op()).chain(leaves).map(Tensor::id).collect();
    let inputs = aliases.iter().map(|alias| alias.track_op().then(|| alias.id())).collect();
    let (result, mut tape) = frames::run_tape(Tape::new(known, kept, plan), || -> Result<Vec<Tensor>> {
        let outputs = segment(&aliases)?;
        drop(aliases);
        Ok(outputs)
    });
    // Asked first: the segment may have turned the error into another, or gone on without the operation.
    if let Some(function) = tape.off_tape {
        return Err(Error::OffTape { function });
    }
    let outputs = result?;
    let mut ends = Vec::with_capacity(outputs.len());
    for output in &outputs {
        ends.push((tape.classify("the end of the segment", output)?, output.shape().clone()));
    }
    Ok(Recording { tape, inputs, outputs, ends })
}

/// Another tensor with the same storage: a part of a graph if the tensor is one, so that it serves as an input of its
/// own even where the same tensor is given twice.
fn alias(tensor: &Tensor) -> Result<Tensor> {
    Ok(match tensor.track_op() {
        true => tensor.contiguous()?.reshape(tensor.shape())?,
        false => tensor.clone(),
    })
}

impl Recording {
    /// The segment's outputs.
    pub fn outputs(&self) -> Vec<Tensor> {
        self.outputs.iter().map(Tensor::detach).collect()
    }

    /// The same for the last time: the recording keeps none.
    pub(super) fn take_outputs(&mut self) -> Vec<Tensor> {
        std::mem::take(&mut self.outputs).into_iter().map(|output| output.detach()).collect()
    }

    /// The variables that the segment closes over.
    pub(super) fn variables(&self) -> &[Tensor] {
        &self.tape.variables
    }

    /// The gradients of a loss with respect to the segment's inputs and variables, from those with respect to its
    /// outputs (`None` for an output that is no part of the loss).
    ///
    /// # Errors
    /// Those of the functions' backward passes; [`Error::Argument`] for a gradient of another shape than its output.
    pub fn backward(self, gradients: &[Option<Tensor>]) -> Result<Gradients> {
        let Recording { tape, inputs, ends, .. } = self;
        if gradients.len() != ends.len() {
            let (expected, found) = (format!("{}, one an output", ends.len()), gradients.len().to_string());
            return Err(Error::argument("Recording::backward", "gradients", expected, found));
        }
        let mut seeds = Vec::new();
        for ((id, shape), gradient) in ends.into_iter().zip(gradients) {
            let Some(gradient) = gradient else { continue };
            if gradient.shape() != &shape {
                let (expected, found) = (format!("{:?}", shape.dims()), format!("{:?}", gradient.dims()));
                return Err(Error::argument("Recording::backward", "gradients", expected, found));
            }
            if let Some(id) = id {
                seeds.push((id, gradient.detach()));
            }
        }
        backward::backward(tape, inputs, seeds)
    }
}

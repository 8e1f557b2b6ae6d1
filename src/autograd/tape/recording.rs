//! Notes on a tape.

use std::collections::{HashSet, VecDeque};

use candle_core::{Tensor, TensorId};

use super::discovery::Kept;
use super::frames::{next_kept, with_tape};
use crate::autograd::function::{self, Forward, Function, Node, Output, Value};
use crate::autograd::tape;
use crate::{Error, Result};

/// One applied function.
pub(super) struct Note {
    pub node: Node,
    /// The inputs that need a gradient.
    pub inputs: Vec<Option<TensorId>>,
    /// The outputs, with their values where the function wants them again.
    pub outputs: Vec<(TensorId, Option<Tensor>)>,
}

/// What a segment computed.
#[derive(Default)]
pub(super) struct Tape {
    pub notes: Vec<Note>,
    /// The tensors to be differentiated: inputs, leaves, outputs of notes.
    known: HashSet<TensorId>,
    /// The variables that are no inputs, in the order in which they were met.
    pub variables: Vec<Tensor>,
    /// The first function that a tensor reached which is not on the tape and should be.
    pub off_tape: Option<&'static str>,
    /// Results kept from a first run, in order.
    pub kept: VecDeque<Kept>,
}

impl Tape {
    pub fn new(known: HashSet<TensorId>, kept: Vec<Kept>) -> Self {
        Tape { known, kept: kept.into(), ..Self::default() }
    }

    pub fn has(&self, id: TensorId) -> bool {
        self.known.contains(&id)
    }

    /// The tensor's id if it is to be differentiated, `None` if it is constant.
    pub fn classify(&mut self, function: &'static str, tensor: &Tensor) -> Result<Option<TensorId>> {
        if !tensor.track_op() {
            return Ok(None);
        }
        if !self.has(tensor.id()) {
            if !tensor.is_variable() {
                self.off_tape.get_or_insert(function);
                return Err(Error::OffTape { function });
            }
            self.known.insert(tensor.id());
            self.variables.push(tensor.clone());
        }
        Ok(Some(tensor.id()))
    }

    fn add(&mut self, note: Note) {
        self.known.extend(note.outputs.iter().map(|(id, _)| *id));
        self.notes.push(note);
    }
}

/// The ids of the inputs that are to be differentiated.
fn classify(function: &'static str, inputs: &[&Tensor]) -> Result<Vec<Option<TensorId>>> {
    // Called only where a tape is on top; without one nothing would be differentiated.
    with_tape(|tape| inputs.iter().map(|input| tape.classify(function, input)).collect())
        .unwrap_or(Err(Error::OffTape { function }))
}

/// [`apply_many`](crate::autograd::apply_many) on a tape.
pub(in crate::autograd) fn note(function: Box<dyn Function>, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let ids = classify(function.name(), inputs)?;
    let detached = function::detach(inputs)?;
    let tracked = ids.iter().any(Option::is_some);
    let kept = if function.keep() { next_kept(function.name(), &detached) } else { None };
    let (outputs, saved) = match kept {
        Some(kept) => {
            let Kept { outputs, saved, .. } = kept?;
            (outputs, saved)
        }
        None => {
            let Forward { outputs, saved } = tape::outside(|| function.forward(&detached))?;
            let outputs = match tracked {
                true => outputs.into_iter().map(Output::into_tracked).collect::<candle_core::Result<_>>()?,
                false => outputs.into_iter().map(Output::into_tensor).collect(),
            };
            (outputs, saved)
        }
    };
    if !tracked {
        return Ok(outputs.iter().map(Tensor::detach).collect());
    }
    let needs: Vec<bool> = ids.iter().map(Option::is_some).collect();
    let wanted = |(index, output): (usize, &Tensor)| {
        (output.id(), function.uses(Value::Output(index), &needs).then(|| output.detach()))
    };
    let noted = outputs.iter().enumerate().map(wanted).collect();
    let node = Node::new(function, detached, saved, needs);
    with_tape(|tape| tape.add(Note { node, inputs: ids, outputs: noted }));
    Ok(outputs)
}

/// Notes views of `x` that candle's own operations made.
pub(in crate::autograd) fn note_views(
    function: Box<dyn Function>,
    x: &Tensor,
    views: Vec<Tensor>,
) -> Result<Vec<Tensor>> {
    let id = classify(function.name(), &[x])?;
    if id[0].is_none() {
        return Ok(views);
    }
    // candle returns the tensor itself where the view is all of it: that is an output of its own here.
    let views = views
        .into_iter()
        .map(|view| if view.id() == x.id() { view.reshape(x.shape()) } else { Ok(view) })
        .collect::<candle_core::Result<Vec<_>>>()?;
    let outputs = views.iter().map(|view| (view.id(), None)).collect();
    let node = Node::new(function, vec![x.detach()], Vec::new(), vec![true]);
    with_tape(|tape| tape.add(Note { node, inputs: id, outputs }));
    Ok(views)
}

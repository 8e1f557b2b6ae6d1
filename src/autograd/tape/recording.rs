//! Notes on a tape.

use std::collections::{HashSet, VecDeque};

use candle_core::{Device, Tensor, TensorId};

use super::discovery::Kept;
use super::frames::{next_kept, with_tape};
use super::plan::{LeftOut, Plan, changed};
use crate::autograd::function::{self, Forward, Function, Node, Output, Saves, Value};
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

/// Stand-ins for the outputs of an operation that need not run, and what it saved where the first run kept that.
struct Hollow {
    outputs: Vec<Tensor>,
    saved: Option<Vec<Tensor>>,
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
    /// What need not be computed, as a first run found.
    plan: Option<Plan>,
    /// The outputs of operations that were left out.
    hollow: HashSet<TensorId>,
}

impl Tape {
    pub fn new(known: HashSet<TensorId>, kept: Vec<Kept>, plan: Option<Plan>) -> Self {
        Tape { known, kept: kept.into(), plan, ..Self::default() }
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

    /// Stand-ins for the outputs of the next operation, if it is one that need not run. They look like parts of a graph,
    /// have the shapes of the outputs, and take no memory: one number, repeated by a stride of 0.
    ///
    /// A segment that does other things than in its first run is computed as if there were no plan, unless something has
    /// been left out already.
    fn left_out(&mut self, name: &'static str, inputs: &[&Tensor]) -> Result<Option<Hollow>> {
        let Some(plan) = &mut self.plan else { return Ok(None) };
        let hollow = match plan.next(name, inputs) {
            Ok(Some(left_out)) => left_out,
            Ok(None) => {
                return match inputs.iter().any(|input| self.hollow.contains(&input.id())) {
                    true => Err(changed("nothing that reads its results".into(), name.into())),
                    false => Ok(None),
                };
            }
            Err(_) if self.hollow.is_empty() => {
                self.plan = None;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let device = inputs.first().map_or(&Device::Cpu, |input| input.device());
        let LeftOut { outputs, saved } = hollow;
        let outputs = outputs
            .into_iter()
            .map(|(shape, dtype)| function::number(dtype, device)?.broadcast_as(shape))
            .collect::<candle_core::Result<Vec<_>>>()?;
        self.hollow.extend(outputs.iter().map(Tensor::id));
        Ok(Some(Hollow { outputs, saved }))
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
    if let Some(hollow) = left_out(function.name(), inputs)? {
        return note_left_out(function, inputs, ids, hollow);
    }
    let detached = function::detach(inputs)?;
    let tracked = ids.iter().any(Option::is_some);
    let kept = if function.keep() { next_kept(function.name(), &detached) } else { None };
    let (outputs, saved) = match kept {
        Some(kept) => {
            let Kept { outputs, saved, .. } = kept?;
            (outputs, saved)
        }
        None => {
            let Forward { outputs, saved } = tape::outside(|| match tracked {
                true => function.forward(&detached),
                false => function.forward_alone(&detached),
            })?;
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

/// The outputs of an operation that need not run.
fn left_out(name: &'static str, inputs: &[&Tensor]) -> Result<Option<Hollow>> {
    with_tape(|tape| tape.left_out(name, inputs)).unwrap_or(Ok(None))
}

/// Notes an operation that need not run, with hollow outputs.
fn note_left_out(
    function: Box<dyn Function>,
    inputs: &[&Tensor],
    ids: Vec<Option<TensorId>>,
    Hollow { outputs, saved }: Hollow,
) -> Result<Vec<Tensor>> {
    let needs: Vec<bool> = ids.iter().map(Option::is_some).collect();
    let saves = match function.saves() {
        Saves::WithOutputs | Saves::Little => None,
        Saves::Alone(inputs) => Some(inputs),
    };
    let saved_from = |index: usize| saves.as_ref().is_some_and(|inputs| inputs.contains(&index));
    let detached = inputs.iter().enumerate().map(|(index, input)| {
        match function.uses(Value::Input(index), &needs) || saved_from(index) {
            true => input.detach().contiguous(),
            // Perhaps hollow itself.
            false => Ok(input.detach()),
        }
    });
    let detached = detached.collect::<candle_core::Result<Vec<_>>>()?;
    let saved = match (saved, saves) {
        (Some(saved), _) => saved,
        (None, Some(_)) => tape::outside(|| function.save(&detached))?,
        (None, None) => Vec::new(),
    };
    let noted = outputs.iter().map(|output| (output.id(), None)).collect();
    let node = Node::new(function, detached, saved, needs);
    with_tape(|tape| tape.add(Note { node, inputs: ids, outputs: noted }));
    Ok(outputs)
}

/// Notes a function whose outputs were computed by a first run, of which it reads neither inputs nor outputs again. What
/// that run made itself becomes the output as it is; other tensors are copied.
pub(in crate::autograd) fn note_computed(
    function: Box<dyn Function>,
    inputs: &[&Tensor],
    computed: Vec<Tensor>,
) -> Result<Vec<Tensor>> {
    let ids = classify(function.name(), inputs)?;
    let mut outputs: Vec<Tensor> = Vec::with_capacity(computed.len());
    for tensor in computed {
        let again = outputs.iter().any(|output| output.id() == tensor.id());
        outputs.push(match tensor.track_op() && !again {
            true => tensor,
            false => Output::Tensor(tensor).into_tracked()?,
        });
    }
    let noted = outputs.iter().map(|output| (output.id(), None)).collect();
    let needs = ids.iter().map(Option::is_some).collect();
    let node = Node::new(function, inputs.iter().map(|input| input.detach()).collect(), Vec::new(), needs);
    with_tape(|tape| tape.add(Note { node, inputs: ids, outputs: noted }));
    Ok(outputs)
}

/// Notes views of `x`, made by candle's own operations.
pub(in crate::autograd) fn note_views(
    function: Box<dyn Function>,
    x: &Tensor,
    views: impl FnOnce(&Tensor) -> candle_core::Result<Vec<Tensor>>,
) -> Result<Vec<Tensor>> {
    let id = classify(function.name(), &[x])?;
    if let Some(hollow) = left_out(function.name(), &[x])? {
        return note_left_out(function, &[x], id, hollow);
    }
    let views = views(x)?;
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

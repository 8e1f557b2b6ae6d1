//! Recomputation of activations: trade a second forward pass for the memory of a segment's activations.

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{Tensor, Var};

use super::function::{Backward, Forward, Function, Output, Value, apply_many};
use super::leaves;
use super::tape::{self, Discovery, Kept, Mode, Plan};
use crate::{Error, Result};

/// Runs a segment of a network without keeping its activations; they are computed again in the backward pass.
///
/// The result equals `segment(inputs)` and so do all gradients: those of `inputs`, and those of every variable that
/// the segment closes over. The first run finds the variables, so none can be forgotten. Tensors other than variables
/// that need a gradient should be passed through `inputs`; a segment that closes over one still gives exact gradients,
/// but walks that tensor's history again.
///
/// The second run is recorded on a [`tape`] where all operations of the segment are those of [`ops`](crate::ops) (or
/// go through [`apply`](super::apply)). A segment that uses candle's own operations works as well; it is then
/// differentiated by candle's graph, which takes more time and memory ([`recomputations`] tells which it was).
///
/// # Errors
/// Those of the segment.
///
/// # Example
/// ```
/// use candle_core::{Device, Var};
/// use lcm_lookahead::autograd::recompute;
///
/// let weight = Var::new(&[3f32], &Device::Cpu)?;
/// let x = Var::new(&[2f32], &Device::Cpu)?;
/// let (w, input) = (weight.clone(), x.as_tensor());
/// let y = recompute(&[input], move |x| Ok(vec![(&x[0] * w.as_tensor())?.sqr()?]))?;
/// let gradients = y[0].backward()?;
/// assert_eq!(gradients.get(&weight).unwrap().to_vec1::<f32>()?, [24.0]);
/// assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>()?, [36.0]);
/// # Ok::<(), lcm_lookahead::Error>(())
/// ```
pub fn recompute<F>(inputs: &[&Tensor], segment: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    run(inputs, (false, false), segment)
}

/// The same, but the results of expensive functions (those whose [`Function::keep`] says so: attention) are kept from
/// the first run until the first backward pass, and not computed again there. The segment must run the same operations
/// in the same order every time.
///
/// # Errors
/// Those of the segment; in the backward pass also [`Error::Argument`] where the segment runs other operations.
pub fn recompute_keeping<F>(inputs: &[&Tensor], segment: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    run(inputs, (true, false), segment)
}

/// [`recompute`], or [`recompute_keeping`] where `keeps`, without what the backward pass does not read: the last layer of
/// a segment, whose result is known from the first run, is not computed again.
///
/// The segment must run the same operations in the same order every time, and read numbers of its tensors through
/// operations only: what it would copy to the host in the second run need not be there.
///
/// # Errors
/// Those of the segment; in the backward pass also [`Error::Argument`] where the segment runs other operations.
pub fn recompute_needed<F>(inputs: &[&Tensor], keeps: bool, segment: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    run(inputs, (keeps, true), segment)
}

/// How many segments the backward passes on this thread differentiated in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recomputations {
    /// On a [`tape`].
    pub on_tape: u64,
    /// By candle's graph, because they use operations of candle's own.
    pub on_graph: u64,
}

thread_local! {
    static RECOMPUTATIONS: Cell<Recomputations> = const { Cell::new(Recomputations { on_tape: 0, on_graph: 0 }) };
}

/// How many segments the backward passes on this thread have differentiated so far.
pub fn recomputations() -> Recomputations {
    RECOMPUTATIONS.get()
}

fn run<F>(inputs: &[&Tensor], (keeps, plans): (bool, bool), segment: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    if tape::mode() == Mode::Discover {
        // The first run of a segment around this one: all of it will run again.
        return tape::nested(inputs, segment);
    }
    let mut discovery = Discovery::new(keeps, plans);
    let detached: Vec<Tensor> = inputs.iter().map(|input| discovery.input(input)).collect();
    let (outputs, mut discovery) = tape::run_discovery(discovery, || -> Result<Vec<Tensor>> {
        Ok(segment(&detached)?.iter().map(tape::see).collect())
    });
    let outputs = outputs?;
    let plan = discovery.plan();
    let Discovery { variables, off_tape, kept, .. } = discovery;
    if variables.is_empty() && !inputs.iter().any(|input| input.track_op()) {
        return Ok(outputs.iter().map(Tensor::detach).collect());
    }
    let on_tape = tape::mode() == Mode::Record;
    let (first, outputs) = if on_tape { (Some(outputs), None) } else { (None, Some(outputs)) };
    let all: Vec<Tensor> = inputs.iter().map(|input| (*input).clone()).chain(variables).collect();
    let function = Segment {
        segment,
        all: all.clone(),
        input_count: inputs.len(),
        off_tape,
        outputs: Mutex::new(outputs),
        kept: Mutex::new(if off_tape { Vec::new() } else { kept }),
        plan,
    };
    let all: Vec<&Tensor> = all.iter().collect();
    match first {
        Some(outputs) => tape::note_computed(Box::new(function), &all, outputs),
        None => apply_many(function, &all),
    }
}

struct Segment<F> {
    segment: F,
    /// The inputs, then the variables, as the caller gave them: parts of the graph around the segment.
    all: Vec<Tensor>,
    input_count: usize,
    /// Whether the first run met operations of candle's own.
    off_tape: bool,
    /// The values from the first run, until `forward` hands them out.
    outputs: Mutex<Option<Vec<Tensor>>>,
    /// Results of expensive functions, until the first backward pass.
    kept: Mutex<Vec<Kept>>,
    /// What a second run need not compute.
    plan: Option<Plan>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The slots hold whole values only, so one left by a panicking thread is still good.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<F> Segment<F>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    fn variables(&self) -> &[Tensor] {
        &self.all[self.input_count..]
    }

    /// The gradients, by a tape; `None` where the segment uses operations of candle's own.
    fn on_tape(&self, gradients: &[Option<Tensor>]) -> Result<Option<Vec<Option<Tensor>>>> {
        let kept = std::mem::take(&mut *lock(&self.kept));
        let inputs = &self.all[..self.input_count];
        let recording =
            match tape::record_with(inputs, self.variables(), kept, self.plan.clone(), |x| (self.segment)(x)) {
                Err(Error::OffTape { .. }) => return Ok(None),
                other => other?,
            };
        let (gradients, rest) = recording.backward(gradients)?.into_parts(self.variables());
        match rest {
            0 => Ok(Some(gradients)),
            _ => Err(Error::argument(
                "recompute",
                "segment",
                "one that uses the same variables every time",
                format!("{rest} that the first run did not use"),
            )),
        }
    }

    /// The gradients, by candle's graph.
    fn on_graph(&self, gradients: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        if let Some(view) = self.variables().iter().find(|variable| !variable.is_variable()) {
            return Err(Error::argument(
                "recompute",
                "segment",
                "one that gets tensors of the segment around it through its inputs, as it uses candle's operations",
                format!("a tensor of shape {:?} closed over", view.dims()),
            ));
        }
        let mut inputs = Vec::with_capacity(self.input_count);
        for input in &self.all[..self.input_count] {
            inputs.push(match input.track_op() {
                true => Var::from_tensor(&input.detach())?.into_inner(),
                false => input.clone(),
            });
        }
        let outputs = (self.segment)(&inputs)?;
        // The vector-Jacobian product as the gradient of <output, gradient>, summed over the outputs.
        let mut seed: Option<Tensor> = None;
        for (output, gradient) in outputs.iter().zip(gradients) {
            if let Some(gradient) = gradient {
                let term = (output * gradient)?.sum_all()?;
                seed = Some(match seed {
                    None => term,
                    Some(sum) => (sum + term)?,
                });
            }
        }
        let Some(seed) = seed else { return Ok(vec![None; self.all.len()]) };
        let gradients = seed.backward()?;
        Ok(inputs.iter().chain(self.variables()).map(|tensor| gradients.get(tensor).cloned()).collect())
    }
}

impl<F> Function for Segment<F>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    fn name(&self) -> &'static str {
        "recompute"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let computed = lock(&self.outputs).take();
        let outputs = match computed {
            Some(outputs) => outputs,
            None => (self.segment)(&inputs[..self.input_count])?,
        };
        Ok(Forward { outputs: outputs.into_iter().map(Output::Tensor).collect(), saved: Vec::new() })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let by_tape = if self.off_tape { None } else { self.on_tape(context.gradients)? };
        let mut counts = RECOMPUTATIONS.get();
        match by_tape {
            Some(gradients) => {
                counts.on_tape += 1;
                RECOMPUTATIONS.set(counts);
                Ok(gradients)
            }
            None => {
                counts.on_graph += 1;
                RECOMPUTATIONS.set(counts);
                leaves::suspended(|| self.on_graph(context.gradients))
            }
        }
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        // It has the inputs as parts of the graph, in `all`.
        false
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::random::Address;

    #[test]
    fn recomputed_gradients_equal_plain_ones_bit_for_bit() -> Result<()> {
        let random = |purpose, shape: (usize, usize)| -> Result<Var> {
            Ok(Var::from_tensor(&Address::new(1, purpose).normal(shape, DType::F64, &Device::Cpu)?)?)
        };
        let (x, w1, w2, side) =
            (random("x", (3, 4))?, random("w1", (4, 4))?, random("w2", (4, 4))?, random("s", (3, 4))?);
        let run = |on: bool| -> Result<Vec<Vec<f64>>> {
            let (v1, v2) = (w1.clone(), w2.clone());
            let segment = move |x: &[Tensor]| -> Result<Vec<Tensor>> {
                let hidden = x[0].matmul(&v1)?.tanh()?;
                Ok(vec![(hidden.matmul(&v2)? + &x[1])?, hidden])
            };
            let inputs = [x.as_tensor(), side.as_tensor()];
            let outputs = if on { recompute(&inputs, segment)? } else { segment(&inputs.map(Tensor::clone))? };
            let loss = (outputs[0].sqr()?.sum_all()? + outputs[1].powf(3.0)?.sum_all()?)?;
            let gradients = loss.backward()?;
            [&x, &w1, &w2, &side]
                .iter()
                .map(|v| Ok(gradients.get(v).unwrap().flatten_all()?.to_vec1::<f64>()?))
                .collect()
        };
        let (plain, recomputed) = (run(false)?, run(true)?);
        for (a, b) in plain.iter().flatten().zip(recomputed.iter().flatten()) {
            assert!((a - b).abs() <= 1e-12 * a.abs().max(1.0), "{a} and {b}");
        }
        Ok(())
    }

    #[test]
    fn an_output_that_is_not_used_costs_no_gradient() -> Result<()> {
        let x = Var::new(&[2f64, 3.], &Device::Cpu)?;
        let outputs = recompute(&[x.as_tensor()], |x| Ok(vec![x[0].sqr()?, (&x[0] * 5.)?]))?;
        let gradients = outputs[1].sum_all()?.backward()?;
        assert_eq!(gradients.get(&x).unwrap().to_vec1::<f64>()?, [5., 5.]);
        Ok(())
    }
}

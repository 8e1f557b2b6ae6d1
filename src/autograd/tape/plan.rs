//! What of a recomputed segment need not be computed again: results that its backward pass does not read.
//!
//! The first run notes the operations with their tensors. Walked from the last to the first, they tell whose numbers are
//! read by a backward pass, or by an operation that has to run. The others (the last layer of a segment, whose result is
//! known since the first run) are left out: their outputs have a shape, but no numbers of their own.

use std::collections::HashSet;
use std::sync::Arc;

use candle_core::{DType, Shape, Tensor, TensorId};

use crate::autograd::function::{Function, Saves, Value};
use crate::{Error, Result};

/// One operation of a first run.
struct Operation {
    name: &'static str,
    /// The inputs, and whether they are read even if the operation does not run: by its backward pass, or for what it saves.
    inputs: Vec<(TensorId, Shape, bool)>,
    outputs: Vec<(TensorId, Shape, DType)>,
    /// Whether it has to run whoever reads its outputs.
    must_run: bool,
    /// What it saved, where that is little.
    saved: Option<Vec<Tensor>>,
}

/// The operations of a first run.
#[derive(Default)]
pub(super) struct Trace(Vec<Operation>);

impl Trace {
    /// Notes an operation. One that is constant runs in any case: what candle's operations make of its outputs is not
    /// seen. So does one that saves something which cannot be had alone, or whose results are kept.
    pub fn add(
        &mut self,
        function: &dyn Function,
        needs: &[bool],
        saved: Vec<Tensor>,
        inputs: &[(TensorId, Shape)],
        outputs: &[Tensor],
    ) {
        let reads_output = (0..outputs.len()).any(|index| function.uses(Value::Output(index), needs));
        let (saves, saved_from, saved) = match function.saves() {
            Saves::WithOutputs => (!saved.is_empty(), Vec::new(), None),
            Saves::Alone(inputs) => (false, inputs, None),
            Saves::Little => (false, Vec::new(), Some(saved)),
        };
        let read = |(index, (id, shape)): (usize, &(TensorId, Shape))| {
            (*id, shape.clone(), function.uses(Value::Input(index), needs) || saved_from.contains(&index))
        };
        self.0.push(Operation {
            name: function.name(),
            inputs: inputs.iter().enumerate().map(read).collect(),
            outputs: outputs.iter().map(|output| (output.id(), output.shape().clone(), output.dtype())).collect(),
            must_run: saves || reads_output || function.keep() || !needs.contains(&true),
            saved,
        });
    }

    /// What a second run is to do; `None` where all of it has to run.
    pub fn plan(self) -> Option<Plan> {
        let mut read: HashSet<TensorId> = HashSet::new();
        let mut steps = Vec::with_capacity(self.0.len());
        for Operation { name, inputs, outputs, must_run, saved } in self.0.into_iter().rev() {
            let runs = must_run || outputs.iter().any(|(id, ..)| read.contains(id));
            read.extend(inputs.iter().filter(|(_, _, anyway)| runs || *anyway).map(|(id, ..)| *id));
            steps.push(Step {
                name,
                inputs: inputs.into_iter().map(|(_, shape, _)| shape).collect(),
                left_out: (!runs).then(|| LeftOut {
                    outputs: outputs.into_iter().map(|(_, shape, dtype)| (shape, dtype)).collect(),
                    saved,
                }),
            });
        }
        steps.reverse();
        steps.iter().any(|step| step.left_out.is_some()).then(|| Plan { steps: steps.into(), next: 0 })
    }
}

struct Step {
    name: &'static str,
    inputs: Vec<Shape>,
    left_out: Option<LeftOut>,
}

/// What is known of an operation that need not run.
#[derive(Clone)]
pub(in crate::autograd) struct LeftOut {
    pub outputs: Vec<(Shape, DType)>,
    /// What it saved in the first run, where that was kept.
    pub saved: Option<Vec<Tensor>>,
}

/// Which operations of a second run need not run.
#[derive(Clone)]
pub(in crate::autograd) struct Plan {
    steps: Arc<[Step]>,
    next: usize,
}

impl Plan {
    /// What is known of the next operation where it need not run, if it is the one that was met in the first run.
    pub fn next(&mut self, name: &'static str, inputs: &[&Tensor]) -> Result<Option<LeftOut>> {
        let shapes = || inputs.iter().map(|input| input.shape());
        match self.steps.get(self.next) {
            Some(step) if step.name == name && step.inputs.iter().eq(shapes()) => {
                self.next += 1;
                Ok(step.left_out.clone())
            }
            step => {
                let expected = step.map_or("the end".into(), |step| format!("{} of {:?}", step.name, step.inputs));
                Err(changed(expected, format!("{name} of {:?}", shapes().collect::<Vec<_>>())))
            }
        }
    }
}

/// The error for a segment whose second run is not like its first.
pub(super) fn changed(expected: String, found: String) -> Error {
    let expected = format!("one that runs the same operations every time ({expected})");
    Error::argument("recompute", "segment", expected, found)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use candle_core::{Device, Var};

    use super::*;
    use crate::autograd::{
        Backward, Forward, Output, apply, check_gradients, recomputations, recompute, recompute_needed,
    };
    use crate::ops::{Activation, activation, add, linear, reshape, split};
    use crate::random::Address;

    fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
        Address::new(43, purpose).normal(shape, DType::F64, &Device::Cpu)
    }

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        tensor.flatten_all().and_then(|flat| flat.to_vec1()).unwrap()
    }

    /// How often an operation ran, as a whole and for what it saves.
    #[derive(Clone, Default)]
    struct Runs(Arc<[AtomicUsize; 2]>);

    impl Runs {
        fn get(&self) -> [usize; 2] {
            [0, 1].map(|i| self.0[i].load(Ordering::Relaxed))
        }
    }

    /// `3 x^2`, of which the backward pass reads what it is told to.
    struct Square {
        runs: Runs,
        reads: Reads,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Reads {
        Input,
        Output,
        Saved,
        SavedAlone,
        SavedLittle,
    }

    impl Function for Square {
        fn name(&self) -> &'static str {
            "square"
        }
        fn forward(&self, x: &[Tensor]) -> Result<Forward> {
            self.runs.0[0].fetch_add(1, Ordering::Relaxed);
            let squares = numbers(&x[0]).iter().map(|x| 3.0 * x * x).collect();
            let saved = match self.reads {
                Reads::Saved | Reads::SavedAlone | Reads::SavedLittle => vec![(&x[0] * 6.0)?],
                _ => Vec::new(),
            };
            Ok(Forward { outputs: vec![Output::from_vec(squares, x[0].shape())], saved })
        }
        fn saves(&self) -> Saves {
            match self.reads {
                Reads::SavedAlone => Saves::Alone(vec![0]),
                Reads::SavedLittle => Saves::Little,
                _ => Saves::WithOutputs,
            }
        }
        fn save(&self, x: &[Tensor]) -> Result<Vec<Tensor>> {
            self.runs.0[1].fetch_add(1, Ordering::Relaxed);
            Ok(vec![(&x[0] * 6.0)?])
        }
        fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
            let slope = match self.reads {
                Reads::Input => (&context.inputs[0] * 6.0)?,
                // For positive x: the output knows no sign.
                Reads::Output => ((context.outputs[0].as_ref().unwrap() / 3.0)?.sqrt()? * 6.0)?,
                _ => context.saved[0].clone(),
            };
            Ok(vec![Some((slope * context.gradient()?)?)])
        }
        fn uses(&self, value: Value, _: &[bool]) -> bool {
            match value {
                Value::Input(_) => self.reads == Reads::Input,
                Value::Output(_) => self.reads == Reads::Output,
            }
        }
    }

    fn square(x: &Tensor, runs: &Runs, reads: Reads) -> Result<Tensor> {
        apply(Square { runs: runs.clone(), reads }, &[x])
    }

    type Segment = fn(&[Tensor], &[Runs; 3], Reads) -> Result<Vec<Tensor>>;

    /// How often three squares ran in a first and a second run, whose gradients are those of a plain run.
    fn runs(reads: Reads, segment: Segment) -> Result<[[usize; 2]; 3]> {
        let x = Var::from_tensor(&random("x", &[2, 3])?.abs()?)?;
        let of = |run: &dyn Fn(&Tensor) -> Result<Vec<Tensor>>| -> Result<Vec<f64>> {
            let outputs = run(x.as_tensor())?;
            let mut loss = outputs[0].sum_all()?;
            for output in &outputs[1..] {
                loss = (loss + (output * 0.3)?.sum_all()?)?;
            }
            Ok(numbers(loss.backward()?.get(&x).unwrap()))
        };
        let plain = of(&|x| segment(std::slice::from_ref(x), &Default::default(), reads))?;
        let counted: [Runs; 3] = Default::default();
        let needed = of(&|x| {
            let counted = counted.clone();
            recompute_needed(&[x], false, move |x| segment(x, &counted, reads))
        })?;
        let errors = plain.iter().zip(&needed).map(|(a, b)| (a - b).abs() / a.abs());
        assert!(errors.fold(0.0, f64::max) < 1e-12, "{plain:?} {needed:?}");
        Ok(counted.each_ref().map(Runs::get))
    }

    #[test]
    fn what_only_leaves_the_segment_is_not_computed_again() -> Result<()> {
        let chain: Segment = |x, count, reads| {
            let first = square(&x[0], &count[0], reads)?;
            let second = square(&first, &count[1], reads)?;
            // Views of it are left out as well.
            Ok(vec![reshape(&square(&second, &count[2], reads)?, 6)?])
        };
        // The input of the last one is read by its backward pass; its output by nobody.
        assert_eq!(runs(Reads::Input, chain)?, [[2, 0], [2, 0], [1, 0]]);
        assert_eq!(runs(Reads::Output, chain)?, [[2, 0]; 3]);
        // What is saved comes with the outputs, or alone: then it takes the input.
        assert_eq!(runs(Reads::Saved, chain)?, [[2, 0]; 3]);
        assert_eq!(runs(Reads::SavedAlone, chain)?, [[2, 0], [2, 0], [1, 1]]);
        // Or is kept, as it is little: then nothing runs again.
        assert_eq!(runs(Reads::SavedLittle, chain)?, [[1, 0]; 3]);
        // One that is read inside is computed though it leaves the segment.
        let both: Segment = |x, count, reads| {
            let first = square(&x[0], &count[0], reads)?;
            let parts = split(&reshape(&first, (1, 6))?, &[2, 4])?;
            Ok(vec![square(&parts[1], &count[1], reads)?, parts[0].clone(), first])
        };
        assert_eq!(runs(Reads::Input, both)?, [[2, 0], [1, 0], [0, 0]]);
        Ok(())
    }

    #[test]
    fn operations_whose_inputs_nobody_reads_are_left_out_with_those_that_read_them() -> Result<()> {
        // The gradient of a sum, and of a frozen layer, reads neither term.
        let runs = runs(Reads::Input, |x, count, reads| {
            let (left, right) = (square(&x[0], &count[0], reads)?, square(&x[0], &count[1], reads)?);
            Ok(vec![linear(&add(&left, &right)?, &random("w", &[4, 3])?, None)?])
        })?;
        assert_eq!(runs, [[1, 0], [1, 0], [0, 0]]);
        Ok(())
    }

    #[test]
    fn gradients_of_variables_and_inputs_equal_finite_differences() -> Result<()> {
        let inputs = [random("x", &[3, 4])?, random("side", &[3, 4])?, random("w", &[4, 4])?];
        for keeps in [false, true] {
            let check = check_gradients(&inputs, |x| {
                let weight = x[2].clone();
                recompute_needed(&[&x[0], &x[1]], keeps, move |x| {
                    let hidden = activation(&linear(&x[0], &weight, None)?, Activation::Silu)?;
                    let sum = add(&linear(&hidden, &weight, None)?, &x[1])?;
                    Ok(vec![linear(&sum, &weight, None)?, reshape(&sum, 12)?, hidden])
                })
            })?;
            assert!(check.worst() < 1e-8, "{check:?}");
        }
        Ok(())
    }

    #[test]
    fn in_a_segment_around_another_all_is_computed() -> Result<()> {
        let runs = runs(Reads::Input, |x, count, reads| {
            let first = square(&x[0], &count[0], reads)?;
            let count = count.clone();
            let inner =
                recompute(&[&first], move |x| Ok(vec![square(&square(&x[0], &count[1], reads)?, &count[2], reads)?]))?;
            Ok(vec![inner[0].clone()])
        })?;
        // Found in the first run, run for the first time in the second, and again for the gradients.
        assert_eq!(runs, [[2, 0], [3, 0], [3, 0]]);
        Ok(())
    }

    #[test]
    fn operations_of_candles_take_all_of_it_to_candles_graph() -> Result<()> {
        let before = recomputations();
        let runs = runs(Reads::Input, |x, count, reads| {
            let first = square(&x[0], &count[0], reads)?;
            Ok(vec![square(&first.sqr()?, &count[1], reads)?])
        })?;
        assert_eq!(runs, [[2, 0], [2, 0], [0, 0]]);
        let after = recomputations();
        assert_eq!((after.on_tape - before.on_tape, after.on_graph - before.on_graph), (0, 1));
        Ok(())
    }

    thread_local! {
        static RUN: Cell<usize> = const { Cell::new(0) };
    }

    #[test]
    fn another_operation_than_in_the_first_run_is_an_error_only_where_it_would_miss_something() -> Result<()> {
        let x = Var::from_tensor(&random("x", &[2, 3])?)?;
        let gradient = |early: bool| -> Result<Vec<f64>> {
            RUN.set(0);
            let y = recompute_needed(&[&x], false, move |x| {
                let second = RUN.replace(RUN.get() + 1) > 0;
                let (runs, reads) = (Runs::default(), Reads::Input);
                let same = |x: &Tensor| reshape(x, (2, 3));
                let hidden = if early && second { same(&x[0])? } else { x[0].clone() };
                let output = square(&hidden, &runs, reads)?;
                let rest = if !early && second { square(&output, &runs, reads)? } else { same(&output)? };
                Ok(vec![output, rest])
            })?;
            Ok(numbers(y[0].sum_all()?.backward()?.get(&x).unwrap()))
        };
        let expected = numbers(&(x.as_tensor() * 6.0)?);
        assert_eq!(gradient(true)?, expected);
        let message = gradient(false).unwrap_err().to_string();
        assert!(message.contains("the same operations") && message.contains("square"), "{message}");
        Ok(())
    }
}

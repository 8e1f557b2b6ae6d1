use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Var};

use super::*;
use crate::autograd::{
    Backward, Forward, Function, Output, Value, apply, apply_many, check_gradients, recomputations, recompute,
    recompute_keeping,
};
use crate::ops::{Activation, activation, add, linear, reshape, split};
use crate::random::Address;

fn random(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(41, purpose).normal(shape, DType::F64, &Device::Cpu)
}

fn variable(purpose: &'static str, shape: &[usize]) -> Result<Var> {
    Ok(Var::from_tensor(&random(purpose, shape)?)?)
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().and_then(|flat| flat.to_vec1()).unwrap()
}

fn refs(tensors: &[Tensor]) -> Vec<&Tensor> {
    tensors.iter().collect()
}

fn ones(tensor: &Tensor) -> Result<Option<Tensor>> {
    Ok(Some(tensor.ones_like()?))
}

/// `(a * b, a - b)`, which counts and logs what is done with it.
#[derive(Clone, Default)]
struct Probe {
    name: &'static str,
    keep: bool,
    forwards: Arc<AtomicUsize>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Probe {
    fn named(&self, name: &'static str) -> Self {
        Probe { name, ..self.clone() }
    }

    fn note(&self, what: &str) {
        self.log.lock().unwrap().push(format!("{what} {}", self.name));
    }
}

/// One application of a probe: its end is logged, the end of a probe is not.
struct Applied(Probe);

impl Drop for Applied {
    fn drop(&mut self) {
        self.0.note("drop");
    }
}

impl Function for Applied {
    fn name(&self) -> &'static str {
        self.0.name
    }
    fn forward(&self, x: &[Tensor]) -> Result<Forward> {
        self.0.forwards.fetch_add(1, Ordering::Relaxed);
        let outputs = vec![Output::Tensor((&x[0] * &x[1])?), Output::Tensor((&x[0] - &x[1])?)];
        Ok(Forward { outputs, saved: vec![x[0].sqr()?] })
    }
    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        self.0.note("backward");
        let x = context.inputs;
        assert_eq!(numbers(&context.saved[0]), numbers(&x[0].sqr()?));
        let zero = x[0].zeros_like()?;
        let of = |index: usize| context.gradients[index].as_ref().unwrap_or(&zero);
        Ok(vec![Some(((of(0) * &x[1])? + of(1))?), Some(((of(0) * &x[0])? - of(1))?)])
    }
    fn keep(&self) -> bool {
        self.0.keep
    }
}

fn pair(probe: &Probe, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
    let mut outputs = apply_many(Applied(probe.clone()), &[a, b])?;
    let second = outputs.pop().unwrap();
    Ok((outputs.pop().unwrap(), second))
}

/// A diamond (`hidden` goes two ways), an input used twice, several outputs, a view.
fn network(x: &[Tensor], weight: &Tensor) -> Result<Vec<Tensor>> {
    let hidden = activation(&linear(&x[0], weight, None)?, Activation::Silu)?;
    let (left, right) = pair(&Probe::default(), &hidden, &linear(&hidden, weight, None)?)?;
    let parts = split(&reshape(&left, (1, 12))?, &[4, 8])?;
    Ok(vec![add(&add(&right, &x[1])?, &x[0])?, parts[1].clone(), hidden])
}

#[test]
fn gradients_equal_candles_and_finite_differences() -> Result<()> {
    let inputs = [random("x", &[3, 4])?, random("side", &[3, 4])?, random("w", &[4, 4])?];
    // The weight as an input, and closed over.
    let plain = check_gradients(&inputs, |x| network(&x[..2], &x[2]))?;
    assert!(plain.worst() < 1e-8, "{plain:?}");
    let before = recomputations();
    let as_input = check_gradients(&inputs, |x| recompute(&refs(x), |x| network(&x[..2], &x[2])))?;
    let closed_over = check_gradients(&inputs, |x| {
        let weight = x[2].clone();
        recompute(&refs(&x[..2]), move |x| network(x, &weight))
    })?;
    assert!(as_input.worst() < 1e-8 && closed_over.worst() < 1e-8, "{as_input:?} {closed_over:?}");
    let after = recomputations();
    assert_eq!((after.on_tape - before.on_tape, after.on_graph - before.on_graph), (2, 0));
    Ok(())
}

#[test]
fn one_tensor_given_twice_gets_the_sum_of_both_gradients() -> Result<()> {
    let x = variable("x", &[2, 3])?;
    let y = recompute(&[&x, &x], |x| Ok(vec![pair(&Probe::default(), &x[0], &x[1])?.0]))?;
    let gradients = y[0].sum_all()?.backward()?;
    assert_eq!(numbers(gradients.get(&x).unwrap()), numbers(&(x.as_tensor() * 2.0)?));
    Ok(())
}

#[test]
fn what_is_no_part_of_the_loss_costs_nothing_and_has_no_gradient() -> Result<()> {
    let (probe, x, unused) = (Probe::default(), variable("x", &[2])?, variable("unused", &[2])?);
    let recording = record(&[x.as_tensor().clone(), x.as_tensor().clone()], |x| {
        let (used, _) = pair(&probe.named("used"), &x[0], &x[0])?;
        let (aside, _) = pair(&probe.named("aside"), &x[1], &unused)?;
        Ok(vec![used, aside])
    })?;
    let seed = ones(&x)?;
    let gradients = recording.backward(&[seed, None])?;
    assert_eq!(numbers(gradients.input(0).unwrap()), numbers(&(x.as_tensor() * 2.0)?));
    assert!(gradients.input(1).is_none() && gradients.of(&unused).is_none());
    assert!(!probe.log.lock().unwrap().contains(&"backward aside".to_string()));
    Ok(())
}

#[test]
fn constants_are_not_noted() -> Result<()> {
    let (probe, x) = (Probe::default(), random("x", &[2])?);
    let recording = record(&[x], |x| Ok(vec![pair(&probe, &x[0], &x[0])?.0]))?;
    assert!(recording.tape.notes.is_empty() && !recording.outputs[0].track_op());
    Ok(())
}

#[test]
fn each_function_is_freed_before_the_one_before_it_is_differentiated() -> Result<()> {
    let (probe, x) = (Probe::default(), variable("x", &[2])?);
    let recording = record(&[x.as_tensor().clone()], |x| {
        let (y, _) = pair(&probe.named("first"), &x[0], &x[0])?;
        let (z, _) = pair(&probe.named("second"), &y, &x[0])?;
        Ok(vec![pair(&probe.named("third"), &z, &y)?.1])
    })?;
    assert!(probe.log.lock().unwrap().is_empty());
    recording.backward(&[ones(&x)?])?;
    let expected = ["backward third", "drop third", "backward second", "drop second", "backward first", "drop first"];
    assert_eq!(*probe.log.lock().unwrap(), expected);
    Ok(())
}

#[test]
fn an_operation_of_candles_inside_is_an_error_that_names_where_it_was_noticed() -> Result<()> {
    let x = variable("x", &[2, 2])?;
    let input = [x.as_tensor().clone()];
    let message = |segment: &dyn Fn(&Tensor) -> Result<Tensor>| {
        record(&input, |x| Ok(vec![segment(&x[0])?])).err().unwrap().to_string()
    };
    let weight = random("w", &[2, 2])?;
    let on_input = message(&|x| linear(&x.sqr()?, &weight, None));
    assert!(on_input.starts_with("linear: ") && on_input.contains("the tape does not see"), "{on_input}");
    let on_output = message(&|x| activation(&linear(x, &weight, None)?.tanh()?, Activation::Silu));
    assert!(on_output.starts_with("activation: "), "{on_output}");
    let at_the_end = message(&|x| Ok(linear(x, &weight, None)?.tanh()?));
    assert!(at_the_end.starts_with("the end of the segment: "), "{at_the_end}");
    let of_a_variable = message(&|_| linear(&weight, &(x.as_tensor() * 2.0)?, None));
    assert!(of_a_variable.starts_with("linear: "), "{of_a_variable}");
    // Also where the segment goes on as if nothing had happened.
    let hushed = message(&|x| Ok(linear(&x.sqr()?, &weight, None).unwrap_or_else(|_| weight.clone())));
    assert!(hushed.starts_with("linear: "), "{hushed}");
    Ok(())
}

#[test]
fn a_segment_with_operations_of_candles_is_differentiated_by_candles_graph() -> Result<()> {
    let (x, w) = (variable("x", &[3, 4])?, variable("w", &[4, 4])?);
    let plain = linear(&x, &w, None)?.tanh()?.sum_all()?.backward()?;
    // Noticed only in the second run, and in the first.
    for on_variable in [false, true] {
        let (before, weight) = (recomputations(), w.as_tensor().clone());
        let y = recompute(&[&x], move |x| {
            let weight = if on_variable { (&weight * 1.0)? } else { weight.clone() };
            Ok(vec![linear(&x[0], &weight, None)?.tanh()?])
        })?;
        let gradients = y[0].sum_all()?.backward()?;
        for leaf in [&x, &w] {
            assert_eq!(numbers(gradients.get(leaf).unwrap()), numbers(plain.get(leaf).unwrap()));
        }
        let after = recomputations();
        assert_eq!((after.on_tape - before.on_tape, after.on_graph - before.on_graph), (0, 1));
    }
    Ok(())
}

#[test]
fn segments_nest() -> Result<()> {
    let inputs = [random("x", &[3, 4])?, random("side", &[3, 4])?, random("w", &[4, 4])?];
    let nested = |x: &[Tensor]| -> Result<Vec<Tensor>> {
        let weight = x[2].clone();
        recompute(&refs(&x[..2]), move |x| {
            let hidden = linear(&x[0], &weight, None)?;
            // Closed over: a tensor of the segment around, and a view of one.
            let (inner, view, outer) = (weight.clone(), reshape(&hidden, (3, 4))?, add(&hidden, &x[1])?);
            let flat = reshape(&outer, 12)?;
            let outputs = recompute(&[&hidden, &x[1]], move |x| {
                let mut outputs = network(x, &inner)?;
                outputs[0] = add(&add(&outputs[0], &outer)?, &add(&view, &reshape(&flat, (3, 4))?)?)?;
                Ok(outputs)
            })?;
            Ok(vec![linear(&outputs[0], &weight, None)?, outputs[1].clone(), outputs[2].clone()])
        })
    };
    let before = recomputations();
    let check = check_gradients(&inputs, nested)?;
    assert!(check.worst() < 1e-8, "{check:?}");
    let after = recomputations();
    assert_eq!((after.on_tape - before.on_tape, after.on_graph - before.on_graph), (2, 0));
    Ok(())
}

#[test]
fn a_segment_on_candles_graph_may_nest_in_one_on_a_tape() -> Result<()> {
    let inputs = [random("x", &[3, 4])?, random("w", &[4, 4])?];
    let before = recomputations();
    let check = check_gradients(&inputs, |x| {
        let weight = x[1].clone();
        recompute(&[&x[0]], move |x| {
            let (hidden, inner) = (linear(&x[0], &weight, None)?, weight.clone());
            let hidden = recompute(&[&hidden], move |x| Ok(vec![linear(&x[0].sqr()?, &inner, None)?]))?;
            Ok(vec![activation(&hidden[0], Activation::Silu)?])
        })
    })?;
    assert!(check.worst() < 1e-8, "{check:?}");
    let after = recomputations();
    assert_eq!((after.on_tape - before.on_tape, after.on_graph - before.on_graph), (1, 1));
    Ok(())
}

/// The gradients of a segment with two expensive functions, and how often each was computed.
fn expensive(nested: bool, keep: bool) -> Result<(Vec<f64>, usize)> {
    let (x, w) = (variable("x", &[3, 4])?, variable("w", &[4, 4])?);
    let probe = Probe { keep: true, ..Probe::default() };
    let (forwards, weight) = (probe.forwards.clone(), w.as_tensor().clone());
    let segment = move |x: &[Tensor]| -> Result<Vec<Tensor>> {
        let (y, _) = pair(&probe.named("first"), &linear(&x[0], &weight, None)?, &x[0])?;
        let (probe, last) = (probe.named("second"), move |x: &[Tensor], probe: &Probe| {
            Ok(vec![pair(probe, &activation(&x[0], Activation::Silu)?, &x[0])?.1])
        });
        match (nested, keep) {
            (false, _) => last(&[y], &probe),
            (true, true) => recompute_keeping(&[&y], move |x| last(x, &probe)),
            (true, false) => recompute(&[&y], move |x| last(x, &probe)),
        }
    };
    let y = if keep { recompute_keeping(&[&x], segment)? } else { recompute(&[&x], segment)? };
    let loss = y[0].sum_all()?;
    let gradients = loss.backward()?;
    let count = forwards.load(Ordering::Relaxed);
    // What was kept is gone after the first backward pass; a second one computes it again.
    let again = loss.backward()?;
    let all = |gradients: &candle_core::backprop::GradStore| {
        [&x, &w].iter().flat_map(|leaf| numbers(gradients.get(leaf).unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(all(&gradients), all(&again));
    Ok((all(&gradients), count))
}

#[test]
fn what_is_kept_is_computed_once_and_gives_the_same_gradients() -> Result<()> {
    let (plain, twice) = expensive(false, false)?;
    let (kept, once) = expensive(false, true)?;
    assert_eq!((twice, once), (4, 2));
    assert_eq!(plain, kept);
    let (nested, thrice) = expensive(true, false)?;
    let (nested_kept, once) = expensive(true, true)?;
    assert_eq!((thrice, once), (5, 2));
    assert_eq!((&plain, &plain), (&nested, &nested_kept));
    Ok(())
}

#[test]
fn a_kept_segment_that_changes_its_operations_is_an_error() -> Result<()> {
    let (x, probe) = (variable("x", &[2])?, Probe { keep: true, ..Probe::default() });
    let count = probe.forwards.clone();
    let y = recompute_keeping(&[&x], move |x| {
        let name = if count.load(Ordering::Relaxed) == 0 { "one" } else { "another" };
        Ok(vec![pair(&probe.named(name), &x[0], &x[0])?.0])
    })?;
    let message = y[0].sum_all()?.backward().err().unwrap().to_string();
    assert!(message.contains("the same operations") && message.contains("another"), "{message}");
    Ok(())
}

/// `x^2` from its saved factor, without the values of input or output.
struct Forgetful;

impl Function for Forgetful {
    fn name(&self) -> &'static str {
        "forgetful"
    }
    fn forward(&self, x: &[Tensor]) -> Result<Forward> {
        Ok(Forward { outputs: vec![Output::Tensor(x[0].sqr()?)], saved: vec![(&x[0] * 2.0)?] })
    }
    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let x = &context.inputs[0];
        assert_eq!((x.dims(), x.dtype(), x.stride()), (&[2, 3][..], DType::F64, &[0, 0][..]));
        Ok(vec![Some((context.gradient()? * &context.saved[0])?)])
    }
    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

#[test]
fn an_input_that_is_not_used_has_a_shape_but_no_memory() -> Result<()> {
    let x = random("x", &[2, 3])?;
    let check = check_gradients(&[x], |x| recompute(&[&x[0]], |x| Ok(vec![apply(Forgetful, &[&x[0]])?])))?;
    assert!(check.worst() < 1e-8, "{check:?}");
    Ok(())
}

/// `(e^(a+b), (a+b) e^(a+b))`, differentiated with the first output alone.
struct FirstOutput;

impl Function for FirstOutput {
    fn name(&self) -> &'static str {
        "first output"
    }
    fn forward(&self, x: &[Tensor]) -> Result<Forward> {
        let sum = (&x[0] + &x[1])?;
        let outputs = vec![numbers(&sum.exp()?), numbers(&(sum.exp()? * &sum)?)];
        Ok(Forward { outputs: outputs.into_iter().map(|x| Output::from_vec(x, 3)).collect(), saved: Vec::new() })
    }
    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        assert!(context.outputs[1].is_none(), "nobody asked for it");
        let power = context.outputs[0].as_ref().unwrap();
        let zero = power.zeros_like()?;
        let of = |index: usize| context.gradients[index].as_ref().unwrap_or(&zero);
        let gradient = ((of(0) * power)? + (of(1) * ((power.log()? + 1.0)? * power)?)?)?;
        Ok(vec![Some(gradient.clone()), Some(gradient)])
    }
    fn uses(&self, value: Value, _: &[bool]) -> bool {
        value == Value::Output(0)
    }
}

#[test]
fn an_output_is_there_for_the_backward_pass_also_where_it_is_no_part_of_the_loss() -> Result<()> {
    let inputs = [random("a", &[3])?, random("b", &[3])?];
    for parts in [&[0][..], &[1], &[0, 1]] {
        let outputs = |x: &[Tensor]| -> Result<Vec<Tensor>> {
            let all = apply_many(FirstOutput, &[&x[0], &x[1]])?;
            Ok(parts.iter().map(|part| all[*part].clone()).collect())
        };
        let on_graph = check_gradients(&inputs, outputs)?;
        let on_tape = check_gradients(&inputs, |x| recompute(&refs(x), move |x| outputs(x)))?;
        assert!(on_graph.worst() < 1e-8 && on_tape.worst() < 1e-8, "{parts:?}: {on_graph:?} {on_tape:?}");
    }
    // The same graph walked twice.
    let (a, b) = (variable("a", &[3])?, variable("b", &[3])?);
    let loss = apply_many(FirstOutput, &[&a, &b])?[1].sum_all()?;
    let [once, again] = [loss.backward()?, loss.backward()?].map(|gradients| numbers(gradients.get(&a).unwrap()));
    assert_eq!(once, again);
    Ok(())
}

/// `x y`, which adds what `x` has got so far (and nothing else) itself.
struct Product(Arc<AtomicUsize>);

impl Function for Product {
    fn name(&self) -> &'static str {
        "product"
    }
    fn forward(&self, x: &[Tensor]) -> Result<Forward> {
        Ok(Output::Tensor((&x[0] * &x[1])?).into())
    }
    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (x, gradient) = (context.inputs, context.gradient()?);
        let mut of_x = (gradient * &x[1])?;
        if let Some(so_far) = context.take_so_far(0) {
            self.0.fetch_add(1, Ordering::Relaxed);
            of_x = (of_x + so_far)?;
        }
        Ok(vec![Some(of_x), Some((gradient * &x[0])?)])
    }
}

#[test]
fn a_function_may_add_the_gradient_that_an_input_has_got_so_far() -> Result<()> {
    let inputs = [random("x", &[2, 3])?, random("y", &[2, 3])?, random("w", &[3, 3])?];
    let taken = Arc::new(AtomicUsize::new(0));
    let check = check_gradients(&inputs, |x| {
        let taken = taken.clone();
        recompute(&refs(x), move |x| {
            let product = |x: &Tensor, y: &Tensor| apply(Product(taken.clone()), &[x, y]);
            // `x` is read by three functions. The one visited first, where it stands in both places, finds nothing yet.
            let first = product(&x[0], &x[1])?;
            let second = product(&x[0], &linear(&first, &x[2], None)?)?;
            Ok(vec![second, product(&x[0], &x[0])?])
        })
    })?;
    assert!(check.worst() < 1e-8, "{check:?}");
    assert_eq!(taken.load(Ordering::Relaxed), 2);
    Ok(())
}

#[test]
fn gradients_must_fit_the_outputs() -> Result<()> {
    let x = variable("x", &[2])?;
    let recording = || record(&[x.as_tensor().clone()], |x| Ok(vec![pair(&Probe::default(), &x[0], &x[0])?.0]));
    let message = recording()?.backward(&[]).err().unwrap().to_string();
    assert!(message.contains("one an output"), "{message}");
    let message = recording()?.backward(&[Some(random("g", &[3])?)]).err().unwrap().to_string();
    assert!(message.contains("[2]") && message.contains("[3]"), "{message}");
    Ok(())
}

#[test]
fn a_panic_leaves_no_frame_behind() {
    let x = Var::new(&[1f64], &Device::Cpu).unwrap();
    let panicking = std::panic::AssertUnwindSafe(|| record(&[x.as_tensor().clone()], |_| panic!("in the segment")));
    assert!(std::panic::catch_unwind(panicking).is_err());
    assert_eq!(mode(), Mode::Graph);
}

use candle_core::{D, DType, Device, Tensor, Var};
use proptest::prelude::{ProptestConfig, proptest};

use super::{Mask, attention, attention_packed_masked, attention_where};
use crate::Result;
use crate::autograd::check_gradients;
use crate::random::Address;

/// The shape of a problem.
#[derive(Clone, Copy, Debug)]
struct Problem {
    batch: usize,
    /// Queries.
    n: usize,
    /// Own keys.
    m: usize,
    /// Reference keys and their batch; `None` stands for plain attention.
    reference: Option<(usize, usize)>,
    heads: usize,
    d: usize,
    mask: Mask,
}

/// Crosses the tiles of queries and of keys, with remainders, in both sources.
const LARGE: Problem =
    Problem { batch: 2, n: 130, m: 140, reference: Some((150, 2)), heads: 2, d: 8, mask: Mask::None };
const SMALL: Problem = Problem { batch: 2, n: 5, m: 4, reference: Some((3, 2)), heads: 2, d: 3, mask: Mask::None };

impl Problem {
    fn inputs(self) -> Result<Vec<Tensor>> {
        let c = self.heads * self.d;
        let random =
            |purpose, shape: (usize, usize, usize)| Address::new(9, purpose).normal(shape, DType::F64, &Device::Cpu);
        let own = (self.batch, self.m, c);
        let mut inputs = vec![random("q", (self.batch, self.n, c))?, random("k", own)?, random("v", own)?];
        if let Some((tokens, batch)) = self.reference {
            inputs.extend([random("k2", (batch, tokens, c))?, random("v2", (batch, tokens, c))?]);
        }
        Ok(inputs)
    }

    fn run(self, t: &[Tensor]) -> Result<Tensor> {
        attention(&t[0], (&t[1], &t[2]), t.get(3).map(|k2| (k2, &t[4])), self.heads, self.mask)
    }

    /// Concatenates the sources and makes the whole matrix of scores, out of candle's differentiable operations.
    fn naive(self, t: &[Tensor]) -> Result<Tensor> {
        let split = |t: &Tensor| -> Result<Tensor> {
            let (batch, tokens, _) = t.dims3()?;
            Ok(t.reshape((batch, tokens, self.heads, self.d))?.transpose(1, 2)?.contiguous()?)
        };
        let joined = |own: &Tensor, reference: Option<&Tensor>| -> Result<Tensor> {
            match reference {
                Some(reference) if reference.dim(1)? > 0 => {
                    let reference = reference.broadcast_as((self.batch, reference.dim(1)?, reference.dim(2)?))?;
                    split(&Tensor::cat(&[own, &reference], 1)?)
                }
                _ => split(own),
            }
        };
        let (q, k, v) = (split(&t[0])?, joined(&t[1], t.get(3))?, joined(&t[2], t.get(4))?);
        let mut scores = (q.matmul(&k.t()?.contiguous()?)? / (self.d as f64).sqrt())?;
        if self.mask == Mask::Causal {
            let bias: Vec<f64> = (0..self.n)
                .flat_map(|i| (0..self.m).map(move |j| if j <= i { 0.0 } else { f64::NEG_INFINITY }))
                .collect();
            scores = scores.broadcast_add(&Tensor::from_vec(bias, (self.n, self.m), &Device::Cpu)?)?;
        }
        let scores = scores.broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?.exp()?;
        let p = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
        Ok(p.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((self.batch, self.n, self.heads * self.d))?)
    }

    /// The largest differences of the output and of the gradients from the naive ones.
    fn differences(self) -> Result<(f64, f64)> {
        let inputs = self.inputs()?;
        let variables = inputs.iter().map(|t| Ok(Var::from_tensor(t)?.into_inner())).collect::<Result<Vec<_>>>()?;
        let (ours, naive) = (self.run(&variables)?, self.naive(&variables)?);
        let weights = Address::new(10, "weights").normal(ours.shape(), DType::F64, &Device::Cpu)?;
        let our_gradients = (&ours * &weights)?.sum_all()?.backward()?;
        let naive_gradients = (&naive * &weights)?.sum_all()?.backward()?;
        let mut worst = 0f64;
        for variable in variables.iter().filter(|variable| variable.elem_count() > 0) {
            let (a, b) = (our_gradients.get(variable).unwrap(), naive_gradients.get(variable).unwrap());
            worst = worst.max(distance(a, b)?);
        }
        Ok((distance(&ours, &naive)?, worst))
    }
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!(a.dims(), b.dims());
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f64>()?)
}

#[test]
fn values_and_gradients_equal_those_of_a_softmax_over_concatenated_sources() -> Result<()> {
    for problem in [
        SMALL,
        LARGE,
        Problem { m: 70, reference: Some((150, 1)), ..LARGE },
        Problem { m: 300, reference: Some((5, 2)), ..LARGE },
        Problem { n: 64, m: 128, reference: Some((128, 1)), ..LARGE },
        Problem { n: 1, m: 1, reference: None, ..LARGE },
        Problem { reference: None, ..LARGE },
        Problem { reference: None, mask: Mask::Causal, ..LARGE },
        Problem { reference: None, mask: Mask::Causal, n: 200, m: 200, d: 5, ..LARGE },
        Problem { reference: None, mask: Mask::Causal, n: 70, m: 300, ..LARGE },
        Problem { batch: 1, heads: 1, d: 20, ..LARGE },
        // Heads enough not to be split into spans of queries.
        Problem { heads: 5, d: 4, ..LARGE },
        Problem { heads: 5, d: 4, reference: None, mask: Mask::Causal, ..LARGE },
    ] {
        let reference = problem.reference.map(|(tokens, batch)| (tokens, batch.min(problem.batch)));
        let problem = Problem { reference, ..problem };
        let (values, gradients) = problem.differences()?;
        assert!(values < 1e-12 && gradients < 1e-11, "{problem:?}: values {values}, gradients {gradients}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]
    #[test]
    fn any_shape_agrees_with_the_naive_softmax(
        batch in 1usize..3, n in 1usize..90, m in 1usize..160, tokens in 0usize..160, shared: bool, heads in 1usize..4,
        d in 1usize..10, causal: bool,
    ) {
        let reference = Some((tokens, if shared { 1 } else { batch }));
        let problem = match causal {
            true => Problem { batch, n, m, reference: None, heads, d, mask: Mask::Causal },
            false => Problem { batch, n, m, reference, heads, d, mask: Mask::None },
        };
        let (values, gradients) = problem.differences().unwrap();
        assert!(values < 1e-12 && gradients < 1e-11, "{problem:?}: values {values}, gradients {gradients}");
    }
}

#[test]
fn gradients_of_all_arguments_match_finite_differences() -> Result<()> {
    for problem in [
        SMALL,
        Problem { reference: Some((3, 1)), ..SMALL },
        Problem { reference: None, ..SMALL },
        Problem { reference: None, mask: Mask::Causal, ..SMALL },
    ] {
        let check = check_gradients(&problem.inputs()?, |t| Ok(vec![problem.run(t)?]))?;
        assert!(check.worst() < 1e-8, "{problem:?}: {check:?}");
        assert!(check.norms.iter().all(|norm| *norm > 1e-2), "{problem:?}: {check:?}");
    }
    Ok(())
}

#[test]
fn every_choice_of_frozen_inputs_leaves_the_other_gradients_as_they_are() -> Result<()> {
    let inputs = SMALL.inputs()?;
    let run = |tracked: usize| -> Result<Vec<Option<Tensor>>> {
        let tensors = inputs
            .iter()
            .enumerate()
            .map(|(i, t)| Ok(if tracked >> i & 1 == 1 { Var::from_tensor(t)?.into_inner() } else { t.clone() }))
            .collect::<Result<Vec<_>>>()?;
        let gradients = SMALL.run(&tensors)?.sqr()?.sum_all()?.backward()?;
        Ok(tensors.iter().map(|t| gradients.get(t).cloned()).collect())
    };
    let all = run(0b11111)?;
    for tracked in 1..0b11111 {
        for (i, (gradient, expected)) in run(tracked)?.iter().zip(&all).enumerate() {
            match gradient {
                None => assert_eq!(tracked >> i & 1, 0),
                Some(gradient) => {
                    assert_eq!(tracked >> i & 1, 1);
                    assert!(distance(gradient, expected.as_ref().unwrap())? < 1e-14);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn no_reference_tokens_give_plain_attention() -> Result<()> {
    let problem = Problem { reference: Some((0, 1)), ..SMALL };
    let inputs = problem.inputs()?;
    assert_eq!(distance(&problem.run(&inputs)?, &problem.run(&inputs[..3])?)?, 0.0);
    let variables = inputs.iter().map(|t| Ok(Var::from_tensor(t)?.into_inner())).collect::<Result<Vec<_>>>()?;
    let gradients = problem.run(&variables)?.sum_all()?.backward()?;
    assert_eq!(gradients.get(&variables[3]).unwrap().dims(), [1, 0, 6]);
    assert_eq!(gradients.get(&variables[2]).unwrap().dims(), [2, 4, 6]);
    Ok(())
}

#[test]
fn packed_queries_keys_and_values_attend_as_separate_ones_do() -> Result<()> {
    let parts = [normal("q", &[2, 5, 6])?, normal("k", &[2, 5, 6])?, normal("v", &[2, 5, 6])?];
    let packed = Tensor::cat(&parts, 2)?;
    for mask in [Mask::None, Mask::Causal] {
        let expected = attention(&parts[0], (&parts[1], &parts[2]), None, 3, mask)?;
        assert!(distance(&attention_packed_masked(&packed, 3, mask)?, &expected)? < 1e-14, "{mask:?}");
    }
    assert!(attention_packed_masked(&packed, 4, Mask::None).is_err());
    Ok(())
}

#[test]
fn no_queries_give_an_empty_output_and_gradients_of_zero() -> Result<()> {
    let problem = Problem { n: 0, ..SMALL };
    let variables =
        problem.inputs()?.iter().map(|t| Ok(Var::from_tensor(t)?.into_inner())).collect::<Result<Vec<_>>>()?;
    let output = problem.run(&variables)?;
    assert_eq!(output.dims(), [2, 0, 6]);
    let gradients = output.sum_all()?.backward()?;
    assert_eq!(gradients.get(&variables[2]).unwrap().abs()?.max_all()?.to_scalar::<f64>()?, 0.0);
    Ok(())
}

#[test]
fn single_precision_agrees_with_double_even_where_scores_are_huge() -> Result<()> {
    let mut inputs = LARGE.inputs()?;
    inputs[0] = (&inputs[0] * 40.0)?;
    let single = inputs.iter().map(|t| Ok(t.to_dtype(DType::F32)?)).collect::<Result<Vec<_>>>()?;
    let widened = single.iter().map(|t| Ok(t.to_dtype(DType::F64)?)).collect::<Result<Vec<_>>>()?;
    let difference = distance(&LARGE.run(&single)?.to_dtype(DType::F64)?, &LARGE.run(&widened)?)?;
    assert!(difference < 2e-4, "{difference}");
    Ok(())
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let problem = Problem { reference: Some((150, 1)), ..LARGE };
    let run = |threads: usize| -> Vec<Vec<f64>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let variables: Vec<Tensor> =
                problem.inputs().unwrap().iter().map(|t| Var::from_tensor(t).unwrap().into_inner()).collect();
            let output = problem.run(&variables).unwrap();
            let gradients = output.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let gradients = variables.iter().map(|v| gradients.get(v).unwrap().clone());
            gradients.chain([output]).map(|t| t.flatten_all().unwrap().to_vec1::<f64>().unwrap()).collect()
        })
    };
    assert_eq!(run(1), run(3));
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let inputs = SMALL.inputs()?;
    let zeros = |shape: (usize, usize, usize)| Tensor::zeros(shape, DType::F64, &Device::Cpu);
    let (short, empty, triple) = (zeros((2, 2, 6))?, zeros((2, 0, 6))?, zeros((3, 3, 6))?);
    let [q, k, v, k2, v2] = &inputs[..] else { unreachable!("five inputs") };
    let single = v.to_dtype(DType::F32)?;
    let cases = [
        (attention(q, (k, v), None, 4, Mask::None), "a divisor of the 6 channels"),
        (attention(q, (k, v), None, 0, Mask::None), "a divisor of the 6 channels"),
        (attention(q, (k, &short), None, 2, Mask::None), "`own values`: expected (2, 4, 6), found [2, 2, 6]"),
        (attention(q, (k, &single), None, 2, Mask::None), "`own values`"),
        (
            attention(q, (k, v), Some((&triple, &triple)), 2, Mask::None),
            "`reference keys`: expected (2 or 1, tokens, 6)",
        ),
        (attention(q, (k, v), Some((k2, &v2.narrow(0, 0, 1)?)), 2, Mask::None), "batch 2, as the keys"),
        (attention(q, (k, v), Some((k2, v2)), 2, Mask::Causal), "causal"),
        (attention(q, (&empty, &empty), None, 2, Mask::None), "at least one key"),
    ];
    for (result, message) in cases {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(message), "{error:?} lacks {message:?}");
    }
    Ok(())
}

/// `cargo test --release --lib ops::attention -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn timings() -> Result<()> {
    for (problem, rounds) in [
        (Problem { batch: 4, n: 256, m: 256, reference: Some((256, 4)), heads: 4, d: 16, mask: Mask::None }, 10),
        (Problem { batch: 1, n: 1024, m: 1024, reference: Some((1024, 1)), heads: 10, d: 64, mask: Mask::None }, 3),
    ] {
        let variables = problem
            .inputs()?
            .iter()
            .map(|t| Ok(Var::from_tensor(&t.to_dtype(DType::F32)?)?.into_inner()))
            .collect::<Result<Vec<_>>>()?;
        let (mut forward, mut backward) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..rounds {
            let start = std::time::Instant::now();
            let output = problem.run(&variables)?;
            forward = forward.min(start.elapsed().as_secs_f64());
            let loss = output.sum_all()?;
            let start = std::time::Instant::now();
            loss.backward()?;
            backward = backward.min(start.elapsed().as_secs_f64());
        }
        println!("{problem:?}: forward {:.2} ms, backward {:.2} ms", forward * 1e3, backward * 1e3);
    }
    Ok(())
}

fn normal(purpose: &'static str, shape: &[usize]) -> Result<Tensor> {
    Address::new(7, purpose).normal(shape, DType::F64, &Device::Cpu)
}

#[test]
fn samples_that_do_not_see_the_reference_attend_to_their_own_keys_alone() -> Result<()> {
    let shapes = [[3, 5, 8], [3, 6, 8], [3, 6, 8], [1, 4, 8], [1, 4, 8]];
    let names = ["q", "k", "v", "k2", "v2"];
    let inputs: Vec<Tensor> =
        shapes.iter().zip(names).map(|(shape, name)| normal(name, shape)).collect::<Result<_>>()?;
    let (own, reference) = ((&inputs[1], &inputs[2]), (&inputs[3], &inputs[4]));
    let mixed = attention_where(&inputs[0], own, reference, &[true, false, true], 2)?;
    let with = attention(&inputs[0], own, Some(reference), 2, Mask::None)?;
    let without = attention(&inputs[0], own, None, 2, Mask::None)?;
    for (sample, expected) in [(0, &with), (1, &without), (2, &with)] {
        assert_eq!(distance(&mixed.get(sample)?, &expected.get(sample)?)?, 0.0, "sample {sample}");
    }
    // The samples that see it may be all the reference has.
    let first_two = [normal("k3", &[2, 4, 8])?, normal("v3", &[2, 4, 8])?];
    let partial = attention_where(&inputs[0], own, (&first_two[0], &first_two[1]), &[true, true, false], 2)?;
    assert_eq!(distance(&partial.get(2)?, &without.get(2)?)?, 0.0);
    let narrow = |t: &Tensor| t.narrow(0, 0, 2);
    let q2 = narrow(&inputs[0])?;
    let own2 = (narrow(own.0)?, narrow(own.1)?);
    let pair = attention(&q2, (&own2.0, &own2.1), Some((&first_two[0], &first_two[1])), 2, Mask::None)?;
    assert_eq!(distance(&partial.narrow(0, 0, 2)?, &pair)?, 0.0);
    let check = check_gradients(&inputs, |t| {
        Ok(vec![attention_where(&t[0], (&t[1], &t[2]), (&t[3], &t[4]), &[true, false, true], 2)?])
    })?;
    assert!(check.worst() < 1e-7, "{check:?}");
    Ok(())
}

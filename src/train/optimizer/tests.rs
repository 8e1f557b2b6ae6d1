use candle_core::{Device, Shape};

use super::*;
use crate::random::Address;

/// `torch.optim.AdamW`, one number at a time, in f64.
#[derive(Clone, Default)]
struct Scalar {
    value: f64,
    exp_avg: f64,
    exp_avg_sq: f64,
    step: i32,
}

impl Scalar {
    fn update(&mut self, gradient: f64, lr: f64, weight_decay: f64) {
        let (beta1, beta2, eps) = (0.9f64, 0.999f64, 1e-8);
        self.step += 1;
        self.value -= lr * weight_decay * self.value;
        self.exp_avg = beta1 * self.exp_avg + (1.0 - beta1) * gradient;
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1.0 - beta2) * gradient * gradient;
        let m_hat = self.exp_avg / (1.0 - beta1.powi(self.step));
        let v_hat = self.exp_avg_sq / (1.0 - beta2.powi(self.step));
        self.value -= lr * m_hat / (v_hat.sqrt() + eps);
    }
}

const LR: [f64; 2] = [1e-2, 3e-3];
const DECAY: [f64; 2] = [0.1, 0.0];

fn normal(purpose: &'static str, step: u64, shape: impl Into<Shape>, dtype: DType) -> Tensor {
    Address::new(3, purpose).step(step).normal(shape, dtype, &Device::Cpu).unwrap()
}

fn parameters(dtype: DType) -> (Parameters, Vec<ParameterGroup>) {
    let all = Parameters::new();
    all.insert("lora.up", Var::from_tensor(&normal("up", 0, (2, 3), dtype)).unwrap());
    all.insert("lora.idle", Var::from_tensor(&normal("idle", 0, 4, dtype)).unwrap());
    all.insert("adapter.proj", Var::from_tensor(&normal("proj", 0, 5, dtype)).unwrap());
    let group = |prefix: &'static str, index: usize| ParameterGroup {
        parameters: all.filter(|name| name.starts_with(prefix)),
        learning_rate: LR[index],
        weight_decay: DECAY[index],
    };
    let groups = vec![group("lora", 0), group("adapter", 1)];
    (all, groups)
}

/// Gradients of a step; `lora.idle` has none in the odd ones.
fn gradients(step: u64, dtype: DType) -> Gradients {
    let mut gradients = Gradients::new();
    gradients.insert("lora.up", normal("up gradient", step, (3, 2), dtype).t().unwrap());
    gradients.insert("adapter.proj", normal("proj gradient", step, 5, dtype));
    if step.is_multiple_of(2) {
        gradients.insert("lora.idle", normal("idle gradient", step, 4, dtype));
    }
    gradients
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn largest_difference_from_reference(dtype: DType, lr_factor: impl Fn(u64) -> f64) -> f64 {
    let (all, groups) = parameters(dtype);
    let start = |(name, variable): (String, Var)| {
        let scalars = numbers(&variable).into_iter().map(|value| Scalar { value, ..Scalar::default() }).collect();
        (name, scalars)
    };
    let mut reference: HashMap<String, Vec<Scalar>> = all.all().into_iter().map(start).collect();
    let mut optimizer = AdamW::new(groups, AdamWConfig::default()).unwrap();
    for step in 0..5 {
        let gradients = gradients(step, dtype);
        optimizer.step(&gradients, lr_factor(step)).unwrap();
        for (name, gradient) in gradients.iter() {
            let group = usize::from(name.starts_with("adapter"));
            for (scalar, gradient) in reference.get_mut(name).unwrap().iter_mut().zip(numbers(gradient)) {
                scalar.update(gradient, LR[group] * lr_factor(step), DECAY[group]);
            }
        }
    }
    assert_eq!(optimizer.step_count(), 5);
    let differences = all.all().into_iter().flat_map(|(name, variable)| {
        let expected: Vec<f64> = reference[&name].iter().map(|scalar| scalar.value).collect();
        numbers(&variable).into_iter().zip(expected).map(|(a, b)| (a - b).abs()).collect::<Vec<_>>()
    });
    differences.fold(0.0, f64::max)
}

#[test]
fn five_steps_with_two_groups_match_torch_adamw_in_f64() {
    let difference = largest_difference_from_reference(DType::F64, |_| 1.0);
    assert!(difference < 1e-14, "{difference}");
}

#[test]
fn five_steps_with_two_groups_match_torch_adamw_in_f32() {
    let difference = largest_difference_from_reference(DType::F32, |_| 1.0);
    assert!(difference < 1e-6, "{difference}");
}

#[test]
fn the_learning_rate_factor_scales_every_group() {
    let difference = largest_difference_from_reference(DType::F64, |step| 1.0 / (1.0 + step as f64));
    assert!(difference < 1e-14, "{difference}");
}

#[test]
fn the_update_by_tensor_operations_is_the_fused_one() {
    let run = |fused: bool| {
        let variable = Var::from_tensor(&normal("value", 0, (4, 5), DType::F64)).unwrap();
        let zeros = Tensor::zeros((4, 5), DType::F64, &Device::Cpu).unwrap();
        let mut moments = match fused {
            true => Moments::zeros(&variable).unwrap(),
            false => Moments::Tensors(zeros.clone(), zeros),
        };
        for step in 1..=5 {
            let update = Update::new(&AdamWConfig::default(), 1e-2, 0.1, step);
            moments.update(&variable, &normal("gradient", step, (4, 5), DType::F64), &update).unwrap();
        }
        numbers(&variable)
    };
    let difference = run(true).iter().zip(run(false)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(difference < 1e-14, "{difference}");
}

#[test]
fn a_parameter_larger_than_one_chunk_is_updated_throughout() {
    let all = Parameters::new();
    let count = 3 * (1 << 14) + 7;
    all.insert("large", Var::zeros(count, DType::F32, &Device::Cpu).unwrap());
    let group = ParameterGroup { parameters: all.clone(), learning_rate: 0.5, weight_decay: 0.0 };
    let mut optimizer = AdamW::new(vec![group], AdamWConfig::default()).unwrap();
    let mut gradients = Gradients::new();
    gradients.insert("large", Tensor::full(2f32, count, &Device::Cpu).unwrap());
    optimizer.step(&gradients, 1.0).unwrap();
    // The first update of Adam is the learning rate, whatever the gradient's size.
    assert!(numbers(&all.get("large").unwrap()).iter().all(|value| (value + 0.5).abs() < 1e-6));
}

#[test]
fn going_on_from_a_saved_state_is_bit_identical() {
    let (straight, groups) = parameters(DType::F32);
    let mut optimizer = AdamW::new(groups, AdamWConfig::default()).unwrap();
    let (resumed, groups) = parameters(DType::F32);
    let mut first_half = AdamW::new(groups.clone(), AdamWConfig::default()).unwrap();
    for step in 0..6 {
        optimizer.step(&gradients(step, DType::F32), 1.0).unwrap();
    }
    for step in 0..3 {
        first_half.step(&gradients(step, DType::F32), 1.0).unwrap();
    }
    let mut second_half = AdamW::new(groups, AdamWConfig::default()).unwrap();
    second_half.load_state("state", &first_half.state().unwrap()).unwrap();
    for step in 3..6 {
        second_half.step(&gradients(step, DType::F32), 1.0).unwrap();
    }
    assert_eq!(second_half.step_count(), 6);
    for (name, variable) in straight.all() {
        assert_eq!(numbers(&variable), numbers(&resumed.get(&name).unwrap()), "{name}");
    }
}

#[test]
fn a_state_that_lacks_a_tensor_or_has_another_shape_is_refused_by_name() {
    let (_, groups) = parameters(DType::F32);
    let mut optimizer = AdamW::new(groups, AdamWConfig::default()).unwrap();
    let mut state = optimizer.state().unwrap();
    state.insert("lora.up.exp_avg".into(), Tensor::zeros(6, DType::F32, &Device::Cpu).unwrap());
    let error = optimizer.load_state("optimizer.safetensors", &state).unwrap_err().to_string();
    assert_eq!(error, "optimizer.safetensors: tensor `lora.up.exp_avg`: expected shape [2, 3], found shape [6]");
    state.remove("lora.up.exp_avg");
    let error = optimizer.load_state("optimizer.safetensors", &state).unwrap_err().to_string();
    assert_eq!(error, "optimizer.safetensors: tensor `lora.up.exp_avg`: expected shape [2, 3], found nothing");
}

#[test]
fn a_gradient_of_another_shape_or_of_no_parameter_is_refused_and_nothing_is_updated() {
    let (all, groups) = parameters(DType::F32);
    let before = numbers(&all.get("adapter.proj").unwrap());
    let mut optimizer = AdamW::new(groups, AdamWConfig::default()).unwrap();
    let mut wrong = gradients(0, DType::F32);
    wrong.insert("lora.idle", Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    let error = optimizer.step(&wrong, 1.0).unwrap_err().to_string();
    assert_eq!(error, "gradients: tensor `lora.idle`: expected shape [4], found shape [3]");
    let mut stranger = gradients(0, DType::F32);
    stranger.insert("frozen", Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    let error = optimizer.step(&stranger, 1.0).unwrap_err().to_string();
    assert!(error.contains("`frozen`"), "{error}");
    assert_eq!((numbers(&all.get("adapter.proj").unwrap()), optimizer.step_count()), (before, 0));
}

#[test]
fn a_parameter_in_two_groups_is_refused() {
    let (all, mut groups) = parameters(DType::F32);
    groups.push(ParameterGroup { parameters: all, learning_rate: 1.0, weight_decay: 0.0 });
    let error = AdamW::new(groups, AdamWConfig::default()).unwrap_err().to_string();
    assert!(error.contains("each parameter in one group") && error.contains("in two of them"), "{error}");
}

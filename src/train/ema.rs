//! Exponential moving average of the trainable parameters.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::config::EmaConfig;
use super::optimizer::{read_integer, read_tensor};
use crate::Result;
use crate::nn::Parameters;

/// A moving average of parameters: at each update `average = decay * average + (1 - decay) * parameter`.
///
/// The averages are f32 (f64 for f64 parameters), on the parameters' device.
#[derive(Debug)]
pub struct Ema {
    parameters: Parameters,
    averages: HashMap<String, Tensor>,
    decay: f64,
    warmup: bool,
    update_count: u64,
}

impl Ema {
    /// An average that starts at the parameters' present values. With `warmup`, the decay of the n-th update (from 0) is
    /// `min(decay, (1 + n) / (10 + n))`, so that the start is soon forgotten.
    ///
    /// # Errors
    /// Where the device cannot hold a second copy of the parameters.
    pub fn new(parameters: &Parameters, decay: f64, warmup: bool) -> Result<Self> {
        let mut ema = Ema { parameters: parameters.clone(), averages: HashMap::new(), decay, warmup, update_count: 0 };
        ema.restart()?;
        Ok(ema)
    }

    /// Forgets the past: starts again at the parameters' present values.
    ///
    /// # Errors
    /// Where the device cannot hold a second copy of the parameters.
    pub fn restart(&mut self) -> Result<()> {
        let copies = self.parameters.all().into_iter().map(|(name, variable)| Ok((name, copy_of(&variable)?)));
        self.averages = copies.collect::<Result<_>>()?;
        self.update_count = 0;
        Ok(())
    }

    /// As the configuration says; none where it is turned off.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn from_config(parameters: &Parameters, config: &EmaConfig) -> Result<Option<Self>> {
        config.enabled.then(|| Self::new(parameters, config.decay, config.warmup)).transpose()
    }

    /// How many updates were made.
    pub fn update_count(&self) -> u64 {
        self.update_count
    }

    /// The decay that the next update uses.
    pub fn next_decay(&self) -> f64 {
        let n = self.update_count as f64;
        if self.warmup { self.decay.min((1.0 + n) / (10.0 + n)) } else { self.decay }
    }

    /// Moves the averages towards the parameters' present values. A parameter that came since is averaged from now on.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn update(&mut self) -> Result<()> {
        let rest = 1.0 - self.next_decay();
        #[cfg(feature = "cuda")]
        if self.update_on_gpu(rest)? {
            self.update_count += 1;
            return Ok(());
        }
        for (name, variable) in self.parameters.all() {
            let moved = match self.averages.get(&name) {
                Some(average) => {
                    let present = variable.as_detached_tensor().to_dtype(average.dtype())?;
                    (average + (present - average)?.affine(rest, 0.0)?)?
                }
                None => copy_of(variable.as_tensor())?,
            };
            self.averages.insert(name, moved);
        }
        self.update_count += 1;
        Ok(())
    }

    /// All averages in one kernel; false where one is missing, or a parameter is not f32 on a GPU.
    #[cfg(feature = "cuda")]
    fn update_on_gpu(&mut self, rest: f64) -> Result<bool> {
        use super::optimizer::cuda::{Part, step};
        let parameters = self.parameters.all();
        let mut parts = Vec::with_capacity(parameters.len());
        for (name, variable) in &parameters {
            match self.averages.get(name) {
                Some(average) if variable.device().is_cuda() && variable.dtype() == DType::F32 => {
                    let average = Some((average, rest));
                    parts.push(Part { parameter: variable.as_tensor(), update: None, average });
                }
                _ => return Ok(false),
            }
        }
        step(&parts, 0.0).map(|_| true)
    }

    /// The averages, by the parameters' names.
    pub fn averages(&self) -> &HashMap<String, Tensor> {
        &self.averages
    }

    /// Overwrites parameters with the averages, for good.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) where a parameter has no average of its shape; then nothing was changed.
    pub fn apply_to(&self, parameters: &Parameters) -> Result<()> {
        parameters.assign("moving average", &self.averages)
    }

    /// Runs a function while the parameters hold their averages, and puts them back after it, also where it fails.
    ///
    /// # Errors
    /// That of the function; [`Error::Tensor`](crate::Error::Tensor) where a parameter has no average; where the device cannot hold a copy.
    pub fn with_averages<T>(&self, run: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut present = HashMap::new();
        for (name, variable) in self.parameters.all() {
            present.insert(name, variable.copy()?.detach());
        }
        self.apply_to(&self.parameters)?;
        let result = run();
        self.parameters.assign("parameters before validation", &present)?;
        result
    }

    /// All that is needed to go on later: the averages by the parameters' names, and the i64 scalar `ema.update_count`.
    ///
    /// # Errors
    /// Where memory does not suffice.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::with_capacity(self.averages.len() + 1);
        for (name, average) in &self.averages {
            // A copy where an update changes the average in place.
            let average = if average.device().is_cpu() { average.clone() } else { average.to_device(&Device::Cpu)? };
            state.insert(name.clone(), average);
        }
        state.insert(UPDATE_COUNT.to_string(), Tensor::new(self.update_count as i64, &Device::Cpu)?);
        Ok(state)
    }

    /// Goes on from a [`state`](Self::state); `source` is what errors call it.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) naming the first tensor that is missing or has another shape; then nothing was changed.
    pub fn load_state(&mut self, source: &str, state: &HashMap<String, Tensor>) -> Result<()> {
        let update_count = read_integer(source, state, UPDATE_COUNT)?;
        let mut averages = HashMap::new();
        for (name, variable) in self.parameters.all() {
            let average = read_tensor(source, state, &name, variable.dims())?;
            averages.insert(name, average.to_dtype(average_dtype(variable.dtype()))?.to_device(variable.device())?);
        }
        self.averages = averages;
        self.update_count = update_count;
        Ok(())
    }
}

const UPDATE_COUNT: &str = "ema.update_count";

fn average_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// A copy that shares no storage with the variable, which changes in place.
fn copy_of(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.copy()?.detach().to_dtype(average_dtype(tensor.dtype()))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use candle_core::Var;

    fn parameter(value: f64) -> (Parameters, Var) {
        let parameters = Parameters::new();
        let variable = Var::new(&[value, -value], &Device::Cpu).unwrap();
        parameters.insert("p", variable.clone());
        (parameters, variable)
    }

    fn set(variable: &Var, value: f64) {
        variable.set(&Tensor::new(&[value, -value], &Device::Cpu).unwrap()).unwrap();
    }

    fn first(tensor: &Tensor) -> f64 {
        tensor.to_vec1::<f64>().unwrap()[0]
    }

    #[test]
    fn the_average_follows_its_recurrence() {
        let (parameters, variable) = parameter(1.0);
        let mut ema = Ema::new(&parameters, 0.9, false).unwrap();
        let mut expected = 1.0;
        for value in [2.0, 5.0, -3.0] {
            set(&variable, value);
            ema.update().unwrap();
            expected = 0.9 * expected + 0.1 * value;
        }
        assert!((first(&ema.averages()["p"]) - expected).abs() < 1e-14);
    }

    #[test]
    fn the_warm_up_starts_at_a_tenth_and_ends_at_the_decay() {
        let (parameters, _) = parameter(1.0);
        let mut ema = Ema::new(&parameters, 0.5, true).unwrap();
        let mut decays = Vec::new();
        for _ in 0..9 {
            decays.push(ema.next_decay());
            ema.update().unwrap();
        }
        assert_eq!(decays[..2], [0.1, 2.0 / 11.0]);
        assert_eq!(decays[8], 0.5);
    }

    #[test]
    fn parameters_come_back_after_validation_even_where_it_fails() {
        let (parameters, variable) = parameter(1.0);
        let ema = Ema::new(&parameters, 0.9, false).unwrap();
        set(&variable, 7.0);
        let seen = ema.with_averages(|| Ok(first(&variable))).unwrap();
        assert_eq!((seen, first(&variable)), (1.0, 7.0));
        let failed: Result<()> = ema.with_averages(|| Err(Error::argument("f", "a", "b", "c")));
        assert!(failed.is_err());
        assert_eq!(first(&variable), 7.0);
        ema.apply_to(&parameters).unwrap();
        assert_eq!(first(&variable), 1.0);
    }

    #[test]
    fn going_on_from_a_saved_state_is_bit_identical() {
        let (parameters, variable) = parameter(1.0);
        let mut straight = Ema::new(&parameters, 0.9, true).unwrap();
        set(&variable, 0.3);
        straight.update().unwrap();
        let mut resumed = Ema::new(&parameters, 0.9, true).unwrap();
        resumed.load_state("ema", &straight.state().unwrap()).unwrap();
        set(&variable, 0.7);
        straight.update().unwrap();
        resumed.update().unwrap();
        assert_eq!(first(&straight.averages()["p"]), first(&resumed.averages()["p"]));
        assert_eq!(straight.update_count(), resumed.update_count());
    }

    #[test]
    fn a_state_without_a_parameter_is_refused_by_name() {
        let (parameters, _) = parameter(1.0);
        let mut ema = Ema::new(&parameters, 0.9, true).unwrap();
        let mut state = ema.state().unwrap();
        state.remove("p");
        let error = ema.load_state("ema.safetensors", &state).unwrap_err().to_string();
        assert_eq!(error, "ema.safetensors: tensor `p`: expected shape [2], found nothing");
    }
}

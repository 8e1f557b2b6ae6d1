//! Cases of a fixture file, and how far what is computed lies from them.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use lcm_lookahead::nn::Weights;

/// The tensors `<case>.<name>` of a fixture file.
pub struct Case {
    name: String,
    tensors: HashMap<String, Tensor>,
}

impl Case {
    /// Loads a case of `tests/fixtures/<file>.safetensors`.
    pub fn load(file: &str, case: &str) -> Result<Self> {
        let path = fixture(&format!("{file}.safetensors"));
        let all = candle_core::safetensors::load(path, &Device::Cpu)?;
        let of_case =
            |(key, tensor): (String, Tensor)| Some((key.strip_prefix(case)?.strip_prefix('.')?.to_string(), tensor));
        Ok(Case { name: format!("{file}.{case}"), tensors: all.into_iter().filter_map(of_case).collect() })
    }

    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).with_context(|| format!("the fixture has no `{}.{name}`", self.name))
    }

    /// A tensor, converted.
    pub fn get_as(&self, name: &str, dtype: DType) -> Result<Tensor> {
        Ok(self.get(name)?.to_dtype(dtype)?)
    }

    /// The tensors under `weights.`, converted.
    pub fn weights_as(&self, dtype: DType) -> Result<Weights> {
        let weights = self.tensors.iter().filter_map(|(key, tensor)| Some((key.strip_prefix("weights.")?, tensor)));
        let tensors = weights.map(|(key, tensor)| Ok((key.to_string(), tensor.to_dtype(dtype)?)));
        Ok(Weights::frozen(&self.name, tensors.collect::<Result<_>>()?))
    }

    /// Fails unless the relative error `||found - expected|| / ||expected||` is below the limit; prints it.
    pub fn assert_within(&self, limit: f64, name: &str, found: &Tensor) -> Result<()> {
        let kind = found.dtype();
        let (expected, found) = (self.get_as(name, DType::F64)?, found.to_dtype(DType::F64)?);
        ensure!(found.dims() == expected.dims(), "{name}: shape {:?}, expected {:?}", found.dims(), expected.dims());
        let error = norm(&(found - &expected)?)? / norm(&expected)?;
        println!("{}.{name} ({kind:?}): relative error {error:.1e}", self.name);
        ensure!(error < limit, "{}.{name}: relative error {error:e}", self.name);
        Ok(())
    }
}

pub fn norm(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

/// The path of a fixture.
pub fn fixture(file: &str) -> String {
    format!("{}/tests/fixtures/{file}", env!("CARGO_MANIFEST_DIR"))
}

//! The noise schedule and the samplers against diffusers (`tests/fixtures/schedulers.py` writes the fixture).

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use lcm_lookahead::random::Address;
use lcm_lookahead::schedule::{Lcm, NoiseSchedule, Sampler, SamplerKind};

/// diffusers keeps the sigmas of Euler and DPM-Solver in float32.
const RELATIVE: f64 = 2e-6;

struct Fixture(HashMap<String, Tensor>);

impl Fixture {
    fn load() -> Result<Self> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/schedulers.safetensors");
        Ok(Fixture(candle_core::safetensors::load(path, &Device::Cpu)?))
    }

    fn get(&self, name: &str) -> Result<&Tensor> {
        self.0.get(name).with_context(|| format!("the fixture has no `{name}`"))
    }

    fn integers(&self, name: &str) -> Result<Vec<usize>> {
        Ok(self.get(name)?.to_vec1::<i64>()?.into_iter().map(|value| value as usize).collect())
    }

    /// The step counts the fixture holds for a sampler.
    fn step_counts(&self, kind: SamplerKind) -> Vec<usize> {
        let counts = self
            .0
            .keys()
            .filter_map(|key| key.strip_prefix(&format!("{kind}."))?.strip_suffix(".timesteps")?.parse::<usize>().ok());
        counts.collect()
    }
}

fn assert_close(what: &str, found: &Tensor, expected: &Tensor) -> Result<()> {
    let found = found.to_dtype(DType::F64)?;
    let error = (&found - expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
    let scale = expected.abs()?.max_all()?.to_scalar::<f64>()?.max(1.0);
    ensure!(error <= RELATIVE * scale, "{what}: differs by {error:e} at a scale of {scale:e}");
    Ok(())
}

/// Runs a sampler beside the fixture's, with `step` taking `(sampler, noise_prediction, i, latents)`.
fn compare<S: Sampler + ?Sized>(
    fixture: &Fixture,
    case: &str,
    sampler: &mut S,
    mut step: impl FnMut(&mut S, &Tensor, usize, &Tensor) -> Result<Tensor>,
) -> Result<()> {
    let get = |name: &str| fixture.get(&format!("{case}.{name}"));
    assert_eq!(sampler.timesteps(), fixture.integers(&format!("{case}.timesteps"))?, "{case}");
    let init_noise_sigma = get("init_noise_sigma")?.to_vec1::<f64>()?[0];
    ensure!((sampler.init_noise_sigma() / init_noise_sigma - 1.0).abs() < RELATIVE, "{case}: init_noise_sigma");

    let kept = fixture.integers(&format!("{case}.kept"))?;
    let mut latents = get("latents")?.clone();
    for i in 0..sampler.timesteps().len() {
        let angle = i as f64;
        let noise_prediction =
            ((get("prediction_a")? * angle.cos())? + (get("prediction_b")? * angle.sin())?)?.contiguous()?;
        let input = sampler.scale_model_input(&latents, i)?;
        let next = step(sampler, &noise_prediction, i, &latents)?;
        if let Some(at) = kept.iter().position(|&step| step == i) {
            assert_close(&format!("{case}: model input of step {i}"), &input, &get("model_input")?.get(at)?)?;
            assert_close(&format!("{case}: latents after step {i}"), &next, &get("next_latents")?.get(at)?)?;
        }
        latents = next;
    }
    Ok(())
}

fn compare_deterministic(kind: SamplerKind) -> Result<()> {
    let fixture = Fixture::load()?;
    let counts = fixture.step_counts(kind);
    ensure!(counts.len() >= 4, "the fixture holds {} cases for {kind}", counts.len());
    for steps in counts {
        let mut sampler = kind.build(&NoiseSchedule::sdxl(), steps)?;
        compare(&fixture, &format!("{kind}.{steps}"), sampler.as_mut(), |sampler, noise_prediction, i, latents| {
            Ok(sampler.step(noise_prediction, i, latents, Address::new(0, "unused"))?)
        })?;
    }
    Ok(())
}

#[test]
fn ddim_is_that_of_diffusers() -> Result<()> {
    compare_deterministic(SamplerKind::Ddim)
}

#[test]
fn euler_is_that_of_diffusers() -> Result<()> {
    compare_deterministic(SamplerKind::Euler)
}

#[test]
fn dpm_solver_is_that_of_diffusers() -> Result<()> {
    compare_deterministic(SamplerKind::DpmSolverPlusPlus)
}

#[test]
fn lcm_is_that_of_diffusers_given_its_noise() -> Result<()> {
    let fixture = Fixture::load()?;
    let counts = fixture.step_counts(SamplerKind::Lcm);
    ensure!(counts.len() >= 4, "the fixture holds {} cases for lcm", counts.len());
    for steps in counts {
        let case = format!("lcm.{steps}");
        let noise = fixture.get(&format!("{case}.noise"))?;
        let mut sampler = Lcm::new(&NoiseSchedule::sdxl(), steps)?;
        compare(&fixture, &case, &mut sampler, |sampler, noise_prediction, i, latents| {
            Ok(sampler.step_with_noise(noise_prediction, i, latents, &noise.get(i)?)?)
        })?;
    }
    Ok(())
}

#[test]
fn the_noise_schedule_is_that_of_diffusers() -> Result<()> {
    let fixture = Fixture::load()?;
    let schedule = NoiseSchedule::sdxl();
    let alphas_cumprod = fixture.get("alphas_cumprod")?.to_vec1::<f64>()?;
    assert_eq!(alphas_cumprod.len(), schedule.timestep_count());
    for (t, expected) in alphas_cumprod.into_iter().enumerate() {
        let found = schedule.alpha_cumprod(t)?;
        ensure!((found / expected - 1.0).abs() < 1e-12, "abar at {t}: {found} for {expected}");
    }
    let timesteps = fixture.integers("add_noise.timesteps")?;
    let (latents, noise) = (fixture.get("add_noise.latents")?, fixture.get("add_noise.noise")?);
    let expected = fixture.get("add_noise.noised")?;
    assert_close("noised latents", &schedule.add_noise(latents, noise, &timesteps)?, expected)?;
    let (latents, noise) = (latents.to_dtype(DType::F32)?, noise.to_dtype(DType::F32)?);
    assert_close("noised f32 latents", &schedule.add_noise(&latents, &noise, &timesteps)?, expected)
}

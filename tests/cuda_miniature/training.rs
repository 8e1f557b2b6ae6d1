//! Training steps of the miniature.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lcm_lookahead::Result;
use lcm_lookahead::data::{Batch, DatasetConfig, FaceDataset, GenerateConfig, generate_dataset};
use lcm_lookahead::face::Template;
use lcm_lookahead::lookahead::{Base, FaceEncoder, ImageLoss};
use lcm_lookahead::nn::{Parameters, Weights};
use lcm_lookahead::random::Address;
use lcm_lookahead::schedule::AnnealedTimestepSampler;
use lcm_lookahead::train::config::UpdateMode;
use lcm_lookahead::train::{AdapterInit, LossReport, StepLosses, TrainConfig, Trainer};
use lcm_lookahead::{cuda, mini};

use crate::common::{FACE, FixedLocator, tiny_adapter, tiny_config};
use crate::{error, gpu, numbers, squares};

pub fn adapter() -> Result<AdapterInit> {
    Ok(AdapterInit { resampler: mini::face_encoder_config().resampler, tensors: mini::adapter_tensors()? })
}

pub fn dataset(folder: &Path, size: u32) -> Result<FaceDataset> {
    let config = GenerateConfig {
        out: folder.to_path_buf(),
        identities: 2,
        images_per_identity: 4,
        size,
        ..GenerateConfig::default()
    };
    generate_dataset(&config, |_, _| {})?;
    FaceDataset::open(&DatasetConfig::new(folder, size))
}

/// A joint step of the miniature with its trained base, whose encoder's every parameter is a random number.
struct Step {
    parameters: Parameters,
    encoder: FaceEncoder,
    base: Base,
    config: TrainConfig,
    batch: Batch,
    image_losses: Vec<(Box<dyn ImageLoss>, f64)>,
}

impl Step {
    fn new(dataset: &FaceDataset, dtype: DType, device: &Device, recompute: bool) -> Result<Self> {
        // Where a face is found must not depend on rounding.
        let locator = FixedLocator(Some(Template::Loose.landmarks(mini::RESOLUTION)));
        let base = Base { face_locator: Arc::new(locator), ..mini::base(dtype, device)? };
        let mut config = TrainConfig::mini();
        (config.train_batch_size, config.lookahead.batch_size, config.recompute) = (2, 2, recompute);
        config.lookahead.identity_weight = 0.5;
        let parameters = Parameters::new();
        let weights = Weights::trainable(&parameters, 7, DType::F32, device);
        let encoder = FaceEncoder::load(&mini::face_encoder_config(), &base.unet, &weights, &weights)?;
        for (i, (_, variable)) in parameters.all().into_iter().enumerate() {
            let noise = Address::new(9, "value").sample(i).normal(variable.shape(), DType::F32, device)?;
            variable.set(&(variable.as_tensor() + (noise * 0.05)?)?)?;
        }
        let image_losses: Vec<(Box<dyn ImageLoss>, f64)> = vec![(Box::new(base.identity_loss()), 0.5)];
        let batch = dataset.batch(0, 0, 0, 1, 2, &Device::Cpu)?;
        Ok(Step { parameters, encoder, base, config, batch, image_losses })
    }

    fn run(&self) -> Result<(LossReport, Vec<(String, Tensor)>)> {
        // Timesteps early enough for the preview of both samples.
        let sampler = AnnealedTimestepSampler::new(0.2, 900, 1000)?;
        let losses = StepLosses {
            base: &self.base,
            encoder: &self.encoder,
            config: &self.config,
            image_losses: &self.image_losses,
            diffusion_timesteps: &sampler,
            lookahead_timesteps: &sampler,
        };
        let mut report = LossReport::default();
        let prepared = losses.prepare(&self.batch, 3)?;
        let store = losses.joint(&prepared, 1, 3, true, &mut report)?.backward()?;
        let gradient = |(name, variable): (String, candle_core::Var)| {
            let gradient = store.get(&variable).unwrap_or_else(|| panic!("no gradient for {name}")).clone();
            (name, gradient)
        };
        Ok((report, self.parameters.all().into_iter().map(gradient).collect()))
    }
}

#[test]
fn losses_and_gradients_of_a_joint_step_equal_the_cpu() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(folder.path(), mini::RESOLUTION as u32)?;
    let (expected, gradients) = Step::new(&dataset, DType::F32, &Device::Cpu, false)?.run()?;
    assert_eq!(expected.lookahead[0].2, 2, "both samples show a face");
    let mut failures = Vec::new();
    for (dtype, recompute, loss_limit) in
        [(DType::F32, false, 1e-4), (DType::F32, true, 1e-4), (DType::BF16, false, 2e-2), (DType::BF16, true, 2e-2)]
    {
        let (report, found) = Step::new(&dataset, dtype, &device, recompute)?.run()?;
        let apart = |a: f64, b: f64| (a - b).abs() / b.abs();
        let diffusion = apart(report.diffusion.unwrap(), expected.diffusion.unwrap());
        let identity = apart(report.lookahead[0].1, expected.lookahead[0].1);
        let (mut difference, mut norm, mut worst) = (0.0, 0.0, (0.0, String::new()));
        for ((name, found), (other, expected)) in found.iter().zip(&gradients) {
            assert_eq!((name, found.dtype()), (other, DType::F32));
            let (d, n) = squares(found, expected);
            (difference, norm) = (difference + d, norm + n);
            let error = error(found, expected);
            if !(error <= worst.0) {
                worst = (error, name.clone());
            }
        }
        let whole = (difference / norm).sqrt();
        println!(
            "joint step {dtype:?}, recompute {recompute}: diffusion {diffusion:.2e}, identity {identity:.2e}, gradient as \
             a whole {whole:.2e}, worst tensor {:.2e} ({})",
            worst.0, worst.1
        );
        let gradient = if dtype == DType::F32 { worst.0 } else { whole };
        if !(diffusion < loss_limit && identity < loss_limit && gradient < loss_limit) {
            failures.push(format!("{dtype:?}, recompute {recompute}: {diffusion:.2e} {identity:.2e} {gradient:.2e}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    Ok(())
}

/// Diffusion and identity loss of each of some training steps.
fn curve(trainer: &mut Trainer, steps: usize) -> Result<Vec<[f64; 2]>> {
    let losses = |trainer: &mut Trainer| {
        let report = trainer.train_step()?.losses;
        let identity = report.lookahead.first().map_or(0.0, |(_, value, counted)| value * *counted as f64);
        Ok([report.diffusion.unwrap(), identity])
    };
    (0..steps).map(|_| losses(trainer)).collect()
}

#[test]
fn thirty_steps_follow_the_loss_curve_of_the_cpu() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    dataset(&data, mini::RESOLUTION as u32)?;
    let mut config = TrainConfig::mini();
    (config.train_batch_size, config.lookahead.batch_size) = (2, 2);
    config.ema.enabled = true;
    let run = |dtype: DType, device: &Device| -> Result<Vec<[f64; 2]>> {
        let dataset = FaceDataset::open(&DatasetConfig::new(&data, mini::RESOLUTION as u32))?;
        let base = mini::base(dtype, device)?;
        let mut trainer = Trainer::new(base, &adapter()?, dataset, config.clone(), folder.path().join("run"))?;
        let trained = trainer.parameters().all();
        assert!(trained.iter().all(|(_, variable)| variable.dtype() == DType::F32), "trained in f32");
        curve(&mut trainer, 30)
    };
    let expected = run(DType::F32, &Device::Cpu)?;
    assert!(expected.iter().filter(|[_, identity]| *identity > 0.0).count() > 5, "the lookahead loss takes part");
    let mut worst = [0.0f64; 2];
    for (dtype, limit) in [(DType::F32, 1e-3), (DType::BF16, f64::INFINITY)] {
        let found = run(dtype, &device)?;
        let apart = |a: &[f64; 2], b: &[f64; 2]| [0, 1].map(|i| (a[i] - b[i]).abs() / b[i].abs().max(1e-12));
        worst = found
            .iter()
            .zip(&expected)
            .map(|(a, b)| apart(a, b))
            .fold([0.0; 2], |w, e| [w[0].max(e[0]), w[1].max(e[1])]);
        println!("thirty steps {dtype:?}: worst diffusion {:.2e}, identity {:.2e}", worst[0], worst[1]);
        assert!(worst[0] < limit && worst[1] < limit, "{dtype:?}: {worst:?}");
    }
    // In bf16 single steps differ by rounding, and a face may be found in one run and not in the other.
    assert!(worst[0] < 5e-2, "bf16: {worst:?}");
    Ok(())
}

#[test]
fn a_run_on_the_gpu_that_is_resumed_equals_one_that_was_not_interrupted() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    cuda::set_deterministic(true);
    for (mode, dtype) in [(UpdateMode::Joint, DType::F32), (UpdateMode::Alternating, DType::BF16)] {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        dataset(&data, 32)?;
        let mut config = tiny_config();
        config.update_mode = mode;
        config.ema.enabled = true;
        config.max_train_steps = 6;
        let trainer = |run: &str, steps: u64| -> Result<Trainer> {
            let base = Base { face_locator: Arc::new(FixedLocator(Some(FACE))), ..mini::tiny_base(1, dtype, &device)? };
            let config = TrainConfig { max_train_steps: steps, ..config.clone() };
            let dataset = FaceDataset::open(&DatasetConfig::new(&data, 32))?;
            Trainer::new(base, &tiny_adapter(), dataset, config, folder.path().join(run))
        };
        let mut straight = trainer("straight", 6)?;
        straight.run()?;
        trainer("halves", 3)?.run()?;
        let mut second = trainer("halves", 6)?;
        assert!(second.resume()? && second.step() == 3);
        second.run()?;
        let values = |trainer: &Trainer| -> Vec<(String, Vec<f64>)> {
            trainer.parameters().all().into_iter().map(|(name, variable)| (name, numbers(&variable))).collect()
        };
        assert!(values(&straight) == values(&second), "{mode:?} {dtype:?}: the parameters differ");
    }
    cuda::set_deterministic(false);
    Ok(())
}

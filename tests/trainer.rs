//! The trainer, on a base whose networks all are tiny and random.

mod common;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use common::{FACE, portraits, tiny_adapter, tiny_base, tiny_config};
use lcm_lookahead::lookahead::{FaceEncoder, FaceEncoderConfig, ImageLoss, KvEncoderConfig, PreviewPath};
use lcm_lookahead::nn::{LoraSet, Parameters, Weights};
use lcm_lookahead::random::Address;
use lcm_lookahead::schedule::AnnealedTimestepSampler;
use lcm_lookahead::train::config::UpdateMode;
use lcm_lookahead::train::{PendingReport, StepLosses, TrainConfig, Trainer};
use lcm_lookahead::{Error, Guidance, Personalizer, Result};

fn trainer(config: TrainConfig, data: &std::path::Path, output: &std::path::Path) -> Result<Trainer> {
    Trainer::new(tiny_base(DType::F32, Some(FACE))?, &tiny_adapter(), portraits(data, 2, 4)?, config, output)
}

fn values(parameters: &Parameters) -> Result<Vec<(String, Vec<u32>)>> {
    let bits = |v: &Var| -> Result<Vec<u32>> {
        Ok(v.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    };
    parameters.all().iter().map(|(name, variable)| Ok((name.clone(), bits(variable)?))).collect()
}

#[test]
fn resuming_gives_bit_identical_parameters() -> Result<()> {
    for mode in [UpdateMode::Joint, UpdateMode::Alternating] {
        let folder = tempfile::tempdir().unwrap();
        let mut config = tiny_config();
        config.update_mode = mode;
        config.ema.enabled = true;
        config.max_train_steps = 20;
        let (data, straight, halves) =
            (folder.path().join("data"), folder.path().join("straight"), folder.path().join("halves"));

        let mut whole = trainer(config.clone(), &data, &straight)?;
        whole.run()?;

        let mut first = trainer(TrainConfig { max_train_steps: 10, ..config.clone() }, &data, &halves)?;
        first.run()?;
        drop(first);
        let mut second = trainer(config, &data, &halves)?;
        assert!(second.resume()?);
        assert_eq!(second.step(), 10);
        second.run()?;

        assert_eq!(values(whole.parameters())?, values(second.parameters())?, "{mode:?}");
        let log = |run: &std::path::Path| std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let losses = |text: String| -> Vec<serde_json::Value> {
            text.lines()
                .map(|line| {
                    let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
                    line.as_object_mut().unwrap().remove("seconds");
                    line
                })
                .collect()
        };
        assert_eq!(losses(log(&straight)).len(), 20);
        assert_eq!(losses(log(&straight)), losses(log(&halves)), "{mode:?}");
    }
    Ok(())
}

#[test]
fn an_older_checkpoint_is_not_resumed_over_newer_ones() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (folder.path().join("data"), folder.path().join("run"));
    let mut config = tiny_config();
    (config.max_train_steps, config.checkpointing.every_n_steps) = (2, 1);
    trainer(config.clone(), &data, &run)?.run()?;
    let error = trainer(config, &data, &run)?.resume_from(run.join("checkpoint-1")).unwrap_err();
    assert!(error.to_string().contains("checkpoint-2"), "{error}");
    Ok(())
}

#[test]
fn alternating_makes_two_updates_and_joint_one() -> Result<()> {
    for (mode, updates) in [(UpdateMode::Joint, 1), (UpdateMode::Alternating, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let config = TrainConfig { update_mode: mode, ..tiny_config() };
        let mut trainer = trainer(config, &folder.path().join("data"), &folder.path().join("run"))?;
        let report = trainer.train_step()?;
        assert_eq!(report.gradient_norms.len(), updates);
        assert_eq!(report.losses.lookahead[0].2, 2, "both samples show a face");
        assert!(report.losses.diffusion.is_some());
    }
    Ok(())
}

#[test]
fn accumulated_batches_count_as_one_update_of_their_mean() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny_config();
    config.gradient_accumulation_steps = 3;
    for mode in [UpdateMode::Joint, UpdateMode::Alternating] {
        config.update_mode = mode;
        let mut trainer = trainer(config.clone(), &folder.path().join("data"), &folder.path().join("run"))?;
        let report = trainer.train_step()?;
        assert_eq!(report.losses.lookahead[0].2, 6, "three batches of two");
        assert!(report.losses.diffusion.is_some_and(|loss| loss > 0.1 && loss < 10.0));
    }
    Ok(())
}

#[test]
fn through_x0_the_image_loss_sees_the_denoiser_without_the_lcm_lora() -> Result<()> {
    // Value of the identity loss, and the norm of its gradient.
    let first_step = |through, bare: bool| -> Result<(f64, f64)> {
        let folder = tempfile::tempdir().unwrap();
        let mut config = TrainConfig { update_mode: UpdateMode::Alternating, ..tiny_config() };
        config.lookahead.through = through;
        let mut base = tiny_base(DType::F64, Some(FACE))?;
        if bare {
            base.lcm_lora = LoraSet::default();
        }
        let data = portraits(&folder.path().join("data"), 2, 4)?;
        let report = Trainer::new(base, &tiny_adapter(), data, config, folder.path())?.train_step()?;
        assert_eq!(report.losses.lora_scale.is_some(), through == PreviewPath::Lcm);
        Ok((report.losses.lookahead[0].1, report.gradient_norms[1]))
    };
    let x0 = first_step(PreviewPath::X0, false)?;
    assert_eq!(x0, first_step(PreviewPath::X0, true)?);
    assert_eq!(x0, first_step(PreviewPath::Lcm, true)?);
    let lcm = first_step(PreviewPath::Lcm, false)?;
    assert!((x0.0 - lcm.0).abs() > 1e-9 && (x0.1 - lcm.1).abs() > 1e-9, "{x0:?} and {lcm:?}");
    Ok(())
}

#[test]
fn without_a_kv_branch_the_adapter_alone_is_trained_saved_and_drawn_with() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = TrainConfig { max_train_steps: 1, ..tiny_config() };
    config.adapter.kv_branch = false;
    let run = folder.path().join("run");
    let mut trainer = trainer(config, &folder.path().join("data"), &run)?;
    assert!(trainer.parameters().all().iter().all(|(name, _)| FaceEncoder::is_adapter_parameter(name)));
    trainer.run()?;
    let resampler = &tiny_adapter().resampler;
    let personalizer = Personalizer::from_checkpoint(tiny_base(DType::F32, Some(FACE))?, resampler, &run)?;
    assert!(matches!(personalizer.default_options().guidance, Guidance::Plain { .. }));
    Ok(())
}

#[test]
fn without_a_face_only_the_diffusion_loss_is_trained() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let dataset = portraits(&folder.path().join("data"), 1, 2)?;
    let base = tiny_base(DType::F32, None)?;
    let config = TrainConfig { update_mode: UpdateMode::Alternating, ..tiny_config() };
    let mut trainer = Trainer::new(base, &tiny_adapter(), dataset, config, folder.path().join("run"))?;
    let report = trainer.train_step()?;
    assert_eq!((report.losses.lookahead[0].2, report.gradient_norms.len()), (0, 1));
    Ok(())
}

#[test]
fn a_frozen_adapter_stays_as_it_is() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny_config();
    config.adapter.optimize_adapter = false;
    let mut trainer = trainer(config, &folder.path().join("data"), &folder.path().join("run"))?;
    let before: HashMap<_, _> = values(trainer.parameters())?.into_iter().collect();
    trainer.train_step()?;
    for (name, after) in values(trainer.parameters())? {
        let changed = before[&name] != after;
        // A fresh LoRA's first gradient goes to its upper half alone, since that is zero.
        let expected = !FaceEncoder::is_adapter_parameter(&name) && name.ends_with("lora_B.weight");
        assert_eq!(changed || name.ends_with("lora_A.weight"), expected || name.ends_with("lora_A.weight"), "{name}");
    }
    Ok(())
}

#[test]
fn a_resolution_that_is_not_the_bases_is_refused() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny_config();
    config.data.resolution = 64;
    let error = trainer(config, &folder.path().join("data"), &folder.path().join("run")).err().unwrap();
    assert!(matches!(&error, Error::Config { field, .. } if field == "data.resolution"), "{error}");
    Ok(())
}

/// A whole step of the method in f64, whose every parameter is a random number.
struct Step {
    parameters: Parameters,
    encoder: FaceEncoder,
    base: lcm_lookahead::lookahead::Base,
    config: TrainConfig,
    batch: lcm_lookahead::data::Batch,
    image_losses: Vec<(Box<dyn ImageLoss>, f64)>,
}

impl Step {
    fn new(recompute: bool) -> Result<Self> {
        let folder = tempfile::tempdir().unwrap();
        let batch = portraits(folder.path(), 2, 2)?.batch(0, 0, 0, 1, 2, &Device::Cpu)?;
        let base = tiny_base(DType::F64, Some(FACE))?;
        let mut config = tiny_config();
        config.recompute = recompute;
        config.dropout.kv_drop_chance = 0.2;
        config.dropout.adapter_drop_chance = 0.5;
        let parameters = Parameters::new();
        let weights = Weights::trainable(&parameters, 7, DType::F64, &Device::Cpu);
        let kv_encoder = KvEncoderConfig { encoder_lora_rank: 2, kv_lora_rank: 2, blocks: vec![] };
        let shape = FaceEncoderConfig { resampler: tiny_adapter().resampler, kv_encoder: Some(kv_encoder) };
        let encoder = FaceEncoder::load(&shape, &base.unet, &weights, &weights)?;
        for (i, (_, variable)) in parameters.all().into_iter().enumerate() {
            let noise = Address::new(9, "value").sample(i).normal(variable.shape(), DType::F64, &Device::Cpu)?;
            variable.set(&(variable.as_tensor() + (noise * 0.2)?)?)?;
        }
        let image_losses: Vec<(Box<dyn ImageLoss>, f64)> = vec![(Box::new(base.identity_loss()), 0.7)];
        Ok(Step { parameters, encoder, base, config, batch, image_losses })
    }

    fn loss(&self, alternating: bool) -> Result<Tensor> {
        let sampler = AnnealedTimestepSampler::new(0.2, 1000, 1000)?;
        let losses = StepLosses {
            base: &self.base,
            encoder: &self.encoder,
            config: &self.config,
            image_losses: &self.image_losses,
            diffusion_timesteps: &sampler,
            lookahead_timesteps: &sampler,
        };
        let mut report = PendingReport::default();
        let prepared = losses.prepare(&self.batch, 3)?;
        match alternating {
            false => losses.joint(&prepared, 1, 3, true, &mut report),
            true => {
                let diffusion = losses.diffusion(&prepared, 3, &mut report)?;
                Ok((diffusion + losses.lookahead(&prepared, 1, 3, &mut report)?.unwrap())?)
            }
        }
    }
}

#[test]
fn the_whole_steps_gradient_matches_finite_differences() -> Result<()> {
    let step = Step::new(false)?;
    for alternating in [false, true] {
        let gradients = step.loss(alternating)?.backward()?;
        for (i, (name, variable)) in step.parameters.all().into_iter().enumerate() {
            let gradient = gradients.get(&variable).unwrap_or_else(|| panic!("no gradient for {name}"));
            let direction =
                Address::new(2, "direction").sample(i).normal(variable.shape(), DType::F64, &Device::Cpu)?;
            let direction = (&direction / direction.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())?;
            let value = variable.as_tensor().detach().copy()?;
            let at = |distance: f64| -> Result<f64> {
                variable.set(&(&value + (&direction * distance)?)?)?;
                Ok(step.loss(alternating)?.to_scalar::<f64>()?)
            };
            let numeric = (at(1e-5)? - at(-1e-5)?) / 2e-5;
            variable.set(&value)?;
            let analytic = (gradient * direction)?.sum_all()?.to_scalar::<f64>()?;
            let error = (analytic - numeric).abs() / numeric.abs().max(1e-4);
            assert!(error < 1e-5, "{name}: {analytic} and {numeric}");
        }
    }
    Ok(())
}

#[test]
fn only_parameters_are_leaves_of_the_whole_steps_graph() -> Result<()> {
    let step = Step::new(false)?;
    let loss = step.loss(false)?;
    let parameters: Vec<_> = step.parameters.all().iter().map(|(_, variable)| variable.as_tensor().id()).collect();
    let leaves: Vec<_> = loss.sorted_nodes().into_iter().filter(|node| node.is_variable()).map(Tensor::id).collect();
    assert_eq!(leaves.len(), parameters.len());
    assert!(leaves.iter().all(|leaf| parameters.contains(leaf)));
    Ok(())
}

#[test]
fn recomputation_gives_the_same_gradients() -> Result<()> {
    let (plain, recomputed) = (Step::new(false)?, Step::new(true)?);
    let (a, b) = (plain.loss(false)?.backward()?, recomputed.loss(false)?.backward()?);
    for ((name, first), (_, second)) in plain.parameters.all().iter().zip(recomputed.parameters.all()) {
        let (first, second) = (a.get(first).unwrap(), b.get(&second).unwrap());
        let scale = first.abs()?.max_all()?.to_scalar::<f64>()?;
        let difference = (first - second)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(difference <= 1e-12 * scale, "{name}: {difference} of {scale}");
    }
    Ok(())
}

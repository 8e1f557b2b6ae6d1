//! The miniature, with the weights that are part of the crate.

use candle_core::{DType, Device};
use lcm_lookahead::Result;
use lcm_lookahead::data::{DatasetConfig, FaceDataset, GenerateConfig, generate_dataset};
use lcm_lookahead::mini;
use lcm_lookahead::train::{AdapterInit, TrainConfig, Trainer};

#[test]
fn both_losses_fall_when_two_pictures_are_learnt_by_heart() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let generate =
        GenerateConfig { out: data.clone(), identities: 1, images_per_identity: 2, ..GenerateConfig::default() };
    generate_dataset(&generate, |_, _| {})?;
    let mut config = TrainConfig::mini();
    config.train_batch_size = 2;
    config.lookahead.batch_size = 2;
    config.lookahead.identity_weight = 0.03;
    config.optimizer.learning_rate = 1e-3;
    config.optimizer.adapter_lr = 1e-3;
    config.optimizer.lr_warmup_steps = 0;
    config.dropout.adapter_drop_chance = 0.0;
    let adapter = AdapterInit { resampler: mini::face_encoder_config().resampler, tensors: mini::adapter_tensors()? };
    let dataset = FaceDataset::open(&DatasetConfig::new(data, mini::RESOLUTION as u32))?;
    let base = mini::base(DType::F32, &Device::Cpu)?;
    let mut trainer = Trainer::new(base, &adapter, dataset, config, folder.path().join("run"))?;

    // The same pictures, timesteps and noise before and after, none of which training meets.
    let losses = |trainer: &Trainer| -> Result<(f64, f64)> {
        let (mut diffusion, mut identity, mut counted) = (0.0, 0.0, 0);
        for step in 10_000..10_006 {
            let report = trainer.evaluate(step)?;
            let (_, value, samples) = &report.lookahead[0];
            diffusion += report.diffusion.unwrap_or(f64::NAN) / 6.0;
            identity += value * *samples as f64;
            counted += samples;
        }
        assert!(counted > 0, "no preview showed a face");
        Ok((diffusion, identity / counted as f64))
    };
    let before = losses(&trainer)?;
    for _ in 0..100 {
        trainer.train_step()?;
    }
    let after = losses(&trainer)?;
    println!("diffusion and identity loss: {before:?}, then {after:?}");
    // Measured: 0.95 and 0.58 of what they were.
    assert!(after.0 < 0.97 * before.0, "the diffusion loss went from {} to {}", before.0, after.0);
    assert!(after.1 < 0.75 * before.1, "the identity loss went from {} to {}", before.1, after.1);
    Ok(())
}

//! The miniature's work, end to end: one training iteration, one step of sampling.
//!
//! `cargo bench --bench training_step`

use candle_core::{DType, Device};
use criterion::{Criterion, criterion_group, criterion_main};
use lcm_lookahead::Result;
use lcm_lookahead::data::{DatasetConfig, FaceDataset, GenerateConfig, generate_dataset};
use lcm_lookahead::mini;
use lcm_lookahead::personalize::{Options, Personalizer};
use lcm_lookahead::train::config::UpdateMode;
use lcm_lookahead::train::{AdapterInit, TrainConfig, Trainer};

fn adapter() -> Result<AdapterInit> {
    Ok(AdapterInit { resampler: mini::face_encoder_config().resampler, tensors: mini::adapter_tensors()? })
}

fn trainer(folder: &std::path::Path, change: impl Fn(&mut TrainConfig)) -> Result<Trainer> {
    let data = folder.join("data");
    let generate =
        GenerateConfig { out: data.clone(), identities: 2, images_per_identity: 4, ..GenerateConfig::default() };
    generate_dataset(&generate, |_, _| {})?;
    let mut config = TrainConfig::mini();
    config.validation.every_n_steps = 0;
    change(&mut config);
    let dataset = FaceDataset::open(&DatasetConfig::new(data, mini::RESOLUTION as u32))?;
    Trainer::new(mini::base(DType::F32, &Device::Cpu)?, &adapter()?, dataset, config, folder.join("run"))
}

fn training(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("training iteration, batch 4");
    group.sample_size(10);
    type Change = fn(&mut TrainConfig);
    let cases: [(&str, Change); 4] = [
        ("joint", |_| {}),
        ("joint, recomputed", |config| config.recompute = true),
        ("alternating", |config| config.update_mode = UpdateMode::Alternating),
        ("diffusion loss only", |config| config.lookahead.every_k_steps = 0),
    ];
    for (name, change) in cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut trainer = trainer(folder.path(), change).expect("a trainer");
        group.bench_function(name, |bencher| bencher.iter(|| trainer.train_step().expect("a training step")));
    }
    group.finish();
}

fn sampling(criterion: &mut Criterion) {
    let base = mini::base(DType::F32, &Device::Cpu).expect("the miniature");
    let adapter = adapter().expect("the adapter");
    let personalizer = Personalizer::from_adapter(base, &adapter.resampler, adapter.tensors).expect("a personalizer");
    let portrait = mini::portrait::Portrait::shipped().render(mini::RESOLUTION as u32).image;
    let reference = personalizer.reference(&portrait).expect("a reference");
    let prompts = ["a photo of a face".to_string()];
    let mut group = criterion.benchmark_group("one picture");
    group.sample_size(10);
    for (name, options) in
        [("1 step, guided", Options { steps: 1, ..personalizer.default_options() }), ("4 steps of LCM", Options::lcm())]
    {
        group.bench_function(name, |bencher| {
            bencher.iter(|| personalizer.generate(&reference, &prompts, &options).expect("a picture"))
        });
    }
    group.finish();
}

criterion_group!(benches, training, sampling);
criterion_main!(benches);

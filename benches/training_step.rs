//! The method's work, end to end: one training iteration, one picture. The miniature's on the CPU, in f32; with
//! `--features cuda` SDXL's on the GPU, at 1024 pixels, of random weights, in bf16.
//!
//! `cargo bench --bench training_step`. An iteration reads and prepares its pictures; `bench_sdxl` has times without.

mod support;

use candle_core::Device;
use criterion::{Criterion, criterion_group, criterion_main};
use lcm_lookahead::Result;
use lcm_lookahead::data::{DatasetConfig, FaceDataset, GenerateConfig, generate_dataset};
use lcm_lookahead::mini::portrait::Portrait;
use lcm_lookahead::personalize::{Options, Personalizer};
use lcm_lookahead::train::config::UpdateMode;
use lcm_lookahead::train::{TrainConfig, Trainer};
use support::networks;

/// SDXL is trained as the paper says, its activations recomputed: 80 GB do not hold them.
fn config() -> TrainConfig {
    if !support::ON_GPU {
        return TrainConfig::mini();
    }
    let mut config = TrainConfig::paper();
    config.train_batch_size = 4;
    config.lookahead.batch_size = 4;
    config
}

fn trainer(folder: &std::path::Path, device: &Device, change: impl Fn(&mut TrainConfig)) -> Result<Trainer> {
    let data = folder.join("data");
    let generate =
        GenerateConfig { out: data.clone(), identities: 2, images_per_identity: 4, ..GenerateConfig::default() };
    generate_dataset(&generate, |_, _| {})?;
    let mut config = config();
    config.validation.every_n_steps = 0;
    change(&mut config);
    let dataset = FaceDataset::open(&DatasetConfig::new(data, networks::RESOLUTION as u32))?;
    let base = networks::base(device)?;
    let adapter = networks::adapter(&base)?;
    Trainer::new(base, &adapter, dataset, config, folder.join("run"))
}

fn training(criterion: &mut Criterion) {
    let device = support::device();
    let mut group = support::group(criterion, "training iteration, batch 4");
    type Change = fn(&mut TrainConfig);
    let cases: [(&str, Change); 4] = [
        ("joint", |_| {}),
        ("joint, recomputed", |config| config.recompute = true),
        ("alternating", |config| config.update_mode = UpdateMode::Alternating),
        ("diffusion loss only", |config| config.lookahead.every_k_steps = 0),
    ];
    // On the GPU the first would be the second.
    for (name, change) in cases.into_iter().skip(usize::from(support::ON_GPU)) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut trainer = trainer(folder.path(), &device, change).expect("a trainer");
        group.bench_function(name, |bencher| support::time(bencher, &device, || trainer.train_step()));
    }
    group.finish();
}

fn sampling(criterion: &mut Criterion) {
    let device = support::device();
    let base = networks::base(&device).expect("the networks");
    let adapter = networks::adapter(&base).expect("the adapter");
    let personalizer = Personalizer::from_adapter(base, &adapter.resampler, adapter.tensors).expect("a personalizer");
    let portrait = Portrait::shipped().render(networks::RESOLUTION as u32).image;
    let reference = personalizer.reference(&portrait).expect("a reference");
    let prompts = ["a photo of a face".to_string()];
    let mut group = support::group(criterion, "one picture");
    for (name, options) in
        [("1 step, guided", Options { steps: 1, ..personalizer.default_options() }), ("4 steps of LCM", Options::lcm())]
    {
        group.bench_function(name, |bencher| {
            support::time(bencher, &device, || personalizer.generate(&reference, &prompts, &options));
        });
    }
    group.finish();
}

criterion_group!(benches, training, sampling);
criterion_main!(benches);

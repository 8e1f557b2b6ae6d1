//! The rows of the tables that compare encoders: one is made, then judged.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use lcm_lookahead::data::to_tensor;
use lcm_lookahead::mini::RESOLUTION;
use lcm_lookahead::mini::portrait::HELD_OUT_COMBINATIONS;
use lcm_lookahead::personalize::Options;
use lcm_lookahead::train::LrSchedule;
use lcm_lookahead::{FaceDataset, Guidance, Personalizer, TrainConfig, Trainer};

use crate::evaluation::{self, Metrics};
use crate::outcome::Outcome;
use crate::people;
use crate::plan::Unit;
use crate::setting::Setting;

/// The pretrained IP-Adapter as it is, with its image tokens at a scale.
pub fn adapter(setting: &Setting, unit: Unit, scale: f64) -> anyhow::Result<Outcome> {
    let adapter = &setting.adapter;
    let personalizer = Personalizer::from_adapter(setting.base.clone(), &adapter.resampler, adapter.tensors.clone())?;
    evaluate(setting, unit, &personalizer, scale, setting.guidance(false))
}

/// The renderer's own pictures of the people in the prompts: what a perfect model would draw.
pub fn portraits(setting: &Setting, unit: Unit) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let (people, prompts) = (people::evaluated(&setting.size), people::prompts());
    let metrics = evaluation::of_pictures(setting, unit, |shown, texts, _, _| {
        let pictures = shown.iter().zip(texts).map(|(person, text)| {
            let place = prompts.iter().position(|prompt| prompt == text).unwrap_or(0);
            let (style, scene) = HELD_OUT_COMBINATIONS[place];
            let drawn = people::portrait(&people[*person], style, scene).render(RESOLUTION as u32);
            to_tensor(&drawn.image, &setting.base.device)
        });
        Ok(candle_core::Tensor::stack(&pictures.collect::<lcm_lookahead::Result<Vec<_>>>()?, 0)?)
    })?;
    Ok(outcome(setting, unit, metrics, [("evaluation", start.elapsed().as_secs_f64())]))
}

/// The IP-Adapter after training with a configuration that differs from the experiments' in what `change` does to it.
pub fn trained(setting: &Setting, unit: Unit, change: fn(&mut TrainConfig)) -> anyhow::Result<Outcome> {
    trained_on(setting, unit, people::training_set(setting)?, change)
}

/// The same on other pictures.
pub fn trained_on(
    setting: &Setting,
    unit: Unit,
    dataset: FaceDataset,
    change: fn(&mut TrainConfig),
) -> anyhow::Result<Outcome> {
    watched(setting, unit, dataset, change, |_, _| Ok(()))
}

/// The same, with a look at the encoder before every iteration (its number is given) and after the last one.
pub fn watched(
    setting: &Setting,
    unit: Unit,
    dataset: FaceDataset,
    change: impl Fn(&mut TrainConfig),
    mut watch: impl FnMut(u64, &Trainer) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let mut config = configuration(setting, unit.seed);
    change(&mut config);
    let kv_branch = config.adapter.kv_branch;
    let mut trainer = Trainer::new(setting.base.clone(), &setting.adapter, dataset, config, run_folder(setting, unit))?;
    let (mut seconds, mut first_half, steps) = (0.0, 0.0, setting.size.steps);
    let (mut diffusion, mut lookahead, mut norms) = (Vec::new(), Vec::new(), [Vec::new(), Vec::new()]);
    for step in 0..steps {
        watch(step, &trainer)?;
        if step == steps / 2 {
            first_half = seconds;
        }
        let start = Instant::now();
        let report = trainer.train_step().with_context(|| format!("{}: step {step}", unit.name()))?;
        norms.iter_mut().zip(&report.gradient_norms).for_each(|(norms, norm)| norms.push(*norm));
        diffusion.extend(report.losses.diffusion);
        lookahead
            .extend(report.losses.lookahead.first().filter(|(.., counted)| *counted > 0).map(|(_, loss, _)| *loss));
        seconds += start.elapsed().as_secs_f64();
        if (step + 1) % steps.div_ceil(4) == 0 {
            let rate = (step + 1) as f64 / seconds;
            println!("{}: iteration {} of {steps}, {rate:.2} a second", unit.name(), step + 1);
        }
    }
    watch(steps, &trainer)?;
    // Of the second half: the first iterations on a GPU also load its kernels.
    let rate = (steps - steps / 2) as f64 / (seconds - first_half);
    // The trained encoder is kept, for `personalize --checkpoint` for instance.
    trainer.save_checkpoint().with_context(|| unit.name())?;
    let personalizer = trainer.personalizer()?;
    // What training held on to is not needed for sampling.
    drop(trainer);
    let mut outcome = evaluate(setting, unit, &personalizer, 1.0, setting.guidance(kv_branch))?;
    outcome.speed.extend([("training".to_string(), seconds), ("steps_per_second".into(), rate)]);
    // Losses and the norms of their gradients (of alternating updates one after the other) at the beginning and at the
    // end, each over a tenth of the run.
    let [norm, second_norm] = norms;
    let curves = [("diffusion", diffusion), ("identity_loss", lookahead), ("norm", norm), ("second_norm", second_norm)];
    for (name, losses) in curves {
        let tenth = losses.len().div_ceil(10).max(1);
        let ends = [("first", losses.chunks(tenth).next()), ("last", losses.rchunks(tenth).next())];
        let means = ends.into_iter().filter_map(|(end, part)| {
            let part = part.filter(|part| !part.is_empty())?;
            Some((end.to_string(), crate::statistics::mean(part.iter().copied())))
        });
        outcome.parts.insert(name.into(), means.collect());
    }
    Ok(outcome)
}

/// Where a trained row's encoder is kept.
pub fn run_folder(setting: &Setting, unit: Unit) -> PathBuf {
    setting.out.join("runs").join(unit.name())
}

/// What all trained rows have in common: the whole method.
pub fn configuration(setting: &Setting, seed: u64) -> TrainConfig {
    let (size, chosen) = (&setting.size, &setting.hyperparameters);
    let mut config = TrainConfig::mini();
    config.seed = seed;
    config.max_train_steps = size.steps;
    config.train_batch_size = size.batch;
    config.lookahead.batch_size = size.batch;
    config.lookahead.identity_weight = chosen.identity_weight;
    config.optimizer.learning_rate = chosen.learning_rate;
    config.optimizer.adapter_lr = chosen.adapter_lr;
    config.optimizer.lr_scheduler = LrSchedule::Cosine;
    config.optimizer.lr_warmup_steps = size.steps / 20;
    config
}

/// Judges an encoder that draws with its image tokens at a scale, and with a guidance.
pub fn evaluate(
    setting: &Setting,
    unit: Unit,
    personalizer: &Personalizer,
    adapter_scale: f64,
    guidance: Guidance,
) -> anyhow::Result<Outcome> {
    let options =
        Options { steps: setting.size.sampling_steps, guidance, adapter_scale, ..personalizer.default_options() };
    let start = Instant::now();
    let metrics = evaluation::of_encoder(setting, unit, personalizer, &options)?;
    Ok(outcome(setting, unit, metrics, [("evaluation", start.elapsed().as_secs_f64())]))
}

fn outcome(
    setting: &Setting,
    unit: Unit,
    (metrics, parts): Metrics,
    speed: impl IntoIterator<Item = (&'static str, f64)>,
) -> Outcome {
    let speed: BTreeMap<String, f64> = speed.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
    let (row, fingerprint) = (unit.row.to_string(), setting.fingerprint.clone());
    Outcome { row, seed: unit.seed, fingerprint, metrics, parts, speed }
}

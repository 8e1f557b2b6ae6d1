//! What keeps previews near the model's own pictures while the identity loss pulls at them (section 4.2 of the paper).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use image::RgbImage;
use lcm_lookahead::data::{from_tensor, load_image, save_png};
use lcm_lookahead::mini::RESOLUTION;
use lcm_lookahead::personalize::Options;
use lcm_lookahead::train::config::{AlignmentConfig, AlignmentLoss};
use lcm_lookahead::train::{ContactSheet, TrainConfig, Trainer};
use lcm_lookahead::{Guidance, Personalizer, SamplerKind};

use crate::alignment::compare;
use crate::encoders::watched;
use crate::outcome::{Outcome, Outcomes};
use crate::people;
use crate::plan::{Plan, Row, Unit};
use crate::setting::Setting;
use crate::statistics::mean;

/// How much of the training is done when previews are looked at, in percent.
const LOOKS: [u64; 5] = [0, 12, 25, 50, 100];
/// The identity loss weighs so many times what it weighs in the other experiments: what a long run does shows sooner.
const STRENGTH: f64 = 5.0;
/// Timestep of the previews half of the way.
const MIDDLE: usize = 499;
const SHOWN: usize = 4;

const SDS: AlignmentLoss = AlignmentLoss::Sds;
const CONSISTENCY: AlignmentLoss = AlignmentLoss::Consistency;

pub const PLAN: Plan = Plan {
    name: "keeping",
    title: "Keeping the preview aligned (section 4.2)",
    rows: &[
        Row { name: "keeping-plain", title: "plain lookahead", run: |s, u| measure(s, u, |_, _| {}) },
        Row {
            name: "keeping-rescaled",
            title: "random scale of the LCM-LoRA",
            run: |s, u| measure(s, u, |_, config| config.lookahead.lora_scale.full_probability = 0.5),
        },
        Row { name: "keeping-sds", title: "score distillation", run: |s, u| measure(s, u, |s, c| beside(s, c, SDS)) },
        Row {
            name: "keeping-consistency",
            title: "consistency loss",
            run: |s, u| measure(s, u, |s, c| beside(s, c, CONSISTENCY)),
        },
    ],
    table,
    sheet,
};

/// Sets a loss beside the identity loss. By default the teacher is guided as the LCM-LoRA's was.
fn beside(setting: &Setting, config: &mut TrainConfig, loss: AlignmentLoss) {
    let guidance_scale = setting.hyperparameters.teacher_guidance;
    config.lookahead.alignment =
        AlignmentConfig { loss, weight: 1.0, guidance_scale, ..config.lookahead.alignment.clone() };
}

/// Trains an encoder, looks at its previews on the way, and judges it as the other experiments do.
fn measure(setting: &Setting, unit: Unit, change: fn(&Setting, &mut TrainConfig)) -> anyhow::Result<Outcome> {
    let steps = setting.size.steps;
    let mut looks = BTreeMap::new();
    let configure = |config: &mut TrainConfig| {
        config.lookahead.identity_weight *= STRENGTH;
        config.lookahead.lora_scale.full_probability = 1.0;
        change(setting, config);
    };
    let mut outcome = watched(setting, unit, people::training_set(setting)?, configure, |step, trainer| {
        for percent in LOOKS.into_iter().filter(|percent| percent * steps / 100 == step) {
            looks.extend(look(setting, unit, percent, trainer)?);
        }
        Ok(())
    })?;
    outcome.parts.extend(looks);
    Ok(outcome)
}

/// The model's own pictures of some people in the prompts, and previews of the same; what tells them apart.
fn look(
    setting: &Setting,
    unit: Unit,
    percent: u64,
    trainer: &Trainer,
) -> anyhow::Result<BTreeMap<String, BTreeMap<String, f64>>> {
    let (personalizer, judge) = (trainer.personalizer()?, &setting.judge);
    let (identities, prompts) = (people::evaluated(&setting.size), people::prompts());
    let photographs: Vec<_> = identities.iter().map(people::photograph).collect();
    let photographs = people::stack(&photographs, &setting.base.device)?;
    let everyone = personalizer.reference_from_tensor(&photographs)?;
    let own = Options {
        seed: 7_000_000 + unit.seed,
        steps: setting.size.sampling_steps,
        sampler: SamplerKind::Ddim,
        guidance: setting.guidance(true),
        ..personalizer.default_options()
    };
    let places: Vec<usize> = (0..setting.size.samples).collect();
    let mut values: BTreeMap<String, BTreeMap<String, Vec<f64>>> = BTreeMap::new();
    for (chunk, places) in places.chunks(setting.chunk()).enumerate() {
        let shown: Vec<usize> = places.iter().map(|place| place % identities.len()).collect();
        let texts: Vec<String> = places.iter().map(|place| prompts[place % prompts.len()].clone()).collect();
        let reference = everyone.select(&shown)?;
        let people: Vec<u32> = shown.iter().map(|person| *person as u32).collect();
        let people = candle_core::Tensor::from_vec(people, shown.len(), photographs.device())?;
        let faces = photographs.index_select(&people, 0)?;
        let own = Options { seed: own.seed + 1000 * chunk as u64, ..own.clone() };
        let last = personalizer.generate_tensor(&reference, &texts, &own)?.detach().clamp(-1.0, 1.0)?;
        let start = one_step(&personalizer, &reference, &texts, &own)?.detach().clamp(-1.0, 1.0)?;
        let middle = personalizer.previews(&reference, &texts, &last, MIDDLE, &own)?.detach().clamp(-1.0, 1.0)?;
        for (name, pictures) in [("own", &last), ("start", &start), ("middle", &middle)] {
            let part = values.entry(format!("{percent} % {name}")).or_default();
            for (network, by) in [("taught", &judge.taught), ("held out", &judge.held_out)] {
                let cosines = judge.identity(by, pictures, &faces)?;
                part.entry(network.into()).or_default().extend(cosines.into_iter().map(|cosine| cosine.unwrap_or(0.0)));
            }
            if name != "own" {
                for (measure, numbers) in compare(setting, pictures, &last)? {
                    part.entry(measure.into()).or_default().extend(numbers);
                }
            }
            if chunk == 0 && unit.seed == setting.first_seed {
                for sample in 0..SHOWN.min(places.len()) {
                    let path = kept(&setting.out, unit.row, percent, name, sample);
                    save_png(&from_tensor(&pictures.get(sample)?)?, path)?;
                }
            }
        }
    }
    let means = |values: BTreeMap<String, Vec<f64>>| -> BTreeMap<String, f64> {
        values.into_iter().map(|(name, numbers)| (name, mean(numbers.into_iter()))).collect()
    };
    Ok(values.into_iter().map(|(part, values)| (part, means(values))).collect())
}

/// The preview from nothing but the noise that the model's own pictures start from too.
fn one_step(
    personalizer: &Personalizer,
    reference: &lcm_lookahead::personalize::Reference,
    texts: &[String],
    own: &Options,
) -> lcm_lookahead::Result<candle_core::Tensor> {
    let options = Options { sampler: SamplerKind::Lcm, steps: 1, guidance: Guidance::None, ..own.clone() };
    personalizer.generate_tensor(reference, texts, &options)
}

/// How near previews are to the model's own pictures, over the run, and what the encoder is worth at its end.
fn table(plan: &Plan, outcomes: &Outcomes) -> String {
    let mut text = String::new();
    let looks: Vec<String> = LOOKS.iter().map(|percent| format!("{percent} %")).collect();
    let tables = [
        ("start", "clip", "Preview from noise against the model's own picture: CLIP's cosine"),
        ("start", "error", "Preview from noise against the model's own picture: mean absolute error"),
        ("middle", "clip", "Preview of the model's own picture, noised half of the way: CLIP's cosine"),
        ("middle", "error", "Preview of the model's own picture, noised half of the way: mean absolute error"),
        ("start", "taught", "Preview from noise against the photograph: the loss's identity network"),
        ("own", "taught", "The model's own picture against the photograph: the loss's identity network"),
        ("start", "held out", "Preview from noise against the photograph: the held-out identity network"),
        ("own", "held out", "The model's own picture against the photograph: the held-out identity network"),
    ];
    for (picture, metric, title) in tables {
        text += &format!("{title}, after so much of the training:\n\n| | {} |\n", looks.join(" | "));
        text += &format!("|---|{}\n", "---|".repeat(LOOKS.len()));
        for row in plan.rows {
            let cell = |percent: &u64| {
                let estimate = outcomes.part(row.name, &format!("{percent} % {picture}"), metric);
                estimate.map_or("–".into(), |estimate| estimate.text(3))
            };
            text += &format!("| {} | {} |\n", row.title, LOOKS.iter().map(cell).collect::<Vec<_>>().join(" | "));
        }
        text += "\n";
    }
    text += "The encoders at the end of the training:\n\n";
    text + &crate::report::encoder_table(plan, outcomes)
}

fn kept(out: &Path, row: &str, percent: u64, name: &str, sample: usize) -> PathBuf {
    out.join("pictures").join(row).join(format!("{percent}-{name}-{sample}.png"))
}

/// For each row: previews from noise above the model's own pictures, at the beginning and at the end.
fn sheet(plan: &Plan, outcomes: &Outcomes) -> anyhow::Result<Option<RgbImage>> {
    let side = RESOLUTION as u32;
    let (mut sheet, mut any) = (ContactSheet::new(side, side), false);
    for row in plan.rows {
        for (name, title) in [("start", "preview"), ("own", "own")] {
            let mut cells = Vec::new();
            for percent in [LOOKS[0], LOOKS[LOOKS.len() - 1]] {
                for sample in 0..SHOWN {
                    let path = kept(&outcomes.out, row.name, percent, name, sample);
                    if path.is_file() {
                        let row = row.name.trim_start_matches("keeping-");
                        cells.push((format!("{row} {title} {percent} %"), load_image(&path)?));
                    }
                }
            }
            if !cells.is_empty() {
                any = true;
                sheet.add_row(cells)?;
            }
        }
    }
    Ok(any.then(|| sheet.render()))
}

//! Guidance of the latents by a loss on the picture they will become (figure 5 of the paper).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::{D, DType, Tensor};
use image::RgbImage;
use lcm_lookahead::data::{from_tensor, load_image, save_png};
use lcm_lookahead::lookahead::{ClipImageLoss, FeatureLoss};
use lcm_lookahead::mini::RESOLUTION;
use lcm_lookahead::personalize::{LatentGuidance, TextToImage, TextToImageOptions, Through};
use lcm_lookahead::random::Address;
use lcm_lookahead::train::ContactSheet;
use lcm_lookahead::{ImageLoss, SamplerKind};

use crate::alignment::sharpness;
use crate::outcome::{Outcome, Outcomes};
use crate::people;
use crate::plan::{Plan, Row, Unit};
use crate::setting::Setting;
use crate::statistics::mean;

/// DDIM steps, and how many of them are left where the latents are guided (paper, section 5.1).
const STEPS: usize = 50;
const AT: usize = 44;
/// Gradient steps and their length; the paper names neither, and they were not tuned.
const REPEATS: usize = 20;
const STEP_SIZE: f64 = 0.05;
const PROMPT: &str = "a photo of a face";
const SHOWN: usize = 5;

pub const PLAN: Plan = Plan {
    name: "guidance",
    title: "Guidance at t = 44 of 50 (figure 5)",
    rows: &[
        Row { name: "guidance-none", title: "none", run: |s, u| measure(s, u, None) },
        Row { name: "guidance-perceptual-x0", title: "perceptual, x0", run: |s, u| measure(s, u, PERCEPTUAL_X0) },
        Row { name: "guidance-perceptual-lcm", title: "perceptual, LCM", run: |s, u| measure(s, u, PERCEPTUAL_LCM) },
        Row { name: "guidance-clip-x0", title: "CLIP, x0", run: |s, u| measure(s, u, CLIP_X0) },
        Row { name: "guidance-clip-lcm", title: "CLIP, LCM", run: |s, u| measure(s, u, CLIP_LCM) },
        Row { name: "guidance-identity-x0", title: "identity, x0", run: |s, u| measure(s, u, IDENTITY_X0) },
        Row { name: "guidance-identity-lcm", title: "identity, LCM", run: |s, u| measure(s, u, IDENTITY_LCM) },
    ],
    table,
    sheet,
};

const PERCEPTUAL_X0: Option<(Loss, bool)> = Some((Loss::Perceptual, false));
const PERCEPTUAL_LCM: Option<(Loss, bool)> = Some((Loss::Perceptual, true));
const CLIP_X0: Option<(Loss, bool)> = Some((Loss::Clip, false));
const CLIP_LCM: Option<(Loss, bool)> = Some((Loss::Clip, true));
const IDENTITY_X0: Option<(Loss, bool)> = Some((Loss::Identity, false));
const IDENTITY_LCM: Option<(Loss, bool)> = Some((Loss::Identity, true));

#[derive(Clone, Copy)]
enum Loss {
    Perceptual,
    Clip,
    Identity,
}

/// Draws people from text alone, guided by their photographs with a loss, through the LCM or through x0.
fn measure(setting: &Setting, unit: Unit, guided: Option<(Loss, bool)>) -> anyhow::Result<Outcome> {
    let (base, judge, start) = (&setting.base, &setting.judge, Instant::now());
    let loss: Option<Box<dyn ImageLoss>> = guided.map(|(loss, _)| -> Box<dyn ImageLoss> {
        let tower = || Arc::new(judge.vision().clone());
        match loss {
            Loss::Perceptual => Box::new(FeatureLoss::new(tower())),
            Loss::Clip => Box::new(ClipImageLoss::new(tower())),
            Loss::Identity => Box::new(base.identity_loss()),
        }
    });
    let text_to_image = TextToImage::new(base);
    let options = TextToImageOptions {
        steps: STEPS,
        sampler: SamplerKind::Ddim,
        guidance_scale: setting.hyperparameters.guidance_scale,
        ..TextToImageOptions::default()
    };
    let identities = people::evaluated(&setting.size);
    let side = base.resolution / base.encoder.factor();
    let (mut values, mut gain): (BTreeMap<&str, Vec<f64>>, Vec<f64>) = Default::default();
    for (chunk, shown) in identities.chunks(setting.chunk()).enumerate() {
        let photographs: Vec<_> = shown.iter().map(people::photograph).collect();
        let target = people::stack(&photographs, &base.device)?.to_dtype(base.dtype)?;
        let prompts = vec![PROMPT.to_string(); shown.len()];
        // The same noise in every row.
        let noise = Address::new(unit.seed, "guidance noise").step(chunk as u64);
        let noise = noise.normal_batch(shown.len(), (4, side, side), base.dtype, &base.device)?;
        let pictures = match (&loss, guided) {
            (Some(loss), Some((_, lcm))) => {
                let guidance = LatentGuidance {
                    loss: loss.as_ref(),
                    target: &target,
                    through: if lcm { Through::Preview(base.lcm_lora.clone()) } else { Through::X0 },
                    decoder: base.preview_decoder.clone(),
                    at: AT,
                    repeats: REPEATS,
                    step_size: STEP_SIZE,
                    recompute: false,
                };
                let guided = text_to_image.generate_guided(&prompts, &noise, &options, &guidance)?;
                gain.extend(guided.losses.first().zip(guided.losses.last()).map(|(first, last)| last - first));
                guided.images
            }
            _ => text_to_image.generate(&prompts, &noise, &options)?,
        };
        let pictures = pictures.detach().clamp(-1.0, 1.0)?;
        for (name, by) in [("identity", &judge.held_out), ("identity_taught", &judge.taught)] {
            let cosines = judge.identity(by, &pictures, &target)?;
            if name == "identity" {
                let faces = cosines.iter().map(|cosine| if cosine.is_some() { 100.0 } else { 0.0 });
                values.entry("faces").or_default().extend(faces);
            }
            values.entry(name).or_default().extend(cosines.into_iter().map(|cosine| cosine.unwrap_or(0.0)));
        }
        let each = |values: Tensor| -> anyhow::Result<Vec<f64>> { Ok(values.to_dtype(DType::F64)?.to_vec1::<f64>()?) };
        let clip = (judge.embed(&pictures)? * judge.embed(&target)?)?.sum(D::Minus1)?;
        values.entry("clip").or_default().extend(each(clip)?);
        let error = (&pictures - &target)?.abs()?.flatten_from(1)?.mean(1)?;
        values.entry("error").or_default().extend(each(error)?);
        values.entry("sharpness").or_default().extend(each(sharpness(&pictures)?)?);
        let text = judge.text(&pictures, &prompts)?;
        values.entry("text").or_default().extend(text.iter().map(|fit| 100.0 * fit.cosine));
        if chunk == 0 && unit.seed == setting.first_seed {
            for sample in 0..SHOWN.min(shown.len()) {
                save_png(&from_tensor(&pictures.get(sample)?)?, kept(&setting.out, unit.row, sample))?;
            }
        }
    }
    let mut metrics: BTreeMap<String, f64> =
        values.into_iter().map(|(name, numbers)| (name.to_string(), mean(numbers.into_iter()))).collect();
    if !gain.is_empty() {
        metrics.insert("loss_change".into(), mean(gain.into_iter()));
    }
    Ok(Outcome {
        row: unit.row.into(),
        seed: unit.seed,
        fingerprint: setting.fingerprint.clone(),
        metrics,
        parts: BTreeMap::new(),
        speed: BTreeMap::from([("measuring".to_string(), start.elapsed().as_secs_f64())]),
    })
}

/// Identity similarities, as below the pictures of figure 5, and what else changes.
fn table(plan: &Plan, outcomes: &Outcomes) -> String {
    let mut text =
        "| loss, through | identity | by the loss's network | faces found, % | CLIP | mean absolute error | \
                    sharpness | text | change of the loss |\n"
            .to_string();
    text += "|---|---|---|---|---|---|---|---|---|\n";
    for row in plan.rows {
        let columns = [
            ("identity", 3),
            ("identity_taught", 3),
            ("faces", 1),
            ("clip", 3),
            ("error", 3),
            ("sharpness", 3),
            ("text", 2),
            ("loss_change", 3),
        ];
        let cells: Vec<String> = columns.iter().map(|(name, digits)| outcomes.cell(row.name, name, *digits)).collect();
        text += &format!("| {} | {} |\n", row.title, cells.join(" | "));
    }
    let people = outcomes.size.people;
    text + &format!(
        "\n{people} pictures of \"{PROMPT}\" in {STEPS} DDIM steps, {REPEATS} gradient steps of {STEP_SIZE} where {AT} are \
         left. Identity, CLIP and mean absolute error compare with the guiding photograph, text with the prompt; sharpness \
         is the mean difference of neighbouring pixels. The CLIP loss and the column CLIP see by the same network, as do \
         the identity loss and the second column. Change of the loss: from the first gradient step to the last, as the \
         guidance saw it. Intervals: 95 %, over seeds.\n"
    )
}

fn kept(out: &Path, row: &str, sample: usize) -> PathBuf {
    out.join("pictures").join(row).join(format!("{sample}.png"))
}

/// The guiding photographs, and below them each row's pictures.
fn sheet(plan: &Plan, outcomes: &Outcomes) -> anyhow::Result<Option<RgbImage>> {
    let side = RESOLUTION as u32;
    let (mut sheet, mut any) = (ContactSheet::new(side, side), false);
    let shown = people::evaluated(&outcomes.size);
    let guiding = shown.iter().take(SHOWN).map(|person| ("guiding picture".to_string(), people::photograph(person)));
    sheet.add_row(guiding.collect())?;
    for row in plan.rows {
        let mut cells = Vec::new();
        for sample in 0..SHOWN {
            let path = kept(&outcomes.out, row.name, sample);
            if path.is_file() {
                cells.push((row.title.to_string(), load_image(&path)?));
            }
        }
        if !cells.is_empty() {
            any = true;
            sheet.add_row(cells)?;
        }
    }
    Ok(any.then(|| sheet.render()))
}

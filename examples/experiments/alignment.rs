//! How near one-step previews are to the final picture (figure 2 of the paper).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use candle_core::{D, DType, Tensor};
use image::RgbImage;
use lcm_lookahead::data::{from_tensor, load_image, save_png};
use lcm_lookahead::mini::RESOLUTION;
use lcm_lookahead::random::Address;
use lcm_lookahead::train::ContactSheet;
use lcm_lookahead::{Conditioning, LoraSet, Loras, Pass, PreviewForm, Result, SamplerKind, preview};

use crate::outcome::{Outcome, Outcomes};
use crate::people;
use crate::personal_lora;
use crate::plan::{Plan, Row, Unit};
use crate::setting::Setting;
use crate::statistics::mean;

/// How much of the way samples are denoised before the preview, in percent.
const DENOISED: [usize; 5] = [0, 10, 25, 50, 100];
/// The one-step predictions: of the denoiser as it is, of the guided denoiser as the sampler sees it, of the LCM.
const METHODS: [(&str, &str); 3] = [("x0", "x0"), ("guided-x0", "x0, guided"), ("lcm", "LCM preview")];
const SHOWN: usize = 3;

pub const PLAN: Plan = Plan {
    name: "alignment",
    title: "Alignment of one-step previews with the final picture (figure 2)",
    rows: &[
        Row { name: "alignment-base", title: "base model", run: |setting, unit| measure(setting, unit, false) },
        Row {
            name: "alignment-lora",
            title: "with a personal LoRA",
            run: |setting, unit| measure(setting, unit, true),
        },
    ],
    table,
    sheet,
};

/// Samples by DDIM; on the way, predicts their ends in one step.
fn measure(setting: &Setting, unit: Unit, personalised: bool) -> anyhow::Result<Outcome> {
    let (size, start) = (&setting.size, Instant::now());
    let personal = match personalised {
        true => personal_lora::train(setting, &people::evaluated(size)[0], unit.seed)?,
        false => LoraSet::default(),
    };
    let prompts: Vec<String> = people::prompts().into_iter().cycle().take(size.samples).collect();
    let mut values: BTreeMap<String, BTreeMap<String, Vec<f64>>> = BTreeMap::new();
    for (chunk, prompts) in prompts.chunks(setting.chunk()).enumerate() {
        let address = Address::new(unit.seed, "alignment noise").step(chunk as u64);
        let (predictions, last) = denoise(setting, prompts, &personal, address)?;
        for (denoised, method, picture) in predictions {
            let part = values.entry(part(denoised, method)).or_default();
            for (name, numbers) in compare(setting, &picture, &last)? {
                part.entry(name.into()).or_default().extend(numbers);
            }
            if chunk == 0 && unit.seed == setting.first_seed {
                keep(setting, unit, &format!("{method}-{denoised}"), &picture)?;
            }
        }
        if chunk == 0 && unit.seed == setting.first_seed {
            keep(setting, unit, "final", &last)?;
        }
    }
    let means = |values: BTreeMap<String, Vec<f64>>| -> BTreeMap<String, f64> {
        values.into_iter().map(|(name, numbers)| (name, mean(numbers.into_iter()))).collect()
    };
    Ok(Outcome {
        row: unit.row.into(),
        seed: unit.seed,
        fingerprint: setting.fingerprint.clone(),
        metrics: BTreeMap::new(),
        parts: values.into_iter().map(|(part, values)| (part, means(values))).collect(),
        speed: BTreeMap::from([("measuring".to_string(), start.elapsed().as_secs_f64())]),
    })
}

fn part(denoised: usize, method: &str) -> String {
    format!("{denoised} % {method}")
}

/// One-step predictions on the way, by percentage and method, and the final pictures.
type Predictions = (Vec<(usize, &'static str, Tensor)>, Tensor);

fn denoise(setting: &Setting, prompts: &[String], personal: &LoraSet, address: Address) -> Result<Predictions> {
    let (base, steps, count) = (&setting.base, setting.size.preview_steps, prompts.len());
    let scale = setting.hyperparameters.guidance_scale;
    let text = base.conditioning(prompts)?;
    let both = Conditioning::cat(&[&text, &text.without_text()?])?;
    let wide = if base.dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let side = base.resolution / base.encoder.factor();
    let plain = Pass { loras: Loras::one(personal, 1.0), ..Pass::default() };
    let lcm = Pass { loras: Loras::one(personal, 1.0).with(&base.lcm_lora, 1.0), ..Pass::default() };
    let decode = |latents: &Tensor| base.decoder.decode(&latents.to_dtype(base.dtype)?);
    let mut sampler = SamplerKind::Ddim.build(&base.schedule, steps)?;
    let mut latents = address.normal_batch(count, (4, side, side), wide, &base.device)?;
    let mut predictions = Vec::new();
    for (i, t) in sampler.timesteps().to_vec().into_iter().enumerate() {
        let input = latents.to_dtype(base.dtype)?;
        let twice = Tensor::cat(&[&input, &input], 0)?;
        let noise = base.unet.forward(&twice, &vec![t; 2 * count], &both, &plain)?.detach().to_dtype(wide)?;
        let (with, without) = (noise.narrow(0, 0, count)?, noise.narrow(0, count, count)?);
        let guided = (&without + ((&with - &without)? * scale)?)?;
        // After the last step nothing is left to predict: "100 %" is before it.
        for denoised in DENOISED.into_iter().filter(|denoised| (denoised * steps / 100).min(steps - 1) == i) {
            let noise = base.unet.forward(&input, &vec![t; count], &text, &lcm)?.detach().to_dtype(wide)?;
            let previewed = preview(&base.schedule, &latents, &noise, &vec![t; count], PreviewForm::Equation3)?;
            let ends = [sampler.predict_x0(&with, i, &latents)?, sampler.predict_x0(&guided, i, &latents)?, previewed];
            for ((method, _), end) in METHODS.into_iter().zip(ends) {
                predictions.push((denoised, method, decode(&end)?.clamp(-1.0, 1.0)?));
            }
        }
        latents = sampler.step(&guided, i, &latents, address)?.detach();
    }
    Ok((predictions, decode(&latents)?.clamp(-1.0, 1.0)?))
}

/// Pictures against the final ones, by several measures; one number a picture.
pub fn compare(setting: &Setting, pictures: &Tensor, last: &Tensor) -> Result<[(&'static str, Vec<f64>); 4]> {
    let judge = &setting.judge;
    let clip = (judge.embed(pictures)? * judge.embed(last)?)?.sum(D::Minus1)?;
    let identity = judge.identity(&judge.held_out, pictures, last)?;
    let each = |values: Tensor| -> Result<Vec<f64>> { Ok(values.to_dtype(DType::F64)?.to_vec1::<f64>()?) };
    let error = (pictures - last)?.abs()?.flatten_from(1)?.mean(1)?;
    let sharpness = (sharpness(pictures)? / sharpness(last)?)?;
    Ok([
        ("identity", identity.into_iter().map(|cosine| cosine.unwrap_or(0.0)).collect()),
        ("clip", each(clip)?),
        ("error", each(error)?),
        ("sharpness", each(sharpness)?),
    ])
}

/// Mean absolute difference of neighbouring pixels, of each picture.
pub fn sharpness(pictures: &Tensor) -> Result<Tensor> {
    let (_, _, height, width) = pictures.dims4()?;
    let across = (pictures.narrow(3, 1, width - 1)? - pictures.narrow(3, 0, width - 1)?)?.abs()?;
    let down = (pictures.narrow(2, 1, height - 1)? - pictures.narrow(2, 0, height - 1)?)?.abs()?;
    Ok((across.flatten_from(1)?.mean(1)? + down.flatten_from(1)?.mean(1)?)?)
}

/// For each variant a table: how near which prediction is, after how much of the way.
fn table(plan: &Plan, outcomes: &Outcomes) -> String {
    let mut text = String::new();
    for row in plan.rows {
        text += &format!("### {}\n\n", row.title);
        text += "| denoised | one-step prediction | identity | CLIP | mean absolute error | sharpness |\n";
        text += "|---|---|---|---|---|---|\n";
        for denoised in DENOISED {
            for (method, title) in METHODS {
                let cell = |metric, decimals| {
                    let estimate = outcomes.part(row.name, &part(denoised, method), metric);
                    estimate.map_or("–".into(), |estimate| estimate.text(decimals))
                };
                let cells = [cell("identity", 3), cell("clip", 3), cell("error", 3), cell("sharpness", 2)];
                text += &format!("| {denoised} % | {title} | {} |\n", cells.join(" | "));
            }
        }
        text += "\n";
    }
    let (samples, steps) = (outcomes.size.samples, outcomes.size.preview_steps);
    text + &format!(
        "{samples} pictures of {steps} DDIM steps each. Identity and CLIP: cosine with the final picture; sharpness: that \
         of the final picture is 1. 100 % is before the last step.\n"
    )
}

fn kept(out: &std::path::Path, row: &str, name: &str, sample: usize) -> PathBuf {
    out.join("pictures").join(row).join(format!("{name}-{sample}.png"))
}

fn keep(setting: &Setting, unit: Unit, name: &str, pictures: &Tensor) -> Result<()> {
    for sample in 0..SHOWN.min(pictures.dim(0)?) {
        save_png(&from_tensor(&pictures.get(sample)?)?, kept(&setting.out, unit.row, name, sample))?;
    }
    Ok(())
}

/// For some samples, one method below the other: predictions after more and more of the way, and the final picture.
fn sheet(plan: &Plan, outcomes: &Outcomes) -> anyhow::Result<Option<RgbImage>> {
    let side = RESOLUTION as u32;
    let (mut sheet, mut any) = (ContactSheet::new(side, side), false);
    for row in plan.rows {
        for sample in 0..SHOWN {
            let last = kept(&outcomes.out, row.name, "final", sample);
            if !last.is_file() {
                continue;
            }
            any = true;
            for (method, title) in METHODS {
                let mut cells = Vec::new();
                for denoised in DENOISED {
                    let path = kept(&outcomes.out, row.name, &format!("{method}-{denoised}"), sample);
                    cells.push((format!("{title} {denoised} %"), load_image(&path)?));
                }
                cells.push((format!("final, {}", row.title), load_image(&last)?));
                sheet.add_row(cells)?;
            }
        }
    }
    Ok(any.then(|| sheet.render()))
}

//! What an encoder is worth: people it has never seen, in prompts it was not trained on.

use std::collections::BTreeMap;

use candle_core::Tensor;
use lcm_lookahead::data::{from_tensor, save_png};
use lcm_lookahead::personalize::Options;
use lcm_lookahead::{Personalizer, Result};

use crate::people;
use crate::plan::Unit;
use crate::setting::Setting;
use crate::statistics::mean;

/// People and prompts whose pictures are kept for the contact sheet.
pub const SHOWN_PEOPLE: usize = 3;
pub const SHOWN_PROMPTS: usize = 6;

/// The judgement of one picture.
struct Judged {
    /// Its prompt's place.
    prompt: usize,
    values: [(&'static str, f64); 6],
}

/// Numbers by name, and the same for each prompt.
pub type Metrics = (BTreeMap<String, f64>, BTreeMap<String, BTreeMap<String, f64>>);

/// Every person in every prompt, drawn with an encoder.
pub fn of_encoder(setting: &Setting, unit: Unit, personalizer: &Personalizer, options: &Options) -> Result<Metrics> {
    let mut people: Option<lcm_lookahead::personalize::Reference> = None;
    of_pictures(setting, unit, |shown, prompts, photographs, chunk| {
        // The same noise in every row; other noise for every seed.
        let options = Options { seed: 1000 * unit.seed + chunk as u64, ..options.clone() };
        let reference = match &people {
            Some(reference) => reference,
            None => people.insert(personalizer.reference_from_tensor(photographs)?),
        };
        personalizer.generate_tensor(&reference.select(shown)?, prompts, &options)
    })
}

/// Every person in every prompt, drawn by a function of the people's places, the prompts, all photographs and the number
/// of the batch.
pub fn of_pictures(
    setting: &Setting,
    unit: Unit,
    mut draw: impl FnMut(&[usize], &[String], &Tensor, usize) -> Result<Tensor>,
) -> Result<Metrics> {
    let (identities, prompts) = (people::evaluated(&setting.size), people::prompts());
    let photographs: Vec<_> = identities.iter().map(people::photograph).collect();
    let photographs = people::stack(&photographs, &setting.base.device)?;
    let pairs: Vec<(usize, usize)> =
        (0..identities.len()).flat_map(|person| (0..prompts.len()).map(move |prompt| (person, prompt))).collect();
    let mut judged = Vec::new();
    for (chunk, pairs) in pairs.chunks(setting.chunk()).enumerate() {
        let shown: Vec<usize> = pairs.iter().map(|(person, _)| *person).collect();
        let texts: Vec<String> = pairs.iter().map(|(_, prompt)| prompts[*prompt].clone()).collect();
        let pictures = draw(&shown, &texts, &photographs, chunk)?.detach();
        judged.extend(judge(setting, pairs, &texts, &pictures, &photographs)?);
        if unit.seed == setting.first_seed {
            keep(setting, unit, pairs, &pictures)?;
        }
    }
    let means = |of: &[&Judged]| -> BTreeMap<String, f64> {
        let names = of.first().map(|judged| judged.values.map(|(name, _)| name)).unwrap_or_default();
        let value = |i: usize| mean(of.iter().map(|judged| judged.values[i].1));
        names.iter().enumerate().map(|(i, name)| (name.to_string(), value(i))).collect()
    };
    let parts = prompts.iter().enumerate().map(|(i, prompt)| {
        (prompt.clone(), means(&judged.iter().filter(|judged| judged.prompt == i).collect::<Vec<_>>()))
    });
    Ok((means(&judged.iter().collect::<Vec<_>>()), parts.collect()))
}

/// Judges the pictures of some people (first of the pairs) in some prompts (second).
fn judge(
    setting: &Setting,
    pairs: &[(usize, usize)],
    texts: &[String],
    pictures: &Tensor,
    photographs: &Tensor,
) -> Result<Vec<Judged>> {
    let judge = &setting.judge;
    let people: Vec<u32> = pairs.iter().map(|(person, _)| *person as u32).collect();
    let photographs = photographs.index_select(&Tensor::from_vec(people, pairs.len(), photographs.device())?, 0)?;
    let held_out = judge.identity(&judge.held_out, pictures, &photographs)?;
    let taught = judge.identity(&judge.taught, pictures, &photographs)?;
    let text = judge.text(pictures, texts)?;
    let judged = (0..pairs.len()).map(|i| {
        let truth = |holds: bool| if holds { 100.0 } else { 0.0 };
        Judged {
            prompt: pairs[i].1,
            values: [
                // Where no face is found, nobody is recognised: a cosine of zero.
                ("identity", held_out[i].unwrap_or(0.0)),
                ("identity_taught", taught[i].unwrap_or(0.0)),
                ("faces", truth(held_out[i].is_some())),
                ("text", 100.0 * text[i].cosine),
                ("style", truth(text[i].style)),
                ("scene", truth(text[i].scene)),
            ],
        }
    });
    Ok(judged.collect())
}

/// The file of a picture that is kept.
pub fn kept(out: &std::path::Path, row: &str, person: usize, prompt: usize) -> std::path::PathBuf {
    out.join("pictures").join(row).join(format!("{person}-{prompt}.png"))
}

fn keep(setting: &Setting, unit: Unit, pairs: &[(usize, usize)], pictures: &Tensor) -> Result<()> {
    for (i, (person, prompt)) in pairs.iter().enumerate() {
        if *person < SHOWN_PEOPLE && *prompt < SHOWN_PROMPTS {
            save_png(&from_tensor(&pictures.get(i)?)?, kept(&setting.out, unit.row, *person, *prompt))?;
        }
    }
    Ok(())
}

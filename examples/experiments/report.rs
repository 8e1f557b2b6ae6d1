//! The results: a table, a contact sheet.

use std::fs;

use anyhow::Context;
use image::RgbImage;
use lcm_lookahead::data::{load_image, save_png};
use lcm_lookahead::mini::RESOLUTION;
use lcm_lookahead::mini::pretrain::HELD_OUT_FROM;
use lcm_lookahead::train::ContactSheet;

use crate::arguments::Arguments;
use crate::evaluation::{SHOWN_PEOPLE, SHOWN_PROMPTS, kept};
use crate::outcome::Outcomes;
use crate::people;
use crate::plan::Plan;

/// Prints the table of what is there, and writes it, with a contact sheet, to the output folder.
pub fn print(arguments: &Arguments, plan: &Plan) -> anyhow::Result<()> {
    let (out, outcomes) = (arguments.out(), Outcomes::load(arguments, &arguments.rows(plan)?)?);
    let seeds: Vec<String> = arguments.seeds().iter().map(u64::to_string).collect();
    let people = if arguments.validation { "validation" } else { "test" };
    let mut text = format!("## {}\n\n", plan.title);
    text += &(plan.table)(plan, &outcomes);
    text += &format!("\nSeeds {}; {people} people.\n", seeds.join(", "));
    println!("\n{text}");
    let path = out.join(format!("{}.md", plan.name));
    fs::create_dir_all(&out)
        .and_then(|()| fs::write(&path, &text))
        .with_context(|| format!("{}: cannot be written", path.display()))?;
    println!("Table: {}", path.display());
    if let Some(sheet) = (plan.sheet)(plan, &outcomes)? {
        let path = out.join(format!("{}.png", plan.name));
        save_png(&sheet, &path)?;
        println!("Pictures: {}", path.display());
    }
    Ok(())
}

/// Identity and text of each row.
pub fn encoder_table(plan: &Plan, outcomes: &Outcomes) -> String {
    let mut text = "| | identity | by the loss's network | faces found, % | text | style, % | scene, % |\n".to_string();
    text += "|---|---|---|---|---|---|---|\n";
    for row in plan.rows {
        let columns = [("identity", 3), ("identity_taught", 3), ("faces", 1), ("text", 2), ("style", 1), ("scene", 1)];
        let cells: Vec<String> = columns.iter().map(|(name, digits)| outcomes.cell(row.name, name, *digits)).collect();
        text += &format!("| {} | {} |\n", row.title, cells.join(" | "));
    }
    let (size, prompts) = (&outcomes.size, people::prompts().len());
    let (people, sampling) = (size.people, size.sampling_steps);
    let (steps, batch, trained_on) = (size.steps, size.batch, size.training_people);
    text + &format!(
        "\n{people} people in {prompts} prompts each, {sampling} denoising steps. Training: {steps} iterations of {batch} \
         samples of {trained_on} people. Identity: cosine of the face with the photograph's, by a network that no training \
         has seen; text: 100 times CLIP's cosine; style and scene: how often CLIP recognises them. Intervals: 95 %, over \
         seeds.\n"
    )
}

/// For some people: the photograph, and below it each row's pictures in some prompts.
pub fn encoder_sheet(plan: &Plan, outcomes: &Outcomes) -> anyhow::Result<Option<RgbImage>> {
    let side = RESOLUTION as u32;
    let (mut sheet, mut any) = (ContactSheet::new(side, side), false);
    let prompts = people::prompts();
    for (person, identity) in people::evaluated(&outcomes.size).iter().take(SHOWN_PEOPLE).enumerate() {
        let name = format!("person {}", identity.seed - HELD_OUT_FROM);
        sheet.add_row(vec![(name, people::photograph(identity))])?;
        for row in plan.rows {
            let mut cells = Vec::new();
            for (prompt, text) in prompts.iter().enumerate().take(SHOWN_PROMPTS) {
                let path = kept(&outcomes.out, row.name, person, prompt);
                if path.is_file() {
                    let caption = if prompt == 0 { row.name } else { text };
                    cells.push((caption.to_string(), load_image(&path)?));
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

//! Draws a few of the miniature's people in several techniques: the picture of the README.

mod support;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use lcm_lookahead::data::save_png;
use lcm_lookahead::mini::portrait::{Identity, Portrait, Pose, Scene, Style};
use lcm_lookahead::train::ContactSheet;

/// A technique and a scene for each column, with a caption that fits.
const COLUMNS: [(&str, Style, Scene); 5] = [
    ("photo", Style::Photo, Scene::Studio),
    ("oil painting", Style::OilPainting, Scene::Forest),
    ("comic book", Style::ComicBook, Scene::Astronaut),
    ("watercolour", Style::Watercolor, Scene::Garden),
    ("pencil drawing", Style::PencilDrawing, Scene::Hat),
];

/// Draws a sheet of procedural portraits: a person in each row, a technique in each column.
#[derive(Parser)]
#[command(after_help = "Example:\n  cargo run --release --example portraits -- --people 8 --size 256")]
struct Arguments {
    /// The picture to write, PNG.
    #[arg(long, value_name = "FILE", default_value = "out/portraits.png")]
    out: PathBuf,
    /// How many people.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=64))]
    people: u64,
    /// Side of each portrait in pixels.
    #[arg(long, default_value_t = 92, value_parser = clap::value_parser!(u32).range(16..=1024))]
    size: u32,
    /// Seed of the first person; the others have the numbers after it.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(..1 << 48))]
    seed: u64,
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let mut sheet = ContactSheet::new(arguments.size, arguments.size);
    for person in arguments.seed..arguments.seed + arguments.people {
        let cell = |(column, (caption, style, scene)): (usize, (&str, Style, Scene))| {
            let pose = Pose::from_seed(person * COLUMNS.len() as u64 + column as u64);
            let portrait = Portrait { identity: Identity::from_seed(person), style, scene, pose };
            (caption.to_string(), portrait.render(arguments.size).image)
        };
        sheet.add_row(COLUMNS.into_iter().enumerate().map(cell).collect())?;
    }
    save_png(&sheet.render(), &arguments.out)?;
    println!("{}", arguments.out.display());
    Ok(())
}

fn main() -> ExitCode {
    support::main(run)
}

//! Draws the person of a photograph in any style and scene.

mod support;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Parser;
use image::imageops::FilterType;
use image::{DynamicImage, RgbImage};
use indicatif::ProgressBar;
use lcm_lookahead::data::{Crop, load_image, resize_and_crop, save_png, to_tensor};
use lcm_lookahead::models::unet::FreeU;
use lcm_lookahead::personalize::Options;
use lcm_lookahead::train::{AdapterInit, ContactSheet, checkpoint};
use lcm_lookahead::{Base, Guidance, Personalizer, SamplerKind};
use support::{Model, ModelArguments};

/// The portrait that is drawn where no `--image` is given.
const PORTRAIT: &[u8] = include_bytes!("../assets/portrait.png");
const PROMPTS: [&str; 5] = [
    "an oil painting of a face",
    "a photo of a face in a forest",
    "a comic book drawing of a face as an astronaut",
    "a watercolor painting of a face in a flower garden",
    "a pencil drawing of a face wearing a hat",
];
const COLUMNS: usize = 3;

/// Draws the person of a photograph in any style and scene: one picture for each prompt, and a contact sheet of all.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  cargo run --release --example personalize
  cargo run --release --example personalize -- --image me.png --prompt \"an oil painting of a face\"
  cargo run --release --example personalize -- --checkpoint out/train --sampler lcm
  cargo run --release --example personalize -- --model sdxl --image me.png --weights DIR

The miniature knows procedural portraits, its own training data; real photographs are foreign to it. Its prompts
are short: \"a mosaic of a face in space\".")]
struct Arguments {
    /// Photograph of the person, PNG or JPEG [default: a portrait that is part of this program]
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// What to draw; "a face" stands for the person. Can be given many times [default: five styles and scenes]
    #[arg(long)]
    prompt: Vec<String>,
    /// Folder for the pictures.
    #[arg(long, value_name = "DIR", default_value = "out/personalize")]
    out: PathBuf,
    /// Encoder: a run folder of the train example or one of its checkpoint folders; for SDXL also a published encoder's
    /// folder or the checkpoint that the paper's authors released [default: the pretrained adapter of the model]
    #[arg(long, value_name = "PATH")]
    checkpoint: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArguments,
    /// Seed of the noise the pictures start from.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Sampler: ddim, euler, dpm++ or lcm. The last needs few steps and takes no guidance.
    #[arg(long, default_value_t)]
    sampler: SamplerKind,
    /// Denoising steps [default: 30; with lcm 4]
    #[arg(long)]
    steps: Option<usize>,
    /// FreeU in the denoiser, with the factors of the paper's authors.
    #[arg(long)]
    freeu: bool,
    /// Plain classifier-free guidance of this scale, instead of the encoder's own form [default: 5, where the encoder
    /// has no KV branch]
    #[arg(long, value_name = "SCALE", conflicts_with_all = ["guidance_scale_nokv", "guidance_scale_full", "guidance_scale_kv"])]
    guidance_scale: Option<f64>,
    /// Guidance of encoders with a KV branch: weight of text and image tokens [default: 3]
    #[arg(long, value_name = "SCALE")]
    guidance_scale_nokv: Option<f64>,
    /// ... weight of all conditions [default: 2]
    #[arg(long, value_name = "SCALE")]
    guidance_scale_full: Option<f64>,
    /// ... weight of the reference's keys and values alone [default: 2]
    #[arg(long, value_name = "SCALE")]
    guidance_scale_kv: Option<f64>,
    /// Keep the encoders of text and images out of memory while they have nothing to do: 2.9 GB less with SDXL in half
    /// precision.
    #[arg(long)]
    lean: bool,
    /// How many steps' references one pass of the KV encoder computes: more are faster on a GPU, and take more memory
    /// [default: 2]
    #[arg(long, value_name = "STEPS")]
    reference_steps: Option<usize>,
    /// How many neighbouring steps share the reference's keys and values: more are faster, and the pictures others
    /// [default: 1]
    #[arg(long, value_name = "STEPS")]
    reference_interval: Option<usize>,
    /// Draw without the KV branch, with the adapter alone.
    #[arg(long)]
    no_kv: bool,
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let start = Instant::now();
    let photograph = match &arguments.image {
        Some(path) => load_image(path)?,
        None => image::load_from_memory(PORTRAIT)?.into_rgb8(),
    };
    let (base, AdapterInit { resampler, tensors }) =
        if arguments.lean { arguments.model.load_lean()? } else { arguments.model.load()? };
    warn_without_face(&base, &photograph)?;
    let personalizer = match &arguments.checkpoint {
        Some(path) if is_run(path)? => Personalizer::from_checkpoint(base, &resampler, path)?,
        Some(path) if arguments.model.model == Model::Sdxl => {
            let encoder = arguments.model.encoder(path, &base)?;
            Personalizer::from_encoder(base, &encoder)?
        }
        Some(path) => {
            bail!("{}: neither a checkpoint of the train example nor a folder that holds one", path.display())
        }
        // An adapter may bring a KV branch along.
        None if tensors.keys().any(|name| name.starts_with("kv_encoder.")) => {
            let path = arguments.model.adapter.as_deref().unwrap_or(Path::new(""));
            let encoder = arguments.model.encoder(path, &base)?;
            Personalizer::from_encoder(base, &encoder)?
        }
        None => Personalizer::from_adapter(base, &resampler, tensors)?,
    };
    let options = options(&arguments, personalizer.default_options())?;
    let prompts = match arguments.prompt.is_empty() {
        true => PROMPTS.map(String::from).to_vec(),
        false => arguments.prompt.clone(),
    };

    let spinner = ProgressBar::new_spinner().with_message(format!("drawing {} pictures", prompts.len()));
    spinner.enable_steady_tick(Duration::from_millis(100));
    let reference = personalizer.reference(&photograph)?;
    let pictures = personalizer.generate(&reference, &prompts, &options)?;
    spinner.finish_and_clear();

    for (i, (prompt, picture)) in prompts.iter().zip(&pictures).enumerate() {
        let path = arguments.out.join(format!("{:02}-{}.png", i + 1, file_stem(prompt)));
        save_png(picture, &path)?;
        println!("{}", path.display());
    }
    let size = u32::try_from(personalizer.base().resolution)?;
    let sheet = contact_sheet(&resize_and_crop(&photograph, size, Crop::Center), &prompts, pictures)?;
    let path = arguments.out.join("contact-sheet.png");
    save_png(&sheet, &path)?;
    let seconds = start.elapsed().as_secs_f64();
    let count = if prompts.len() == 1 { "1 picture".to_string() } else { format!("{} pictures", prompts.len()) };
    println!("{count} in {seconds:.1} s. All on one sheet: {}", path.display());
    Ok(())
}

/// Whether a path is a run of the train example, or a checkpoint of one.
fn is_run(path: &Path) -> anyhow::Result<bool> {
    Ok(path.join("state.json").exists() || path.is_dir() && checkpoint::latest(path)?.is_some())
}

fn options(arguments: &Arguments, defaults: Options) -> anyhow::Result<Options> {
    let lcm = arguments.sampler == SamplerKind::Lcm;
    let scales = [arguments.guidance_scale_nokv, arguments.guidance_scale_full, arguments.guidance_scale_kv];
    let three_term = scales.iter().any(Option::is_some);
    let guidance = match (arguments.guidance_scale, lcm) {
        (Some(scale), _) => Guidance::Plain { scale },
        (None, true) if !three_term => Guidance::None,
        (None, _) if three_term => Guidance::ThreeTerm {
            no_kv: scales[0].unwrap_or(3.0),
            full: scales[1].unwrap_or(2.0),
            kv: scales[2].unwrap_or(2.0),
        },
        _ => defaults.guidance,
    };
    for (option, scale) in [
        ("--guidance-scale", arguments.guidance_scale),
        ("--guidance-scale-nokv", scales[0]),
        ("--guidance-scale-full", scales[1]),
        ("--guidance-scale-kv", scales[2]),
    ] {
        if scale.is_some_and(|scale| !scale.is_finite()) {
            bail!("{option}: expected a finite number");
        }
    }
    Ok(Options {
        seed: arguments.seed,
        steps: arguments.steps.unwrap_or(if lcm { 4 } else { 30 }),
        freeu: arguments.freeu.then(FreeU::official),
        sampler: arguments.sampler,
        guidance,
        use_reference: !arguments.no_kv,
        reference_steps: arguments.reference_steps.unwrap_or(defaults.reference_steps),
        reference_interval: arguments.reference_interval.unwrap_or(defaults.reference_interval),
        ..defaults
    })
}

fn warn_without_face(base: &Base, photograph: &RgbImage) -> anyhow::Result<()> {
    let size = u32::try_from(base.resolution)?;
    let picture = to_tensor(&resize_and_crop(photograph, size, Crop::Center), &base.device)?;
    let picture = picture.to_dtype(base.dtype)?.unsqueeze(0)?;
    if base.face_locator.locate(&picture)?.iter().any(Option::is_none) {
        eprintln!("warning: no face found in the photograph; the pictures may not resemble anybody");
    }
    Ok(())
}

/// The reference and all pictures, twice as large where they are small, for captions need room.
fn contact_sheet(reference: &RgbImage, prompts: &[String], pictures: Vec<RgbImage>) -> anyhow::Result<RgbImage> {
    let side = reference.width().max(256);
    let enlarge = |picture: RgbImage| match picture.width() {
        width if width == side => picture,
        _ => DynamicImage::ImageRgb8(picture).resize_exact(side, side, FilterType::CatmullRom).into_rgb8(),
    };
    let mut cells = vec![("reference".to_string(), enlarge(reference.clone()))];
    cells.extend(prompts.iter().cloned().zip(pictures.into_iter().map(enlarge)));
    let mut sheet = ContactSheet::new(side, side);
    for row in cells.chunks(COLUMNS) {
        sheet.add_row(row.to_vec())?;
    }
    Ok(sheet.render())
}

/// A prompt as part of a file name: `an-oil-painting-of-a-face`.
fn file_stem(prompt: &str) -> String {
    let words = prompt.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").chars().take(60).collect::<String>().to_lowercase()
}

fn main() -> ExitCode {
    support::main(run)
}

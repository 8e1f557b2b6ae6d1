//! Guides a picture towards another by gradient steps on its latents, through the one-step preview or through x0.

mod support;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use candle_core::Tensor;
use clap::{Parser, ValueEnum};
use image::RgbImage;
use lcm_lookahead::data::{Crop, from_tensor, load_image, resize_and_crop, save_png, to_tensor};
use lcm_lookahead::lookahead::{ClipImageLoss, FeatureLoss};
use lcm_lookahead::mini::{self, MiniConfig};
use lcm_lookahead::personalize::{LatentGuidance, TextToImage, TextToImageOptions, Through};
use lcm_lookahead::random::Address;
use lcm_lookahead::train::ContactSheet;
use lcm_lookahead::{Base, ImageLoss, SamplerKind};
use support::{Model, ModelArguments};

/// The guiding picture where no `--image` is given.
const PORTRAIT: &[u8] = include_bytes!("../assets/portrait.png");

/// Guides a picture towards another while it is drawn, without any training (paper, section 5.1 and figure 5).
///
/// At one early step of DDIM sampling the latents are moved, some times over, against the gradient of a loss between what
/// they will become and the guiding picture. What they will become is told by the one-step preview of the LCM-LoRA, or,
/// for comparison, by the usual approximation x0. The contact sheet has a row for each loss.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  cargo run --release --example guidance
  cargo run --release --example guidance -- --image me.png --prompt \"a pencil drawing of a face\" --loss identity")]
struct Arguments {
    /// The guiding picture, PNG or JPEG [default: a portrait that is part of this program]
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// What to draw.
    #[arg(long, default_value = "a photo of a face")]
    prompt: String,
    /// Losses to guide by; can be given many times [default: all three, with SDXL identity, the one it has networks for]
    #[arg(long, value_enum)]
    loss: Vec<Loss>,
    /// The step to guide at: how many are then left.
    #[arg(long, default_value_t = 44)]
    at: usize,
    /// DDIM steps in all.
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Gradient steps.
    #[arg(long, default_value_t = 20)]
    repeats: usize,
    /// Length of a gradient step: the root mean square of its change of the latents.
    #[arg(long, default_value_t = 0.05)]
    step_size: f64,
    /// Classifier-free guidance by the text [default: 3, with SDXL 5]
    #[arg(long)]
    guidance_scale: Option<f64>,
    /// Seed of the noise the pictures start from.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for the pictures.
    #[arg(long, value_name = "DIR", default_value = "out/guidance")]
    out: PathBuf,
    #[command(flatten)]
    model: ModelArguments,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Loss {
    /// Features of the patches of a CLIP image tower, place by place (the paper: LPIPS).
    Perceptual,
    /// The CLIP embedding of the whole picture.
    Clip,
    /// The embedding of the face by the recognition network.
    Identity,
}

impl Loss {
    fn open(self, base: &Base, model: Model) -> anyhow::Result<Box<dyn ImageLoss>> {
        let tower = || -> anyhow::Result<_> {
            if model != Model::Mini {
                bail!("--loss: with --model sdxl there is the identity loss alone");
            }
            Ok(Arc::new(MiniConfig::mini().load_image_encoder(&mini::weights(base.dtype, &base.device)?)?))
        };
        Ok(match self {
            Loss::Perceptual => Box::new(FeatureLoss::new(tower()?)),
            Loss::Clip => Box::new(ClipImageLoss::new(tower()?)),
            Loss::Identity => Box::new(base.identity_loss()),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Loss::Perceptual => "perceptual",
            Loss::Clip => "clip",
            Loss::Identity => "identity",
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let start = Instant::now();
    let mini = arguments.model.model == Model::Mini;
    let (base, _) = arguments.model.load()?;
    let photograph = match &arguments.image {
        Some(path) => load_image(path)?,
        None => image::load_from_memory(PORTRAIT)?.into_rgb8(),
    };
    let size = u32::try_from(base.resolution)?;
    let guiding = resize_and_crop(&photograph, size, Crop::Center);
    let target = to_tensor(&guiding, &base.device)?.unsqueeze(0)?.to_dtype(base.dtype)?;
    let losses = match (arguments.loss.as_slice(), mini) {
        ([], true) => vec![Loss::Perceptual, Loss::Clip, Loss::Identity],
        ([], false) => vec![Loss::Identity],
        (given, _) => given.to_vec(),
    };

    let text_to_image = TextToImage::new(&base);
    let options = TextToImageOptions {
        steps: arguments.steps,
        sampler: SamplerKind::Ddim,
        guidance_scale: arguments.guidance_scale.unwrap_or(if mini { 3.0 } else { 5.0 }),
        ..TextToImageOptions::default()
    };
    let side = base.resolution / base.encoder.factor();
    let noise = Address::new(arguments.seed, "guidance").normal_batch(1, (4, side, side), base.dtype, &base.device)?;
    let prompts = [arguments.prompt.clone()];
    let mut sheet = ContactSheet::new(size, size);
    let cell = |name: &str, images: &Tensor| -> anyhow::Result<(String, RgbImage)> {
        let caption = match similarity(&base, images, &target)? {
            Some(similarity) => format!("{name} id {similarity:.2}"),
            None => format!("{name} no face"),
        };
        println!("{caption}");
        let picture = from_tensor(&images.get(0)?)?;
        save_png(&picture, arguments.out.join(format!("{}.png", name.replace(' ', "-"))))?;
        Ok((caption, picture))
    };

    let unguided = text_to_image.generate(&prompts, &noise, &options)?;
    sheet.add_row(vec![("guiding picture".into(), guiding.clone()), cell("unguided", &unguided)?])?;
    for loss in losses {
        let opened = loss.open(&base, arguments.model.model)?;
        let mut row = Vec::new();
        for (name, through) in [("x0", Through::X0), ("preview", Through::Preview(base.lcm_lora.clone()))] {
            let guidance = LatentGuidance {
                loss: opened.as_ref(),
                target: &target,
                through,
                decoder: base.preview_decoder.clone(),
                at: arguments.at,
                repeats: arguments.repeats,
                step_size: arguments.step_size,
                recompute: !mini,
            };
            let pictures = text_to_image.generate_guided(&prompts, &noise, &options, &guidance)?;
            let ends = [pictures.losses.first(), pictures.losses.last()].map(|loss| loss.copied().unwrap_or(f64::NAN));
            row.push(cell(&format!("{} {name}", loss.name()), &pictures.images)?);
            println!("    {} loss of the {name}: {:.4} before, {:.4} at the last step", loss.name(), ends[0], ends[1]);
        }
        sheet.add_row(row)?;
    }
    let path = arguments.out.join("contact-sheet.png");
    save_png(&sheet.render(), &path)?;
    println!("{} in {:.1} s", path.display(), start.elapsed().as_secs_f64());
    Ok(())
}

/// The cosine of both faces' embeddings, by the network that the identity loss uses too.
fn similarity(base: &Base, images: &Tensor, target: &Tensor) -> anyhow::Result<Option<f64>> {
    let value = base.identity_loss().loss(&images.clamp(-1.0, 1.0)?, target)?;
    let loss = value.loss.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
    Ok((value.counted > 0).then_some(1.0 - loss))
}

fn main() -> ExitCode {
    support::main(run)
}

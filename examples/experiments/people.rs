//! Who is shown, and in which prompts: people to train on, people for choices, people for results.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_core::{Device, Tensor};
use image::RgbImage;
use lcm_lookahead::Result;
use lcm_lookahead::data::{DatasetConfig, FaceDataset, GenerateConfig, Source, generate_dataset, to_tensor};
use lcm_lookahead::mini::RESOLUTION;
use lcm_lookahead::mini::portrait::{HELD_OUT_COMBINATIONS, Identity, Portrait, Pose, Scene, Style};
use lcm_lookahead::mini::pretrain::HELD_OUT_FROM;

use crate::arguments::Arguments;
use crate::plan::Unit;
use crate::setting::{Setting, Size};

/// Seeds of the people for choices. Pretraining draws nobody from [`HELD_OUT_FROM`] on, but reports on the first ones.
const VALIDATION: u64 = HELD_OUT_FROM + 100_000;
/// Seeds of the people for results.
const TEST: u64 = HELD_OUT_FROM + 200_000;
const PICTURES_OF_EACH: usize = 8;

/// The people of the evaluation.
pub fn evaluated(size: &Size) -> Vec<Identity> {
    let first = if size.validation { VALIDATION } else { TEST };
    (first..first + size.people as u64).map(Identity::from_seed).collect()
}

/// The photograph that tells the encoder who a person is.
pub fn photograph(identity: &Identity) -> RgbImage {
    let portrait = Portrait {
        identity: identity.clone(),
        style: Style::Photo,
        scene: Scene::Studio,
        pose: Pose::from_seed(identity.seed),
    };
    portrait.render(RESOLUTION as u32).image
}

/// The prompts of the evaluation, one of each style, all in scenes that training did not show in that style.
pub fn prompts() -> Vec<String> {
    let phrase = |(style, scene): &(Style, Scene)| portrait(&Identity::from_seed(0), *style, *scene).prompt();
    HELD_OUT_COMBINATIONS.iter().map(phrase).collect()
}

/// A person in a style and scene, in a pose other than the photograph's.
pub fn portrait(identity: &Identity, style: Style, scene: Scene) -> Portrait {
    let place = HELD_OUT_COMBINATIONS.iter().position(|combination| *combination == (style, scene)).unwrap_or(0);
    let pose = Pose::from_seed(identity.seed.wrapping_mul(31).wrapping_add(1 + place as u64));
    Portrait { identity: identity.clone(), style, scene, pose }
}

/// Pictures `(pictures, 3, height, width)` in [-1, 1].
pub fn stack(pictures: &[RgbImage], device: &Device) -> Result<Tensor> {
    let tensors = pictures.iter().map(|picture| to_tensor(picture, &Device::Cpu)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::stack(&tensors, 0)?.to_device(device)?)
}

/// Draws the pictures that encoders are trained on, where they are not there yet: people in many styles and scenes, but
/// for those of the evaluation's prompts.
pub fn draw_training_set(arguments: &Arguments) -> anyhow::Result<()> {
    let (folder, given) = arguments.data();
    if given || folder.join("metadata.json").is_file() {
        return Ok(());
    }
    let identities = Size::of(arguments).training_people;
    println!("Drawing {} pictures of {identities} people in {}", identities * PICTURES_OF_EACH, folder.display());
    // Other programs may be at the same: the first to be done gives the folder its name.
    let partial = folder.with_extension(format!("{}.partial", std::process::id()));
    let config = GenerateConfig {
        out: partial.clone(),
        identities,
        images_per_identity: PICTURES_OF_EACH,
        size: RESOLUTION as u32,
        leave_out: HELD_OUT_COMBINATIONS.to_vec(),
        ..GenerateConfig::default()
    };
    generate_dataset(&config, |_, _| {})?;
    if let Err(error) = fs::rename(&partial, &folder) {
        let removed = fs::remove_dir_all(&partial);
        if !folder.join("metadata.json").is_file() {
            removed?;
            return Err(error).with_context(|| format!("{}: cannot be made", folder.display()));
        }
    }
    Ok(())
}

/// The pictures to train on. Photographs condition the encoder, as they do when it is used.
pub fn training_set(setting: &Setting) -> Result<FaceDataset> {
    open(setting, None)
}

/// The photographs among them alone, each to be drawn from itself: what data without consistent pictures of a person can
/// teach (paper, section 4.4).
pub fn photographs(setting: &Setting, unit: Unit) -> anyhow::Result<FaceDataset> {
    let unreadable = |path: &Path| format!("{}: not the metadata of generated pictures", path.display());
    let all = setting.data.join("metadata.json");
    let text = fs::read_to_string(&all).with_context(|| unreadable(&all))?;
    let labels: BTreeMap<String, String> = serde_json::from_str(&text).with_context(|| unreadable(&all))?;
    // A person of one picture is paired with the picture itself.
    let alone = |path: String| path.contains("vanilla").then(|| (path.clone(), path));
    let labels: BTreeMap<String, String> = labels.into_keys().filter_map(alone).collect();
    let folder = setting.out.join("runs").join(unit.name());
    let path = folder.join("photographs.json");
    fs::create_dir_all(&folder)
        .and_then(|()| fs::write(&path, serde_json::to_string(&labels)?))
        .with_context(|| format!("{}: cannot be written", path.display()))?;
    Ok(open(setting, Some(path))?)
}

fn open(setting: &Setting, metadata: Option<PathBuf>) -> Result<FaceDataset> {
    let root = setting.data.clone();
    let source = Source { root, metadata, vanilla_only_for_encoder: true, ..Source::default() };
    FaceDataset::open(&DatasetConfig {
        sources: vec![source],
        resolution: RESOLUTION as u32,
        center_crop: true,
        ..DatasetConfig::default()
    })
}

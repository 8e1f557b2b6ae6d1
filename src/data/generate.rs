//! Writes data sets of procedural portraits in the official layout: consistent pictures of many identities in many
//! styles, which paper section 4.4 obtains from a text-to-image model.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use rand::{Rng, seq::SliceRandom};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::image::{save_png, write_atomic};
use super::prompt::file_stem_from_prompt;
use crate::mini::portrait::{Identity, Portrait, Pose, Scene, Style};
use crate::random::Address;
use crate::{Error, Result};

/// The file that marks a folder as written by [`generate_dataset`], and says from what.
const MARKER: &str = "generated.json";

/// What to generate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateConfig {
    /// The folder to write to.
    #[serde(skip)]
    pub out: PathBuf,
    /// Number of identities.
    pub identities: usize,
    /// Pictures of each identity: the first half of them photos, the others stylized.
    pub images_per_identity: usize,
    /// Side of the pictures in pixels.
    pub size: u32,
    /// The seed; identity `i` has the seed `seed * 2^32 + i`, so sets of different seeds share nobody.
    pub seed: u64,
    /// Combinations of style and scene that are not drawn, for instance those of an evaluation
    /// ([`HELD_OUT_COMBINATIONS`](crate::mini::portrait::HELD_OUT_COMBINATIONS)).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leave_out: Vec<(Style, Scene)>,
    /// Whether to write into a folder that holds something else.
    #[serde(skip)]
    pub force: bool,
}

impl Default for GenerateConfig {
    fn default() -> Self {
        GenerateConfig {
            out: PathBuf::from("out/data"),
            identities: 8,
            images_per_identity: 8,
            size: 128,
            seed: 0,
            leave_out: Vec::new(),
            force: false,
        }
    }
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Number of identities.
    pub identities: usize,
    /// Number of pictures.
    pub images: usize,
    /// The metadata file.
    pub metadata: PathBuf,
}

/// Draws and writes a data set; `progress` is called with the number of pictures done and their total, from any thread.
///
/// Pictures go to `<out>/person_0000/{vanilla,stylized}/`, their prompts in their names; `<out>/metadata.json` comes
/// last, so a set that was interrupted is never mistaken for a complete one. Running again with the same settings
/// writes the same files.
///
/// # Errors
/// [`Error::Config`] for values out of range; [`Error::Dataset`] for a folder that holds something else;
/// [`Error::Io`] where something cannot be written.
pub fn generate_dataset(config: &GenerateConfig, progress: impl Fn(usize, usize) + Sync) -> Result<Summary> {
    check(config)?;
    claim(config)?;
    let total = config.identities * config.images_per_identity;
    let done = AtomicUsize::new(0);
    let written = (0..config.identities)
        .into_par_iter()
        .map(|i| {
            let person = format!("person_{i:04}");
            let mut paths = Vec::new();
            for (folder, portrait) in portraits(config, i) {
                let stem = file_stem_from_prompt(&portrait.prompt_of("conceptname"), "", portrait.pose.seed);
                let relative = format!("{person}/{folder}/{stem}.png");
                save_png(&portrait.render(config.size).image, config.out.join(&relative))?;
                paths.push((relative, person.clone()));
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, total);
            }
            Ok(paths)
        })
        .collect::<Result<Vec<_>>>()?;
    let labels: BTreeMap<String, String> = written.into_iter().flatten().collect();
    let metadata = config.out.join("metadata.json");
    write_json(&metadata, &labels)?;
    Ok(Summary { identities: config.identities, images: labels.len(), metadata })
}

fn check(config: &GenerateConfig) -> Result<()> {
    let range = |field: &str, low: u64, high: u64, found: u64| match (low..=high).contains(&found) {
        true => Ok(()),
        false => Err(Error::Config {
            source_name: "GenerateConfig".into(),
            field: field.into(),
            reason: format!("expected {low} to {high}, found {found}"),
        }),
    };
    range("identities", 1, 1_000_000, config.identities as u64)?;
    range("images_per_identity", 1, 10_000, config.images_per_identity as u64)?;
    range("size", 16, 4096, u64::from(config.size))?;
    let all_left_out = |style: &Style| Scene::ALL.iter().all(|scene| config.leave_out.contains(&(*style, *scene)));
    if let Some(style) = Style::ALL.iter().find(|style| all_left_out(style)) {
        return Err(Error::Config {
            source_name: "GenerateConfig".into(),
            field: "leave_out".into(),
            reason: format!("leaves {style:?} no scene"),
        });
    }
    range("seed", 0, u64::from(u32::MAX), config.seed)
}

/// Makes sure that the folder is empty or ours, and marks it.
fn claim(config: &GenerateConfig) -> Result<()> {
    let refuse = |reason: &str| Err(Error::Dataset { path: config.out.clone(), reason: reason.into() });
    let marker = config.out.join(MARKER);
    fs::create_dir_all(&config.out).map_err(Error::io("create the folder", &config.out))?;
    let mut items = fs::read_dir(&config.out).map_err(Error::io("list the folder", &config.out))?;
    if items.next().is_some() && !config.force {
        let same = |old| GenerateConfig { out: config.out.clone(), force: config.force, ..old } == *config;
        let old = fs::read_to_string(&marker).ok().and_then(|text| serde_json::from_str::<GenerateConfig>(&text).ok());
        match old.map(same) {
            Some(true) => {}
            Some(false) => return refuse("it was generated with other settings; choose another folder, or force it"),
            None => return refuse("the folder is not empty; choose another folder, or force it"),
        }
    }
    // Until the new metadata is there, the old one must not describe what is being overwritten.
    let metadata = config.out.join("metadata.json");
    if metadata.exists() {
        fs::remove_file(&metadata).map_err(Error::io("remove", &metadata))?;
    }
    write_json(&marker, config)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::Format { path: path.to_path_buf(), reason: error.to_string() })?;
    text.push('\n');
    write_atomic(path, text.as_bytes())
}

/// The portraits of identity `i` with their folders: photos in various scenes, then other styles, as few repeats of
/// scenes and styles as possible.
fn portraits(config: &GenerateConfig, i: usize) -> Vec<(&'static str, Portrait)> {
    let mut rng = Address::new(config.seed, "generate data set").step(i as u64).rng();
    let identity = Identity::from_seed((config.seed << 32) + i as u64);
    let photos = config.images_per_identity.div_ceil(2);
    let (mut scenes, mut styles) = (Scene::ALL, Style::ALL);
    scenes.shuffle(&mut rng);
    styles[1..].shuffle(&mut rng);
    let mut seeds = std::collections::HashSet::new();
    (0..config.images_per_identity)
        .map(|k| {
            let (folder, style) = match k.checked_sub(photos) {
                None => ("vanilla", Style::Photo),
                Some(n) => ("stylized", styles[1 + n % (styles.len() - 1)]),
            };
            // The seed is part of the file name, so no two pictures of a person may share it.
            let mut seed: u32 = rng.random();
            while !seeds.insert(seed) {
                seed = seed.wrapping_add(1);
            }
            // The next scene in turn that goes with the style; there is one, as `check` has made sure.
            let turn = scenes.iter().cycle().skip(k % scenes.len()).take(scenes.len());
            let fits = |scene: &Scene| !config.leave_out.contains(&(style, *scene));
            let scene = turn.copied().find(fits).unwrap_or(scenes[0]);
            (folder, Portrait { identity: identity.clone(), style, scene, pose: Pose::from_seed(u64::from(seed)) })
        })
        .collect()
}

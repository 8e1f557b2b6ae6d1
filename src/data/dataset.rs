//! Pairs of pictures of one identity, sampled as a pure function of a seed and an index.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use candle_core::{Device, Tensor};
use image::{RgbImage, imageops};
use rand::{Rng, seq::SliceRandom};
use rayon::prelude::*;

use super::config::DatasetConfig;
use super::image::{Crop, load_image, resize_and_crop, to_tensor};
use super::metadata::{self, Entry};
use super::prompt::{names_a_prompt, prompt_from_path};
use super::sampling::shuffled;
use crate::random::Address;
use crate::{Error, Result};

/// What a data set holds, and what could not be used so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Pictures that were found on opening.
    pub images: usize,
    /// Identities among them.
    pub identities: usize,
    /// Identities with one picture only, which is then both target and condition.
    pub single_image_identities: usize,
    /// Files that the metadata names and that do not exist.
    pub missing: usize,
    /// Pictures that turned out to be unreadable when they were first needed.
    pub unreadable: usize,
}

/// A pair of pictures of one identity.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The picture to learn to draw.
    pub target: RgbImage,
    /// The picture that shows the encoder who it is.
    pub conditioning: RgbImage,
    /// The target's prompt.
    pub prompt: String,
    /// The conditioning picture's prompt.
    pub encoder_prompt: String,
    /// The label of the identity.
    pub identity: String,
    /// The target's file.
    pub target_path: PathBuf,
    /// The conditioning picture's file.
    pub conditioning_path: PathBuf,
}

/// A batch of samples.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Targets, f32 of shape `(batch, 3, height, width)` in `[-1, 1]`.
    pub pixel_values: Tensor,
    /// Conditioning pictures, f32 of shape `(batch, 3, height, width)` in `[-1, 1]`.
    pub encoder_pixel_values: Tensor,
    /// The targets' prompts.
    pub prompts: Vec<String>,
    /// The conditioning pictures' prompts.
    pub encoder_prompts: Vec<String>,
    /// The labels of the identities.
    pub identities: Vec<String>,
}

struct Item {
    entry: Entry,
    source: usize,
    group: usize,
    vanilla: bool,
    unreadable: AtomicBool,
}

/// A data set of faces that has been opened: its pictures are known, and read when they are needed.
///
/// A picture that cannot be read is reported once through `tracing`, counted in [`FaceDataset::report`] and passed
/// over.
pub struct FaceDataset {
    config: DatasetConfig,
    items: Vec<Item>,
    /// Items of each identity.
    groups: Vec<Vec<usize>>,
    /// First and one past the last item of each source.
    ranges: Vec<(usize, usize)>,
    missing: usize,
}

impl FaceDataset {
    /// Opens a data set.
    ///
    /// # Errors
    /// [`Error::Config`] for values out of range; [`Error::Io`] where a folder or metadata file cannot be read;
    /// [`Error::Format`] for metadata of another kind; [`Error::Dataset`] for metadata paths that leave the root, and
    /// for a folder without any picture.
    pub fn open(config: &DatasetConfig) -> Result<Self> {
        config.check()?;
        let (mut items, mut ranges, mut missing) = (Vec::new(), Vec::new(), 0);
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for (source, part) in config.sources.iter().enumerate() {
            let default = part.root.join("metadata.json");
            let file = part.metadata.clone().or_else(|| default.is_file().then_some(default));
            let entries = match &file {
                Some(file) => {
                    let (entries, lost) = metadata::read(&part.root, file)?;
                    for path in &lost {
                        tracing::warn!(path = %path.display(), "named in the metadata but missing; skipped");
                    }
                    missing += lost.len();
                    entries
                }
                None => metadata::scan(&part.root)?,
            };
            if entries.is_empty() {
                let reason = match &file {
                    Some(file) => format!("none of the pictures named in {} exists", file.display()),
                    None => "it holds no PNG or JPEG picture".to_owned(),
                };
                return Err(Error::Dataset { path: part.root.clone(), reason });
            }
            let first = items.len();
            let mut labels: HashMap<String, usize> = HashMap::new();
            for entry in entries {
                let group = *labels.entry(entry.label.clone()).or_insert_with(|| {
                    groups.push(Vec::new());
                    groups.len() - 1
                });
                groups[group].push(items.len());
                let vanilla = entry.relative.contains("vanilla");
                items.push(Item { entry, source, group, vanilla, unreadable: AtomicBool::new(false) });
            }
            ranges.push((first, items.len()));
        }
        Ok(FaceDataset { config: config.clone(), items, groups, ranges, missing })
    }

    /// The number of pictures, readable or not: the length of an epoch.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is no picture; never so for a data set that has been opened.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// What the data set was opened with.
    pub fn config(&self) -> &DatasetConfig {
        &self.config
    }

    /// What the data set holds, and what could not be used so far.
    pub fn report(&self) -> Report {
        Report {
            images: self.items.len(),
            identities: self.groups.len(),
            single_image_identities: self.groups.iter().filter(|group| group.len() == 1).count(),
            missing: self.missing,
            unreadable: self.items.iter().filter(|item| item.unreadable.load(Ordering::Relaxed)).count(),
        }
    }

    /// The sample at an index: a pure function of the seed, the index and the files on disk.
    ///
    /// Indices `0..len()` are the first epoch, in which every picture is the target once, in shuffled order (unless
    /// [`DatasetConfig::balance`] is set); and so on. Where a target cannot be read, the next one of the epoch's order
    /// takes its place.
    ///
    /// The conditioning picture is another picture of the identity: a vanilla one, if so configured and there is one
    /// besides the target, and else any other. Only an identity with a single readable picture is paired with itself.
    ///
    /// # Errors
    /// [`Error::Dataset`] if no picture can be read.
    pub fn sample(&self, seed: u64, index: u64) -> Result<Sample> {
        for attempt in 0..self.items.len() {
            let mut target = self.target(seed, index, attempt);
            let pair = Address::new(seed, "pair").step(index).sample(attempt);
            let mut rng = pair.rng();
            let swap = rng.random::<f64>() < self.config.random_target_probability;
            let mut others = self.others(target);
            if swap && !others.is_empty() {
                others.shuffle(&mut rng);
                target = others.iter().copied().find(|&other| self.load(other).is_some()).unwrap_or(target);
            }
            let Some(picture) = self.load(target) else { continue };
            let (conditioning, condition) = self
                .conditioning_candidates(target, &mut rng)
                .into_iter()
                .find_map(|other| Some((other, self.load(other)?)))
                .unwrap_or_else(|| (target, picture.clone()));
            let crop = |purpose| match self.config.center_crop {
                true => Crop::Center,
                false => Crop::Random(Address { purpose, ..pair }),
            };
            let size = self.config.resolution;
            let augment = self.config.sources[self.items[conditioning].source].augment;
            let condition =
                if augment { augmented(condition, Address { purpose: "augment", ..pair }) } else { condition };
            return Ok(Sample {
                target: resize_and_crop(&picture, size, crop("crop target")),
                conditioning: resize_and_crop(&condition, size, crop("crop conditioning")),
                prompt: self.prompt(target),
                encoder_prompt: self.prompt(conditioning),
                identity: self.items[target].entry.label.clone(),
                target_path: self.items[target].entry.path.clone(),
                conditioning_path: self.items[conditioning].entry.path.clone(),
            });
        }
        let path = self.config.sources.first().map(|source| source.root.clone()).unwrap_or_default();
        Err(Error::Dataset { path, reason: format!("none of its {} pictures can be read", self.items.len()) })
    }

    /// The batch of a step for one of `world_size` processes: samples `(step * world_size + rank) * batch_size` and
    /// following. Pictures are decoded in parallel.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty batch or a rank out of range; [`Error::Dataset`] if no picture can be read.
    pub fn batch(
        &self,
        seed: u64,
        step: u64,
        rank: u32,
        world_size: u32,
        batch_size: usize,
        device: &Device,
    ) -> Result<Batch> {
        if batch_size == 0 {
            return Err(Error::argument("FaceDataset::batch", "batch_size", "at least 1", "0"));
        }
        if rank >= world_size {
            return Err(Error::argument(
                "FaceDataset::batch",
                "rank",
                format!("less than {world_size}"),
                rank.to_string(),
            ));
        }
        let first = (step * u64::from(world_size) + u64::from(rank)) * batch_size as u64;
        let samples =
            (0..batch_size as u64).into_par_iter().map(|i| self.sample(seed, first + i)).collect::<Result<Vec<_>>>()?;
        let stack = |picture: fn(&Sample) -> &RgbImage| -> Result<Tensor> {
            let tensors =
                samples.iter().map(|sample| to_tensor(picture(sample), &Device::Cpu)).collect::<Result<Vec<_>>>()?;
            Ok(Tensor::stack(&tensors, 0)?.to_device(device)?)
        };
        Ok(Batch {
            pixel_values: stack(|sample| &sample.target)?,
            encoder_pixel_values: stack(|sample| &sample.conditioning)?,
            prompts: samples.iter().map(|sample| sample.prompt.clone()).collect(),
            encoder_prompts: samples.iter().map(|sample| sample.encoder_prompt.clone()).collect(),
            identities: samples.into_iter().map(|sample| sample.identity).collect(),
        })
    }

    /// The item that is the target at an index; `attempt` counts those passed over.
    fn target(&self, seed: u64, index: u64, attempt: usize) -> usize {
        let count = self.items.len();
        if !self.config.balance {
            let (epoch, position) = (index / count as u64, (index % count as u64) as usize);
            return shuffled(Address::new(seed, "shuffle").step(epoch), (position + attempt) % count, count);
        }
        let mut rng = Address::new(seed, "balanced target").step(index).rng();
        let total: f64 = self.config.sources.iter().map(|source| source.weight).sum();
        let mut rest = rng.random::<f64>() * total;
        let drawn = self.config.sources.iter().position(|source| {
            rest -= source.weight;
            rest < 0.0
        });
        let (first, end) = self.ranges[drawn.unwrap_or(self.ranges.len() - 1)];
        let start = first + rng.random_range(0..end - first);
        // Once its folder is used up, an attempt goes on to the others.
        if attempt < end - first {
            first + (start - first + attempt) % (end - first)
        } else {
            (start + attempt) % count
        }
    }

    fn others(&self, target: usize) -> Vec<usize> {
        self.groups[self.items[target].group].iter().copied().filter(|&other| other != target).collect()
    }

    /// The pictures that may condition a target, in the order in which they are to be tried.
    fn conditioning_candidates(&self, target: usize, rng: &mut impl Rng) -> Vec<usize> {
        let mut others = self.others(target);
        others.shuffle(rng);
        if self.config.sources[self.items[target].source].vanilla_only_for_encoder {
            // The sort is stable, so each of the two kinds stays shuffled. Stylized pictures come last rather than
            // never: the target itself as its own condition would teach the encoder to copy.
            others.sort_by_key(|&other| !self.items[other].vanilla);
        }
        others
    }

    /// The picture of an item, or nothing where it cannot be read, which is reported once.
    fn load(&self, item: usize) -> Option<RgbImage> {
        let item = &self.items[item];
        if item.unreadable.load(Ordering::Relaxed) {
            return None;
        }
        match load_image(&item.entry.path) {
            Ok(picture) => Some(picture),
            Err(error) => {
                if !item.unreadable.swap(true, Ordering::Relaxed) {
                    tracing::warn!(path = %item.entry.path.display(), %error, "picture skipped");
                }
                None
            }
        }
    }

    fn prompt(&self, item: usize) -> String {
        let item = &self.items[item];
        let source = &self.config.sources[item.source];
        let named = source.prompt_in_filename && names_a_prompt(&item.entry.relative);
        match named {
            true => prompt_from_path(Path::new(&item.entry.relative), &source.concept_placeholder),
            false => source.instance_prompt.clone(),
        }
    }
}

/// A square of 80 to 100 % of the largest square's area, mirrored half of the time.
fn augmented(picture: RgbImage, address: Address) -> RgbImage {
    let mut rng = address.rng();
    let (width, height) = picture.dimensions();
    let side = f64::from(width.min(height)) * rng.random_range(0.8f64..=1.0).sqrt();
    let side = (side.round() as u32).clamp(1, width.min(height));
    let (x, y) = (rng.random_range(0..=width - side), rng.random_range(0..=height - side));
    let mut cut = imageops::crop_imm(&picture, x, y, side, side).to_image();
    if rng.random_bool(0.5) {
        imageops::flip_horizontal_in_place(&mut cut);
    }
    cut
}

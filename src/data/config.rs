//! What a data set is made of.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::prompt::DEFAULT_PLACEHOLDER;
use crate::{Error, Result};

/// One folder of pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Source {
    /// The folder.
    pub root: PathBuf,
    /// A JSON file from paths relative to `root` to labels. Without it `root/metadata.json` is taken where it exists,
    /// and else the folders decide: the first folder of a path is the identity, and a picture directly in the root is
    /// an identity of its own.
    pub metadata: Option<PathBuf>,
    /// Whether file names that hold the word `conceptname` are prompts, as in the official layout.
    pub prompt_in_filename: bool,
    /// Whether only pictures with a folder or name containing "vanilla" condition the encoder, where the identity has
    /// any other than the target.
    pub vanilla_only_for_encoder: bool,
    /// How often this folder is drawn from, relative to the others, where [`DatasetConfig::balance`] is set.
    pub weight: f64,
    /// Whether the conditioning picture is cut a little (80 to 100 % of its area) and mirrored at random.
    pub augment: bool,
    /// What stands for the person in prompts.
    pub concept_placeholder: String,
    /// The prompt of a picture whose name is none (`IMG_1234.jpg`): "a photo of a face" (official recipe's
    /// `instance_prompt`).
    pub instance_prompt: String,
}

impl Default for Source {
    fn default() -> Self {
        Source {
            root: PathBuf::new(),
            metadata: None,
            prompt_in_filename: true,
            vanilla_only_for_encoder: false,
            weight: 1.0,
            augment: false,
            concept_placeholder: DEFAULT_PLACEHOLDER.to_owned(),
            instance_prompt: format!("a photo of {DEFAULT_PLACEHOLDER}"),
        }
    }
}

/// What a data set is made of, and how its pictures are prepared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetConfig {
    /// The folders.
    pub sources: Vec<Source>,
    /// Draw each folder as often as its weight says, whatever its size; otherwise each picture comes once an epoch.
    pub balance: bool,
    /// Side of the square pictures in pixels.
    pub resolution: u32,
    /// Keep the middle of a picture that is not square, instead of a random part.
    pub center_crop: bool,
    /// Probability in `[0, 1]` that the target is replaced by a random other picture of its identity.
    pub random_target_probability: f64,
}

impl Default for DatasetConfig {
    fn default() -> Self {
        DatasetConfig {
            sources: Vec::new(),
            balance: false,
            resolution: 128,
            center_crop: false,
            random_target_probability: 0.0,
        }
    }
}

impl DatasetConfig {
    /// One folder at a resolution, all else as by default.
    pub fn new(root: impl Into<PathBuf>, resolution: u32) -> Self {
        let source = Source { root: root.into(), ..Source::default() };
        DatasetConfig { sources: vec![source], resolution, ..DatasetConfig::default() }
    }

    pub(super) fn check(&self) -> Result<()> {
        let wrong = |field: &str, reason: String| {
            Err(Error::Config { source_name: "DatasetConfig".into(), field: field.into(), reason })
        };
        if self.sources.is_empty() {
            return wrong("sources", "expected at least one folder, found none".into());
        }
        if self.resolution == 0 || self.resolution > 8192 {
            return wrong("resolution", format!("expected 1 to 8192 pixels, found {}", self.resolution));
        }
        if !(0.0..=1.0).contains(&self.random_target_probability) {
            let found = self.random_target_probability;
            return wrong("random_target_probability", format!("expected a number in [0, 1], found {found}"));
        }
        for source in &self.sources {
            if !source.weight.is_finite() || source.weight <= 0.0 {
                return wrong("sources.weight", format!("expected a positive number, found {}", source.weight));
            }
        }
        Ok(())
    }
}

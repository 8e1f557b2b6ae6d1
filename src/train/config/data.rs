//! Pictures and prompts.

use serde::{Deserialize, Serialize};

use super::check::Checker;
use crate::Result;

/// How pictures are brought to size, and the prompt of the conditioning picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Side of the square training pictures in pixels. Default 1024 (official option `resolution`; 128 for the
    /// miniature); 16 to 4096, a multiple of 8, the side of one latent.
    pub resolution: usize,
    /// Whether the square is cut from the centre (true) or at a random place (false), after resizing the short side.
    /// Default false (official option `center_crop`).
    pub center_crop: bool,
    /// Top of the crop told to SDXL as micro-conditioning, in pixels. Default 0 (official option of the same name).
    pub crops_coords_top_left_h: usize,
    /// Left edge of the crop told to SDXL as micro-conditioning, in pixels. Default 0 (official option).
    pub crops_coords_top_left_w: usize,
    /// Prompt of a picture that has none of its own. Default `"a photo of a face"` (official recipe's
    /// `instance_prompt`; paper section 4.5 uses it for the KV encoder at inference).
    pub instance_prompt: String,
}

impl DataConfig {
    pub(super) fn validate(&self, check: &Checker<'_>) -> Result<()> {
        let resolution = self.resolution;
        let usable = (16..=4096).contains(&resolution) && resolution.is_multiple_of(8);
        check.require("resolution", usable, "a multiple of 8 from 16 to 4096", resolution)
    }
}

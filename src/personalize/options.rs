//! How pictures are sampled.

use super::Guidance;
use crate::models::unet::FreeU;
use crate::schedule::SamplerKind;
use crate::{Error, Result};

/// How pictures are sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Seed of the initial noise. Pictures of one call differ by their place in it.
    pub seed: u64,
    /// Number of denoising steps.
    pub steps: usize,
    /// The sampler. With [`SamplerKind::Lcm`] the LCM-LoRA is on and 4 steps suffice.
    pub sampler: SamplerKind,
    /// The guidance.
    pub guidance: Guidance,
    /// Weight of the image tokens (`adapter_attention_scale`).
    pub adapter_scale: f64,
    /// The prompt that describes the reference photograph to the KV encoder; "a photo of a face" in the paper.
    pub encoder_prompt: String,
    /// Whether the KV path is used, where the encoder has one.
    pub use_reference: bool,
    /// Whether the conditioning latents are noised to the timestep before they enter the KV encoder (as in training).
    pub noisy_encoder_input: bool,
    /// How many steps' references one pass of the KV encoder computes; 1 computes each when its step is reached. The
    /// pictures are the same but for rounding, for the reference depends on the timestep alone, not on the picture that
    /// is being drawn; a GPU is faster with the larger pass. In memory each step more takes the keys and values of one
    /// step (a picture of 1024 pixels with SDXL in half precision: 0.42 GB, twice that with
    /// [`Guidance::ThreeTerm`]), and the larger pass its activations. Several pictures fill a pass by themselves:
    /// no pass is made larger than 8 samples (one for each picture and [reference of the guidance](Guidance)) by
    /// further steps.
    pub reference_steps: usize,
    /// How many neighbouring steps share the keys and values of the reference, those of the step in their middle: 1
    /// computes them for every step; n leaves out all but one of n passes of the KV encoder, and changes the pictures.
    /// On the miniature (2 people in 10 prompts each, 50 steps, `bench_miniature references`) 2 and 5 move a number of
    /// the pictures by 4.3e-3 and 3.8e-3 on average, and leave the likeness as it was (0.375 for 0.374); but little of it
    /// comes from the reference there (`docs/experiments.md`), so SDXL may lose more.
    pub reference_interval: usize,
    /// FreeU in the denoiser (not in the KV encoder). The paper's authors switch it on for their published pictures
    /// ([`FreeU::official`]).
    pub freeu: Option<FreeU>,
}

impl Default for Options {
    /// 50 steps of DPM-Solver++(2M) with the official three-term guidance.
    fn default() -> Self {
        Options {
            seed: 0,
            steps: 50,
            sampler: SamplerKind::DpmSolverPlusPlus,
            guidance: Guidance::official(),
            adapter_scale: 1.0,
            encoder_prompt: "a photo of a face".into(),
            use_reference: true,
            noisy_encoder_input: true,
            reference_steps: 2,
            reference_interval: 1,
            freeu: None,
        }
    }
}

impl Options {
    /// 4 steps of LCM sampling, without guidance.
    pub fn lcm() -> Self {
        Options { steps: 4, sampler: SamplerKind::Lcm, guidance: Guidance::None, ..Self::default() }
    }
    /// Checks what no sampler checks.
    pub(super) fn validate(&self) -> Result<()> {
        let counts = [
            ("options.reference_steps", self.reference_steps),
            ("options.reference_interval", self.reference_interval),
        ];
        match counts.into_iter().find(|(_, count)| *count == 0) {
            Some((field, _)) => Err(Error::argument("Personalizer::generate", field, "at least 1", "0")),
            None => Ok(()),
        }
    }
}

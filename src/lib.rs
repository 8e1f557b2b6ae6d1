//! Train and run face personalisation for SDXL with the LCM-Lookahead method, in pure Rust on
//! [candle](https://docs.rs/candle-core).
//!
//! One photograph of a person and a prompt go in, a picture of that person comes out, without tuning anything for the
//! person: an encoder, trained once, turns the photograph into conditions for a frozen text-to-image model. The method
//! is that of *LCM-Lookahead for Encoder-based Text-to-Image Personalization* (Gal et al., ECCV 2024,
//! [arXiv:2404.03620](https://arxiv.org/abs/2404.03620)). What it adds to the usual diffusion loss is a look ahead: an
//! LCM-LoRA lets the model **preview** its final picture in one step, and a differentiable preview can be judged as a
//! picture, here by a face recognition network. The encoder has two branches, image tokens for decoupled
//! cross-attention (IP-Adapter) and the **keys and values** of a pass over the photograph, which the self-attention
//! layers attend to besides their own.
//!
//! # One base, called in several ways
//! KV encoder, denoiser and preview denoiser are one frozen [`UNet`]. What differs is an argument of the call, a
//! [`Pass`]: LoRA sets with their scales, reference keys and values, image tokens. Frozen weights never enter the
//! autograd graph, and changing a LoRA's scale costs nothing.
//!
//! # The method in ten lines
//! The miniature ([`mini`]), a small but complete instance of all networks, is part of the crate, so this runs as it
//! stands: the lookahead loss at one timestep.
//!
//! ```
//! use candle_core::{DType, Device};
//! use lcm_lookahead::mini::portrait::Portrait;
//! use lcm_lookahead::random::Address;
//! use lcm_lookahead::*;
//!
//! let base: Base = mini::base(DType::F32, &Device::Cpu)?;
//! let image = data::to_tensor(&Portrait::shipped().render(128).image, &Device::Cpu)?.unsqueeze(0)?;
//! let clean = base.latents(&image, Address::new(0, "posterior"))?;
//! let noise = Address::new(0, "noise").normal(clean.shape(), DType::F32, &Device::Cpu)?;
//! let timesteps = AnnealedTimestepSampler::new(0.2, 1000, 1000)?.sample_batch(Address::new(0, "timestep"), 1);
//! let noised = base.schedule.add_noise(&clean, &noise, &timesteps)?;
//! let text = base.conditioning(&["a photo of a face".to_string()])?;
//! let pass = Pass { loras: Loras::one(&base.lcm_lora, 0.7), ..Pass::default() };
//! let noise_prediction = base.unet.forward(&noised, &timesteps, &text, &pass)?;
//! let latents = preview(&base.schedule, &noised, &noise_prediction, &timesteps, PreviewForm::Equation3)?;
//! let loss = base.identity_loss().loss(&base.preview_decoder.decode(&latents)?, &image)?;
//! # assert!(loss.loss.to_scalar::<f32>()?.is_finite() && loss.counted <= 1);
//! # Ok::<(), Error>(())
//! ```
//!
//! [`Trainer`] does this with both branches and both losses, on a data set of yours; [`Personalizer`] draws with the
//! result. Both are a few lines: see the examples `train` and `personalize`.
//!
//! # Rooms
//! | module | what it holds |
//! |---|---|
//! | [`lookahead`] | the paper, equation by equation: encoder, preview, image losses, LoRA re-scaling |
//! | [`train`] | [`Trainer`], [`TrainConfig`] with its presets, optimizer, checkpoints, metrics |
//! | [`personalize`] | [`Personalizer`]: sampling with the encoder's conditions, and their guidance |
//! | [`formats`] | published files of every kind: reading them, and writing them |
//! | [`hub`] | which weights come from where; getting them, or finding them offline |
//! | [`sdxl`] | the base put together from the published files of SDXL |
//! | [`data`] | data sets on disk, pairs of one identity, prompts, reading and writing pictures |
//! | [`mini`] | the miniature's weights, how they were trained, and its procedural portraits |
//! | [`models`] | networks, tensors named as in their published checkpoints; roles that yours can fill |
//! | [`schedule`] | noise schedule, annealed timesteps, samplers (DDIM, Euler, DPM-Solver++, LCM) |
//! | [`face`] | landmarks and the differentiable aligned crop |
//! | [`nn`] | layers and LoRA, frozen or trainable by where their weights come from |
//! | [`ops`] | differentiable operations that candle lacks, or whose gradient it cuts |
//! | [`autograd`] | functions with a backward pass of their own, recomputation, gradient checks |
//! | [`random`] | random numbers by address: a run that was resumed draws what it would have drawn |
//!
//! Images are `(batch, 3, height, width)` in [-1, 1], latents `(batch, 4, height, width)`. All fallible functions
//! return [`Error`], which names the file, tensor or field at fault; input never makes the library panic.
//!
//! # Features
//! The default is pure Rust on the CPU. `cuda` compiles the kernels of all operations in [`ops`] and of the optimizer for
//! NVIDIA GPUs from compute capability 8.0 on, with tensor-core kernels of their own for Hopper; it needs the CUDA
//! toolkit. `cuda::open` then opens a GPU, whose device goes wherever `Device::Cpu` does. `cudnn` and `nccl` pass the
//! features of these names on to candle; nothing here uses them yet.
#![warn(missing_docs)]

pub mod autograd;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
mod error;
pub mod face;
pub mod formats;
pub mod hub;
pub mod lookahead;
pub mod mini;
pub mod models;
pub mod nn;
pub mod ops;
pub mod personalize;
pub mod random;
pub mod schedule;
pub mod sdxl;
pub mod train;

pub use data::FaceDataset;
pub use error::{Error, Result};
pub use lookahead::{
    Base, FaceEncoder, IdentityLoss, ImageLoss, KvEncoder, LoraScale, LossValue, PreviewForm, preview,
};
pub use models::unet::{Conditioning, ImageTokens, KeyValues, Pass, Recording, UNet};
pub use nn::{LoraSet, Loras};
pub use personalize::{Guidance, Personalizer};
pub use schedule::{AnnealedTimestepSampler, NoiseSchedule, Sampler, SamplerKind};
pub use train::{TrainConfig, Trainer};

/// The README's code compiles and runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

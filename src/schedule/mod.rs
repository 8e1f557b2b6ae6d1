//! The diffusion process in time: the noise schedule, the timesteps training draws, and the samplers.
//!
//! [`NoiseSchedule`] is the forward process of SDXL. [`AnnealedTimestepSampler`] draws the timesteps of training
//! (section 4.2). A [`Sampler`] walks the reverse process; [`SamplerKind`] names one and builds it:
//!
//! ```
//! use lcm_lookahead::schedule::{NoiseSchedule, Sampler, SamplerKind};
//!
//! let sampler = "dpm++".parse::<SamplerKind>()?.build(&NoiseSchedule::sdxl(), 50)?;
//! assert_eq!(sampler.timesteps()[..2], [951, 932]);
//! # Ok::<(), lcm_lookahead::Error>(())
//! ```

mod ddim;
mod dpm_solver;
mod euler;
mod lcm;
mod noise_schedule;
mod sampler;
mod timestep_sampler;

pub use ddim::Ddim;
pub use dpm_solver::DpmSolverPlusPlus;
pub use euler::Euler;
pub use lcm::{Lcm, LcmBoundary};
pub use noise_schedule::NoiseSchedule;
pub(crate) use noise_schedule::per_sample;
pub use sampler::{Sampler, SamplerKind};
pub use timestep_sampler::AnnealedTimestepSampler;

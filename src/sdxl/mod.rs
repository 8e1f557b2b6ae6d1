//! SDXL, put together from its published files.
//!
//! [`SdxlFiles::find`] says where the files are, and gets those that are missing from the [hub](crate::hub);
//! [`Base::sdxl`](crate::Base::sdxl) assembles the frozen networks of the method from them; [`SdxlFiles::adapter`] is
//! what training starts from, and what draws where there is no encoder yet.
//!
//! ```no_run
//! use candle_core::{DType, Device};
//! use lcm_lookahead::hub::Hub;
//! use lcm_lookahead::sdxl::{SdxlChoice, SdxlFiles};
//! use lcm_lookahead::{Base, Personalizer};
//!
//! let files = SdxlFiles::find(&Hub::from_env()?, &SdxlChoice::default())?;
//! let base = Base::sdxl(&files, DType::F32, &Device::Cpu)?;
//! let adapter = files.adapter(base.unet.config())?;
//! let personalizer = Personalizer::from_adapter(base, &adapter.resampler, adapter.tensors)?;
//! # Ok::<(), lcm_lookahead::Error>(())
//! ```

mod assemble;
mod faces;
mod files;

pub use files::{SdxlChoice, SdxlFiles};

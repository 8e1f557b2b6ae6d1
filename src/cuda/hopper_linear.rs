//! The kernel for linear layers on Hopper (`ops/linear/hopper.cu`).

use std::ffi::c_void;

use candle_core::CudaDevice;

use super::{avoids, stream, taken};
use crate::Result;

/// `LcmLinear` of `ops/linear/linear.h`.
#[repr(C)]
pub(crate) struct HopperLinear {
    /// `(rows, inner)`.
    pub x: *const c_void,
    /// `(columns, inner)`, twice as many columns where `gated`.
    pub weight: *const c_void,
    /// A number for each row of the weight, or null.
    pub bias: *const c_void,
    /// `(rows, columns)`, added to the rounded product; or null.
    pub residual: *const c_void,
    /// `(rows, columns)`.
    pub y: *mut c_void,
    pub rows: i32,
    pub inner: i32,
    pub columns: i32,
    pub dtype: i32,
    /// 1: the gated GELU of the linear map, 0: the linear map.
    pub gated: i32,
}

unsafe extern "C" {
    fn lcm_linear_hopper(arguments: *const HopperLinear, stream: *mut c_void) -> i32;
}

const FAMILY: &str = "hopper-linear";

impl HopperLinear {
    /// Launches the kernel; `false` where it does not take these shapes, or this GPU is none of the Hopper generation.
    pub fn launch(&self, operation: &'static str, device: &CudaDevice) -> Result<bool> {
        if avoids(FAMILY) {
            return Ok(false);
        }
        // SAFETY: whoever fills in the arguments hands in pointers to tensors of the shapes stated, alive on this
        // stream.
        taken(operation, unsafe { lcm_linear_hopper(&raw const *self, stream(device)) })
    }
}

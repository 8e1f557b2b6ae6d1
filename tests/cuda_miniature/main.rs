//! Networks, training and sampling on the GPU against the same on the CPU.
//!
//! Needs the feature `cuda` and a GPU; without one every test says that it was skipped.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/gpu.rs"]
mod gpu;
mod networks;
mod optimizer;
mod sampling;
mod sensitivity;
mod training;

use candle_core::{DType, Device, Tensor};
use gpu::{error, gpu, numbers, squares};
use lcm_lookahead::random::Address;

fn random(purpose: &'static str, shape: &[usize]) -> Tensor {
    Address::new(11, purpose).normal(shape, DType::F32, &Device::Cpu).unwrap()
}

//! The GPU of the tests, and how far its results are from others.

use std::sync::LazyLock;

use candle_core::{DType, Device, Tensor};
use lcm_lookahead::cuda;

/// The GPU, or `None` and a line that says why the test was skipped. One device for all tests: matrix products are planned
/// once a device.
pub fn gpu() -> Option<Device> {
    static DEVICE: LazyLock<Option<Device>> = LazyLock::new(|| match cuda::open(0) {
        Ok(device) => Some(device),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    });
    DEVICE.clone()
}

/// All numbers of a tensor.
pub fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// `||a - b||^2` and `||b||^2`, in f64.
pub fn squares(a: &Tensor, b: &Tensor) -> (f64, f64) {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (numbers(a), numbers(b));
    let difference = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum();
    (difference, b.iter().map(|b| b * b).sum())
}

/// `||a - b|| / ||b||`; infinite where a number is not finite.
pub fn error(a: &Tensor, b: &Tensor) -> f64 {
    let (difference, norm) = squares(a, b);
    if difference.is_finite() { (difference / norm.max(1e-300)).sqrt() } else { f64::INFINITY }
}

//! How far a result moves by itself when the numbers it is computed from move by a dtype's rounding: what tells a fault of
//! the GPU's code from the rounding that any code of that dtype has.

use candle_core::{DType, Device, Tensor};
use lcm_lookahead::Result;
use lcm_lookahead::random::Address;

/// How much further a bf16 gradient may lie from the f32 one than the latter moves by itself. One pass in bf16 is one draw
/// of that movement: PyTorch's lies 0.05 to 2.0 times as far, over 70 draws of networks
/// (`tests/fixtures/bf16_gradients.py`).
pub const BEYOND: f64 = 2.5;
/// A limit above this would pass gradients that have lost or doubled a path.
pub const SAYS_NOTHING: f64 = 0.6;

/// `x` with each number moved by up to the unit roundoff of a dtype.
pub fn moved(x: &Tensor, dtype: DType, address: Address) -> Result<Tensor> {
    let roundoff = match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F32 => 2f64.powi(-24),
        other => unimplemented!("the roundoff of {other:?}"),
    };
    let by = ((address.uniform_tensor(x.shape(), DType::F32, &Device::Cpu)? * 2.0)? - 1.0)?;
    Ok((x + (x * by)? * roundoff)?)
}

/// The root mean square of so many draws of an error.
pub fn root_mean_square(draws: u64, mut error: impl FnMut(u64) -> Result<f64>) -> Result<f64> {
    let mut squares = 0.0;
    for draw in 0..draws {
        squares += error(draw)?.powi(2);
    }
    Ok((squares / draws as f64).sqrt())
}

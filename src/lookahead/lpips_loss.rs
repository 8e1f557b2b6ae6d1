//! LPIPS as an image loss.

use std::sync::Arc;

use candle_core::Tensor;

use super::{ImageLoss, LossValue};
use crate::Result;
use crate::models::lpips::Lpips;

/// The mean LPIPS distance between preview and conditioning image (official code: `LPIPSLoss`, on VGG).
pub struct LpipsLoss {
    network: Arc<Lpips>,
}

impl LpipsLoss {
    /// With a network supplied by the caller.
    pub fn new(network: Arc<Lpips>) -> Self {
        LpipsLoss { network }
    }
}

impl ImageLoss for LpipsLoss {
    fn name(&self) -> &str {
        "lpips"
    }

    fn loss(&self, previews: &Tensor, conditioning_images: &Tensor) -> Result<LossValue> {
        let distances = self.network.forward(previews, &conditioning_images.detach())?;
        Ok(LossValue { counted: distances.dim(0)?, loss: distances.mean(0)? })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::models::lpips::Config;
    use crate::nn::{Parameters, Weights};
    use crate::random::Address;

    #[test]
    fn a_step_against_the_gradient_brings_the_preview_nearer() -> Result<()> {
        let weights = Weights::trainable(&Parameters::new(), 1, DType::F64, &Device::Cpu);
        let config = Config { widths: [2, 2, 3, 3, 3], ..Config::vgg() };
        let network = Arc::new(Lpips::load(&config, &weights, &weights)?);
        let image = |purpose| Address::new(1, purpose).normal((2, 3, 16, 16), DType::F64, &Device::Cpu);
        let (loss, target) = (LpipsLoss::new(network), image("target")?);
        let preview = Var::from_tensor(&image("preview")?)?;
        let before = loss.loss(&preview, &target)?;
        assert_eq!(before.counted, 2);
        let gradients = before.loss.backward()?;
        let Some(gradient) = gradients.get(&preview) else { panic!("no gradient") };
        let size = gradient.sqr()?.sum_all()?.sqrt()?.to_scalar::<f64>()?;
        let step = (gradient * (1e-4 / size))?;
        let after = loss.loss(&(preview.as_tensor() - &step)?, &target)?.loss.to_scalar::<f64>()?;
        let gain = before.loss.to_scalar::<f64>()? - after;
        assert!((gain / (1e-4 * size) - 1.0).abs() < 0.05, "{gain} of {}", 1e-4 * size);
        Ok(())
    }
}

//! What a CLIP image tower sees, as image losses: the meaning of a picture, or the layout of its parts.

use std::sync::Arc;

use candle_core::{D, Tensor};

use super::{ImageLoss, LossValue};
use crate::models::clip_vision::ClipVision;
use crate::models::identity::normalise;
use crate::{Result, ops};

/// One minus the cosine of the pooled CLIP embeddings of both pictures (paper, section 5.1: "CLIP loss"), which
/// "preserves semantic attributes such as facial hair".
pub struct ClipImageLoss {
    network: Arc<ClipVision>,
}

impl ClipImageLoss {
    /// With an image tower supplied by the caller.
    pub fn new(network: Arc<ClipVision>) -> Self {
        ClipImageLoss { network }
    }

    fn embed(&self, images: &Tensor) -> Result<Tensor> {
        let images = ops::cast(images, self.network.kind().0)?;
        normalise(&self.network.forward(&self.network.preprocess(&images)?)?.pooled)
    }
}

impl ImageLoss for ClipImageLoss {
    fn name(&self) -> &str {
        "clip"
    }

    fn loss(&self, previews: &Tensor, conditioning_images: &Tensor) -> Result<LossValue> {
        let target = self.embed(&conditioning_images.detach())?.detach();
        let cosines = (self.embed(previews)? * target)?.sum(D::Minus1)?;
        Ok(LossValue { counted: cosines.dim(0)?, loss: (1.0 - cosines)?.mean_all()? })
    }
}

/// A perceptual loss where no LPIPS weights are at hand (the miniature has none): the squared distance of the patches'
/// features, each of unit length, at the same places of both pictures; 0 to 4. Like LPIPS (Zhang et al. 2018) it compares
/// normalised features place by place and so keeps the layout of a picture, and like DreamSim, which the official code
/// trains with, it takes them from a transformer.
pub struct FeatureLoss {
    network: Arc<ClipVision>,
}

impl FeatureLoss {
    /// With an image tower supplied by the caller; its penultimate hidden states are compared.
    pub fn new(network: Arc<ClipVision>) -> Self {
        FeatureLoss { network }
    }

    /// `(batch, patches, width)`.
    fn features(&self, images: &Tensor) -> Result<Tensor> {
        let images = ops::cast(images, self.network.kind().0)?;
        let states = self.network.penultimate_hidden_states(&self.network.preprocess(&images)?)?;
        // The first token stands for no place.
        normalise(&states.narrow(1, 1, states.dim(1)? - 1)?.contiguous()?)
    }
}

impl ImageLoss for FeatureLoss {
    fn name(&self) -> &str {
        "features"
    }

    fn loss(&self, previews: &Tensor, conditioning_images: &Tensor) -> Result<LossValue> {
        let target = self.features(&conditioning_images.detach())?.detach();
        let distances = (self.features(previews)? - target)?.sqr()?.sum(D::Minus1)?;
        Ok(LossValue { counted: distances.dim(0)?, loss: distances.mean_all()? })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::autograd::check_gradients;
    use crate::models::clip_vision::Config;
    use crate::nn::{Parameters, Weights};
    use crate::random::Address;

    fn losses() -> Result<[Box<dyn ImageLoss>; 2]> {
        let config = Config {
            image_size: 4,
            patch_size: 2,
            hidden_size: 4,
            intermediate_size: 6,
            num_attention_heads: 2,
            projection_dim: 3,
            ..Config::mini()
        };
        let weights = Weights::trainable(&Parameters::new(), 1, DType::F64, &Device::Cpu);
        let network = Arc::new(ClipVision::load(&config, &weights)?);
        Ok([Box::new(ClipImageLoss::new(network.clone())), Box::new(FeatureLoss::new(network))])
    }

    fn picture(purpose: &'static str) -> Result<Tensor> {
        Ok(Address::new(2, purpose).uniform_tensor((2, 3, 6, 6), DType::F64, &Device::Cpu)?.affine(1.6, -0.8)?)
    }

    #[test]
    fn a_picture_is_at_no_distance_from_itself_and_at_some_from_another() -> Result<()> {
        let (a, b) = (picture("a")?, picture("b")?);
        for loss in losses()? {
            let (same, other) = (loss.loss(&a, &a)?, loss.loss(&a, &b)?);
            assert_eq!((same.counted, other.counted), (2, 2));
            let (same, other) = (same.loss.to_scalar::<f64>()?, other.loss.to_scalar::<f64>()?);
            assert!(same.abs() < 1e-9 && other > 1e-4, "{}: {same} and {other}", loss.name());
        }
        Ok(())
    }

    #[test]
    fn the_gradient_reaches_the_pixels_exactly() -> Result<()> {
        let target = picture("target")?;
        for loss in losses()? {
            let check = check_gradients(&[picture("preview")?], |x| Ok(vec![loss.loss(&x[0], &target)?.loss]))?;
            assert!(check.worst() < 1e-6 && check.norms[0] > 1e-4, "{}: {check:?}", loss.name());
        }
        Ok(())
    }
}

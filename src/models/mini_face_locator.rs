//! The miniature's face locator: a small convolutional network that regresses the landmarks of one face.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::face_locator::FaceLocator;
use super::{image_dims, to_channels_last};
use crate::face::{Landmarks, Similarity, Template};
use crate::nn::{Conv2d, GroupNorm, Linear, Weights};
use crate::ops::{self, Activation};
use crate::{Error, Result};

const EPS: f64 = 1e-5;

/// The architecture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Images are resized to this width and height.
    pub size: usize,
    /// Channels of the convolutions, each of which halves the sides.
    pub widths: Vec<usize>,
    /// Channels normalised together.
    pub group_width: usize,
    /// Width of the layer before the output.
    pub hidden: usize,
}

impl Config {
    /// The miniature: sees 64 pixels.
    pub fn mini() -> Self {
        Config { size: 64, widths: vec![16, 32, 64, 64], group_width: 8, hidden: 64 }
    }

    fn final_side(&self) -> usize {
        self.size.checked_shr(self.widths.len() as u32).unwrap_or(0)
    }

    fn check(&self) -> Result<()> {
        let fault = |field: &str, reason: String| {
            Err(Error::Config { source_name: "mini_face_locator".into(), field: field.into(), reason })
        };
        let side = self.final_side();
        if self.widths.is_empty() || side == 0 || side << self.widths.len() != self.size {
            return fault("size", format!("{} cannot be halved {} times", self.size, self.widths.len()));
        }
        if self.group_width == 0 || self.widths.iter().any(|width| *width == 0 || width % self.group_width != 0) {
            return fault("widths", format!("must be multiples of group_width ({})", self.group_width));
        }
        Ok(())
    }
}

/// What the network says of each image, for its training.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// The landmarks as fractions of the image, `(batch, 5, 2)`, x before y: `(x + 0.5) / width`, so 0 and 1 are the
    /// outer edges of the image's border pixels.
    pub landmarks: Tensor,
    /// The logit of the probability that there is a face, `(batch,)`.
    pub presence: Tensor,
}

/// The miniature's face locator.
#[derive(Clone, Debug)]
pub struct MiniFaceLocator {
    config: Config,
    stages: Vec<(Conv2d, GroupNorm)>,
    hidden: Linear,
    output: Linear,
}

impl MiniFaceLocator {
    /// Loads `stages.*`, `hidden` and `output`.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        config.check()?;
        let (mut stages, mut input) = (Vec::new(), 3);
        for (i, &width) in config.widths.iter().enumerate() {
            let at = weights.pp("stages").pp(i);
            let conv = Conv2d::load(input, width, 3, 2, 1, false, &at.pp("conv"))?;
            stages.push((conv, GroupNorm::load(width / config.group_width, width, EPS, &at.pp("norm"))?));
            input = width;
        }
        let side = config.final_side();
        Ok(MiniFaceLocator {
            stages,
            hidden: Linear::load(side * side * input, config.hidden, true, &weights.pp("hidden"))?,
            output: Linear::load(config.hidden, 11, true, &weights.pp("output"))?,
            config: config.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The raw prediction for images `(batch, 3, height, width)` in `[-1, 1]`, of any size. Differentiable.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another.
    pub fn forward(&self, images: &Tensor) -> Result<Prediction> {
        let (batch, height, width) = image_dims("mini_face_locator", images)?;
        let size = self.config.size;
        let mut x = to_channels_last(images)?;
        if (height, width) != (size, size) {
            x = ops::resize_bilinear(&x, size, size, true)?;
        }
        for (conv, norm) in &self.stages {
            x = norm.forward_with(&conv.forward(&x)?, Activation::Relu)?;
        }
        let x = ops::activation(&self.hidden.forward(&x.flatten_from(1)?)?, Activation::Relu)?;
        let x = self.output.forward(&x)?;
        // An untrained network's guess is the middle of the image.
        let landmarks = (x.narrow(1, 0, 10)?.reshape((batch, 5, 2))? + 0.5)?;
        Ok(Prediction { landmarks, presence: x.narrow(1, 10, 1)?.squeeze(1)? })
    }
}

impl FaceLocator for MiniFaceLocator {
    fn locate(&self, images: &Tensor) -> Result<Vec<Option<Landmarks>>> {
        let (_, height, width) = image_dims("mini_face_locator", images)?;
        let prediction = self.forward(&images.detach())?;
        let landmarks = prediction.landmarks.to_dtype(DType::F64)?.to_vec3::<f64>()?;
        let presence = prediction.presence.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let pixels = |points: &Vec<Vec<f64>>| -> Landmarks {
            std::array::from_fn(|i| [points[i][0] * width as f64 - 0.5, points[i][1] * height as f64 - 0.5])
        };
        let template = Template::ArcFace.landmarks(self.config.size);
        // A logit of 0 is a probability of one half. Points no crop can be aligned to are no face either.
        let found = |(points, logit): (&Vec<Vec<f64>>, f64)| {
            let face = pixels(points);
            (logit >= 0.0 && Similarity::fit(&face, &template).is_ok()).then_some(face)
        };
        Ok(landmarks.iter().zip(presence).map(found).collect())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::autograd::check_gradients;
    use crate::nn::Parameters;
    use crate::random::Address;

    fn load(config: &Config, dtype: DType) -> Result<(MiniFaceLocator, Parameters)> {
        let parameters = Parameters::new();
        let network = MiniFaceLocator::load(config, &Weights::trainable(&parameters, 1, dtype, &Device::Cpu))?;
        Ok((network, parameters))
    }

    #[test]
    fn a_face_is_reported_in_pixels_where_it_is_likely_and_not_degenerate() -> Result<()> {
        let (network, parameters) = load(&Config::mini(), DType::F32)?;
        let images = Address::new(1, "images").normal((1, 3, 96, 128), DType::F32, &Device::Cpu)?;
        // An output layer that says the same of every image.
        parameters.get("output.weight").unwrap().set(&Tensor::zeros((11, 64), DType::F32, &Device::Cpu)?)?;
        // Fractions relative to the middle of the image.
        let face = [-0.2f32, -0.2, 0.2, -0.2, 0.0, 0.0, -0.1, 0.25, 0.1, 0.25];
        let pixels = std::array::from_fn(|i| {
            let fraction = |j: usize| f64::from(face[2 * i + j]) + 0.5;
            [fraction(0) * 128.0 - 0.5, fraction(1) * 96.0 - 0.5]
        });
        for (points, logit, expected) in [(face, -0.1f32, None), (face, 0.1, Some(pixels)), ([0.25; 10], 0.1, None)] {
            let bias = Tensor::new([&points[..], &[logit]].concat(), &Device::Cpu)?;
            parameters.get("output.bias").unwrap().set(&bias)?;
            let located = network.locate(&images)?;
            match (located[0], expected) {
                (Some(found), Some(expected)) => {
                    let expected: Landmarks = expected;
                    let apart = |(a, b): (&f64, &f64)| (a - b).abs() > 1e-4;
                    assert!(!found.iter().flatten().zip(expected.iter().flatten()).any(apart), "{found:?}");
                }
                (found, expected) => assert_eq!(found, expected),
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_reach_the_pixels_and_every_weight() -> Result<()> {
        let config = Config { size: 8, widths: vec![2, 4], group_width: 2, hidden: 5 };
        let (network, parameters) = load(&config, DType::F64)?;
        let images = Address::new(2, "images").normal((1, 3, 9, 10), DType::F64, &Device::Cpu)?;
        let outputs = |x: &[Tensor]| {
            let prediction = network.forward(&x[0])?;
            Ok(vec![prediction.landmarks, prediction.presence])
        };
        let check = check_gradients(std::slice::from_ref(&images), outputs)?;
        assert!(check.worst() < 1e-6 && check.norms[0] > 1e-3, "{check:?}");
        let prediction = network.forward(&images)?;
        let loss = (prediction.landmarks.sqr()?.sum_all()? + prediction.presence.sum_all()?)?;
        let gradients = loss.backward()?;
        for (name, variable) in parameters.all() {
            assert!(gradients.get(&variable).is_some(), "{name}");
        }
        Ok(())
    }
}

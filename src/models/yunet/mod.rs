//! YuNet (Wu et al. 2023), the face detector of OpenCV's model zoo, with the names of the initialisers of
//! `face_detection_yunet_2023mar.onnx`: batch norms folded, so some convolutions are numbered by the exporter.

mod decode;
mod network;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

pub use decode::Detection;
pub use network::Level;

use super::face_locator::FaceLocator;
use super::{image_dims, to_channels_last};
use crate::face::{Landmarks, Similarity, Template};
use crate::nn::Weights;
use crate::ops;
use crate::{Error, Result};
use network::Network;

/// The images' sides are padded to multiples of this.
const MULTIPLE: usize = 32;

/// The architecture, and how detections are chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Channels behind the stem and behind each of the five stages.
    pub widths: [usize; 6],
    /// Images with a longer side than this are made smaller first; the network finds faces of about 10 to 300 pixels.
    pub max_side: usize,
    /// Detections below this score, in `[0, 1]`, are dropped.
    pub score_threshold: f64,
    /// Of two detections that overlap by more (intersection over union), the one of lower score is dropped.
    pub overlap_threshold: f64,
}

impl Config {
    /// The published network, of 640 pixels and 0.3 overlap as published, and a score of 0.6.
    pub fn yunet() -> Self {
        Config { widths: [16, 32, 64, 64, 64, 64], max_side: 640, score_threshold: 0.6, overlap_threshold: 0.3 }
    }

    fn check(&self) -> Result<()> {
        let [.., c, d, e] = self.widths;
        if self.widths.iter().any(|width| !(1..=1 << 12).contains(width)) || c != d || d != e || self.max_side == 0 {
            return Err(Error::Config {
                source_name: "yunet".into(),
                field: "widths".into(),
                reason: format!(
                    "expected 1 to 4096, the last three (those the neck reads) equal, and max_side above 0; found {self:?}"
                ),
            });
        }
        Ok(())
    }
}

/// YuNet.
#[derive(Clone, Debug)]
pub struct YuNet {
    config: Config,
    network: Network,
}

impl YuNet {
    /// Loads the initialisers of the ONNX file by their names.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        config.check()?;
        Ok(YuNet { config: config.clone(), network: Network::load(&config.widths, weights)? })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the network says of images `(batch, 3, height, width)` in `[-1, 1]`, at strides 8, 16 and 32, without
    /// resizing. The sides are padded to multiples of 32 on the right and below.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another.
    pub fn levels(&self, images: &Tensor) -> Result<[Level; 3]> {
        let (_, height, width) = image_dims("yunet", images)?;
        let x = to_channels_last(images)?;
        self.forward(&x, height, width)
    }

    /// `x`: channels-last, RGB in [-1, 1].
    fn forward(&self, x: &Tensor, height: usize, width: usize) -> Result<[Level; 3]> {
        let padding = |side: usize| side.next_multiple_of(MULTIPLE) - side;
        // The network itself takes bytes as numbers, BGR; padding is black.
        let bgr: Vec<Tensor> = (0..3).rev().map(|c| x.narrow(3, c, 1)).collect::<candle_core::Result<_>>()?;
        let x = Tensor::cat(&bgr, 3)?.affine(127.5, 127.5)?;
        let x = x.pad_with_zeros(1, 0, padding(height))?.pad_with_zeros(2, 0, padding(width))?;
        self.network.forward(&x.contiguous()?)
    }

    /// The faces in each of the images `(batch, 3, height, width)` in `[-1, 1]`, by falling score, in pixels. No
    /// gradient passes.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another.
    pub fn detect(&self, images: &Tensor) -> Result<Vec<Vec<Detection>>> {
        let (batch, height, width) = image_dims("yunet", images)?;
        let mut x = to_channels_last(&images.detach().clamp(-1.0, 1.0)?)?;
        let longest = height.max(width);
        let (mut small_height, mut small_width) = (height, width);
        if longest > self.config.max_side {
            let scaled = |side: usize| (side * self.config.max_side / longest).max(1);
            (small_height, small_width) = (scaled(height), scaled(width));
            x = ops::resize_bilinear(&x, small_height, small_width, true)?;
        }
        let levels = self.forward(&x, small_height, small_width)?;
        let scales = [width as f64 / small_width as f64, height as f64 / small_height as f64];
        (0..batch)
            .map(|sample| {
                let levels = levels.iter().map(|level| level.sample(sample)).collect::<Result<Vec<_>>>()?;
                let found = decode::decode(&levels, self.config.score_threshold);
                let kept = decode::suppress(found, self.config.overlap_threshold);
                Ok(kept.into_iter().map(|detection| detection.scaled(scales)).collect())
            })
            .collect()
    }
}

impl Level {
    /// The numbers of one image.
    fn sample(&self, index: usize) -> Result<decode::Grid> {
        let numbers = |x: &Tensor| -> Result<Vec<f64>> {
            Ok(x.get(index)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?)
        };
        Ok(decode::Grid {
            stride: self.stride,
            width: self.scores.dim(2)?,
            scores: numbers(&self.scores)?,
            objectness: numbers(&self.objectness)?,
            boxes: numbers(&self.boxes)?,
            landmarks: numbers(&self.landmarks)?,
        })
    }
}

impl FaceLocator for YuNet {
    /// Of several faces the largest one.
    fn locate(&self, images: &Tensor) -> Result<Vec<Option<Landmarks>>> {
        let template = Template::ArcFace.landmarks(112);
        let largest = |faces: Vec<Detection>| {
            let usable = faces.into_iter().filter(|face| Similarity::fit(&face.landmarks, &template).is_ok());
            usable.max_by(|a, b| a.area().total_cmp(&b.area())).map(|face| face.landmarks)
        };
        Ok(self.detect(images)?.into_iter().map(largest).collect())
    }
}

//! Backbone, neck and heads.

use candle_core::Tensor;

use crate::Result;
use crate::nn::{Conv2d, DepthwiseConv2d, Weights};
use crate::ops::{self, Activation};

/// What the network says at one stride, channels-last: `(batch, height / stride, width / stride, numbers)`.
#[derive(Clone, Debug)]
pub struct Level {
    /// Pixels between the places.
    pub stride: usize,
    /// Logits of a face at this place, 1 number (`cls` before the logistic function).
    pub scores: Tensor,
    /// Logits of an object at this place, 1 number (`obj`).
    pub objectness: Tensor,
    /// Centre relative to the place and logarithm of the size, in strides, 4 numbers (`bbox`).
    pub boxes: Tensor,
    /// Five landmarks relative to the place, in strides, 10 numbers, x before y (`kps`).
    pub landmarks: Tensor,
}

/// A pointwise and a depthwise convolution.
#[derive(Clone, Debug)]
struct Unit {
    pointwise: Conv2d,
    depthwise: DepthwiseConv2d,
}

impl Unit {
    /// With the exporter's number of the depthwise weight, where its batch norm was folded.
    fn load(input: usize, output: usize, folded: Option<usize>, weights: &Weights, all: &Weights) -> Result<Self> {
        let depthwise = match folded {
            Some(number) => {
                let [weight, bias] = [number, number + 1].map(|number| number.to_string());
                DepthwiseConv2d::load_named([output, 3, 1, 1], &weight, Some(&bias), all)?
            }
            None => DepthwiseConv2d::load(output, 3, 1, 1, true, &weights.pp("conv2"))?,
        };
        Ok(Unit { pointwise: Conv2d::load(input, output, 1, 1, 0, true, &weights.pp("conv1"))?, depthwise })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.depthwise.forward(&self.pointwise.forward(x)?)
    }

    fn forward_relu(&self, x: &Tensor) -> Result<Tensor> {
        ops::activation(&self.forward(x)?, Activation::Relu)
    }
}

#[derive(Clone, Debug)]
pub(super) struct Network {
    stem: Conv2d,
    /// The units of `backbone.model0` to `backbone.model5`.
    stages: Vec<Vec<Unit>>,
    /// From the finest to the coarsest.
    lateral: [Unit; 3],
    /// `cls`, `obj`, `bbox` and `kps` of each level.
    heads: Vec<[Unit; 4]>,
}

impl Network {
    pub fn load(widths: &[usize; 6], all: &Weights) -> Result<Self> {
        let mut number = 420;
        let mut next = || {
            number += 3;
            Some(number)
        };
        let stem = Conv2d::load_named([3, widths[0], 3, 2, 1], "420", Some("421"), all)?;
        let mut stages = Vec::new();
        for i in 0..6 {
            let at = all.pp("backbone").pp(format!("model{i}"));
            let input = widths[i.max(1) - 1];
            // The stem is the first half of model0.
            let mut units = Vec::new();
            if i > 0 {
                units.push(Unit::load(input, input, next(), &at.pp("conv1"), all)?);
            }
            units.push(Unit::load(input, widths[i], next(), &at.pp("conv2"), all)?);
            stages.push(units);
        }
        let width = widths[5];
        // The exporter met the coarsest level first.
        let numbers = [next(), next(), next()];
        let lateral =
            |level: usize| Unit::load(width, width, numbers[2 - level], &all.pp("neck.lateral_convs").pp(level), all);
        let head = |name: &str, level: usize, outputs: usize| {
            Unit::load(width, outputs, None, &all.pp("bbox_head").pp(format!("multi_level_{name}")).pp(level), all)
        };
        let heads = |level: usize| {
            Ok([head("cls", level, 1)?, head("obj", level, 1)?, head("bbox", level, 4)?, head("kps", level, 10)?])
        };
        Ok(Network {
            stem,
            stages,
            lateral: [lateral(0)?, lateral(1)?, lateral(2)?],
            heads: (0..3).map(heads).collect::<Result<_>>()?,
        })
    }

    /// `x`: `(batch, height, width, 3)`, BGR bytes as numbers, sides multiples of 32.
    pub fn forward(&self, x: &Tensor) -> Result<[Level; 3]> {
        let mut x = ops::activation(&self.stem.forward(x)?, Activation::Relu)?;
        let mut features = Vec::new();
        for (i, stage) in self.stages.iter().enumerate() {
            x = stage.iter().try_fold(x, |x, unit| unit.forward_relu(&x))?;
            if i >= 3 {
                features.push(x.clone());
            }
            // Strides: 2 in the stem, 4 before model1 and model2, then 8, 16 and 32.
            if i != 1 && i != 5 {
                x = ops::max_pool2d(&x, 2, 2)?;
            }
        }
        let coarse = self.lateral[2].forward_relu(&features[2])?;
        let middle = self.lateral[1].forward_relu(&(&features[1] + ops::upsample_nearest_2x(&coarse)?)?)?;
        let fine = self.lateral[0].forward_relu(&(&features[0] + ops::upsample_nearest_2x(&middle)?)?)?;
        let level = |index: usize, x: &Tensor| -> Result<Level> {
            let [cls, obj, bbox, kps] = &self.heads[index];
            Ok(Level {
                stride: 8 << index,
                scores: cls.forward(x)?,
                objectness: obj.forward(x)?,
                boxes: bbox.forward(x)?,
                landmarks: kps.forward(x)?,
            })
        };
        Ok([level(0, &fine)?, level(1, &middle)?, level(2, &coarse)?])
    }
}

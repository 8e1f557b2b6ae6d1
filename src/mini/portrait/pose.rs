//! How a person stands, looks and is lit in one picture.

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::random::Address;

/// The expression of a face.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Expression {
    Neutral,
    Smile,
    Grin,
    Serious,
    Surprised,
}

/// How a person stands, looks and is lit in one picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pose {
    /// The seed the pose was drawn from; also decides the details of the scene and the grain of the style.
    pub seed: u64,
    /// Turn of the head in radians, to the right of the picture where positive.
    pub yaw: f32,
    /// Nod of the head in radians, downwards where positive.
    pub pitch: f32,
    /// Tilt of the head in radians, clockwise where positive.
    pub roll: f32,
    /// Size of the head relative to the picture: units of the picture (of which it has two) per unit of the head.
    pub scale: f32,
    /// Where the middle of the head is; the picture is `[-1, 1]` wide and high.
    pub position: [f32; 2],
    /// Where the light comes from: `(x, y)` of a unit vector, its third component pointing at the viewer.
    pub light: [f32; 2],
    /// Where the eyes look, each in `[-1, 1]`.
    pub gaze: [f32; 2],
    /// The expression.
    pub expression: Expression,
    /// Hue of the clothes, in `[0, 1]`.
    pub clothes: f32,
}

impl Pose {
    /// The pose of a seed.
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = Address::new(seed, "portrait pose").rng();
        let expression = match rng.random_range(0..10) {
            0..3 => Expression::Neutral,
            3..6 => Expression::Smile,
            6..8 => Expression::Grin,
            8 => Expression::Serious,
            _ => Expression::Surprised,
        };
        let side = if rng.random_bool(0.5) { 1.0 } else { -1.0 };
        let mut between = |low: f32, high: f32| rng.random_range(low..high);
        Pose {
            seed,
            yaw: between(-0.36, 0.36),
            pitch: between(-0.10, 0.12),
            roll: between(-0.15, 0.15),
            scale: between(0.66, 0.78),
            position: [between(-0.09, 0.09), between(-0.03, 0.06)],
            light: [side * between(0.2, 0.6), between(-0.6, -0.25)],
            gaze: [between(-0.7, 0.7), between(-0.3, 0.3)],
            expression,
            clothes: between(0.0, 1.0),
        }
    }

    /// A head that faces the viewer, for comparing people.
    pub fn frontal() -> Self {
        Pose {
            seed: 0,
            yaw: 0.0,
            pitch: 0.0,
            roll: 0.0,
            scale: 0.72,
            position: [0.0, 0.0],
            light: [-0.4, -0.45],
            gaze: [0.0, 0.0],
            expression: Expression::Neutral,
            clothes: 0.6,
        }
    }
}

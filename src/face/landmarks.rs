//! Five points of a face, and where they lie in an aligned crop.

use serde::{Deserialize, Serialize};

/// Five points of a face in pixels, `[x, y]` each: left eye, right eye, tip of the nose, left and right corner of the
/// mouth, where left and right are the picture's. The centre of the first pixel is `[0, 0]`.
pub type Landmarks = [[f64; 2]; 5];

/// Width and height of the crop [`ARCFACE_TEMPLATE`] is for.
pub const ARCFACE_SIZE: usize = 112;

/// Where the landmarks lie in the crops of 112 pixels that ArcFace and its kin were trained on.
pub const ARCFACE_TEMPLATE: Landmarks = [
    [38.29459953, 51.69630051],
    [72.53179932, 51.50139999],
    [56.02519989, 71.73660278],
    [41.54930115, 92.3655014],
    [70.72990036, 92.20410156],
];

/// How tightly an aligned crop frames the face.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// ArcFace's own: from the brows to the chin. What published identity networks expect.
    #[default]
    ArcFace,
    /// The whole head with hair and ears: ArcFace's points at two thirds of their size, around the middle of the crop.
    Loose,
}

impl Template {
    /// Where the landmarks lie in a crop of `size` by `size` pixels.
    ///
    /// Coordinates scale with `size / 112`, as InsightFace scales them.
    pub fn landmarks(self, size: usize) -> Landmarks {
        let scale = size as f64 / ARCFACE_SIZE as f64;
        ARCFACE_TEMPLATE.map(|[x, y]| match self {
            Template::ArcFace => [x * scale, y * scale],
            Template::Loose => {
                let (middle, zoom) = (ARCFACE_SIZE as f64 / 2.0, 2.0 / 3.0);
                [(middle + (x - middle) * zoom) * scale, (middle + (y - middle) * zoom) * scale]
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_scale_with_the_crop() {
        for template in [Template::ArcFace, Template::Loose] {
            for (small, large) in template.landmarks(56).iter().zip(template.landmarks(112)) {
                assert!((small[0] * 2.0 - large[0]).abs() < 1e-12 && (small[1] * 2.0 - large[1]).abs() < 1e-12);
            }
        }
        assert_eq!(Template::ArcFace.landmarks(112), ARCFACE_TEMPLATE);
    }

    #[test]
    fn the_loose_template_shows_the_face_smaller() {
        let distance = |template: Template| {
            let points = template.landmarks(112);
            (points[1][0] - points[0][0]).hypot(points[1][1] - points[0][1])
        };
        let ratio = distance(Template::Loose) / distance(Template::ArcFace);
        assert!((ratio - 2.0 / 3.0).abs() < 1e-12, "{ratio}");
    }
}

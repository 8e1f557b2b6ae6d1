//! Procedural portraits: the same person in many styles and scenes, drawn from seeds.
//!
//! An [`Identity`] says who is shown, a [`Style`] in which technique, a [`Scene`] where or dressed as what, and a
//! [`Pose`] how the person stands and is lit. Together they are a [`Portrait`], which is drawn at any size and comes
//! with its caption and the five landmarks that face alignment uses.
//!
//! ```
//! use lcm_lookahead::mini::portrait::{Identity, Portrait, Pose, Scene, Style};
//!
//! let portrait = Portrait {
//!     identity: Identity::from_seed(7),
//!     style: Style::OilPainting,
//!     scene: Scene::Forest,
//!     pose: Pose::from_seed(1),
//! };
//! assert_eq!(portrait.prompt(), "an oil painting of a face in a forest");
//! let rendered = portrait.render(64);
//! assert_eq!(rendered.image.dimensions(), (64, 64));
//! ```

mod attire;
mod backdrop;
mod canvas;
mod features;
mod figure;
mod frame;
mod hair;
mod identity;
mod pose;
mod scene;
mod style;
#[cfg(test)]
mod tests;

pub use canvas::Rgb;
pub use identity::{Age, EyeColor, FacialHair, Gender, Glasses, HairColor, HairStyle, Identity};
pub use pose::{Expression, Pose};
pub use scene::Scene;
pub use style::Style;

use canvas::Canvas;
use figure::Figure;
use frame::Frame;
use image::RgbImage;
use serde::{Deserialize, Serialize};

/// Combinations of style and scene for evaluation, one of each style: what is trained on pictures that leave them out
/// ([`GenerateConfig::leave_out`](crate::data::GenerateConfig::leave_out)) must compose them by itself. The
/// miniature's pretraining did not see them either, but for the photo
/// ([`held_out_combination`](crate::mini::pretrain::held_out_combination)).
pub const HELD_OUT_COMBINATIONS: [(Style, Scene); 10] = [
    (Style::Photo, Scene::Snow),
    (Style::OilPainting, Scene::Astronaut),
    (Style::PencilDrawing, Scene::Pirate),
    (Style::ComicBook, Scene::Desert),
    (Style::Watercolor, Scene::Sunset),
    (Style::Mosaic, Scene::Headphones),
    (Style::Neon, Scene::Forest),
    (Style::WantedPoster, Scene::Hat),
    (Style::PopArt, Scene::Knight),
    (Style::Woodcut, Scene::Crown),
];

/// A picture of a person that can be drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Portrait {
    /// Who is shown.
    pub identity: Identity,
    /// In which technique.
    pub style: Style,
    /// Where, or dressed as what.
    pub scene: Scene,
    /// How the person stands and is lit.
    pub pose: Pose,
}

/// A drawn [`Portrait`].
#[derive(Clone, Debug)]
pub struct Rendered {
    /// The picture, square.
    pub image: RgbImage,
    /// `(x, y)` in pixels of the left and the right eye (left and right in the picture), the tip of the nose, and the
    /// left and right corner of the mouth: the order that ArcFace's alignment uses. The centre of the first pixel is
    /// at `(0.5, 0.5)`.
    pub landmarks: [[f32; 2]; 5],
}

impl Portrait {
    /// The portrait that ships with the repository as `assets/portrait.png`, drawn at 128 pixels: a photo of the person
    /// of seed 1,000,020, whom no generated data set of fewer than a million people with seed 0 holds.
    pub fn shipped() -> Self {
        Portrait {
            identity: Identity::from_seed(1_000_020),
            style: Style::Photo,
            scene: Scene::Studio,
            pose: Pose::from_seed(1_000_020),
        }
    }

    /// Draws the portrait as a square of `size` pixels, at least 1.
    pub fn render(&self, size: u32) -> Rendered {
        let size = size.max(1);
        let frame = Frame::new(&self.identity, &self.pose, self.style.framing());
        let mut canvas = Canvas::new(size as usize);
        backdrop::paint(&mut canvas, self.scene, self.pose.seed);
        if self.style == Style::Photo {
            style::blur_backdrop(&mut canvas);
        }
        canvas.drawing_subject = true;
        let landmarks = Figure { identity: &self.identity, pose: &self.pose, scene: self.scene, frame: &frame }
            .draw(&mut canvas)
            .map(|p| canvas.to_pixels(p));
        canvas.drawing_subject = false;
        backdrop::paint_foreground(&mut canvas, self.scene, self.pose.seed);
        let rgb = self.style.finish(&canvas, self.scene, self.pose.seed);
        let image = RgbImage::from_fn(size, size, |x, y| {
            let color = rgb[(y * size + x) as usize];
            image::Rgb(color.map(|component| (component.clamp(0.0, 1.0) * 255.0 + 0.5) as u8))
        });
        Rendered { image, landmarks }
    }

    /// The caption in the compressed form that training uses (paper section 4.4): "an oil painting of a face in a
    /// forest".
    pub fn prompt(&self) -> String {
        self.prompt_of("a face")
    }

    /// The caption with the person described: "a photo of an old man with tan skin and short grey hair on a beach".
    pub fn described_prompt(&self) -> String {
        self.prompt_of(&self.identity.description())
    }

    /// The caption with any words for the person: `prompt_of("conceptname")` is what the official file names hold.
    pub fn prompt_of(&self, person: &str) -> String {
        let phrase = self.scene.phrase();
        let gap = if phrase.is_empty() { "" } else { " " };
        format!("{} of {person}{gap}{phrase}", self.style.phrase())
    }
}

//! Techniques: how the evenly painted layers of a portrait become a photo, an oil painting, a mosaic ...

mod filters;
mod painted;
mod printed;

use serde::{Deserialize, Serialize};

use super::Scene;
use super::canvas::{Canvas, Rgb, noise, smoothstep};
use super::frame::Framing;
use filters::Plane;

/// The technique of a portrait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Style {
    Photo,
    OilPainting,
    PencilDrawing,
    ComicBook,
    Watercolor,
    Mosaic,
    Neon,
    WantedPoster,
    PopArt,
    Woodcut,
}

impl Style {
    /// Every style; the first is the photo, the only one that counts as "vanilla".
    pub const ALL: [Style; 10] = [
        Style::Photo,
        Style::OilPainting,
        Style::PencilDrawing,
        Style::ComicBook,
        Style::Watercolor,
        Style::Mosaic,
        Style::Neon,
        Style::WantedPoster,
        Style::PopArt,
        Style::Woodcut,
    ];

    /// What stands before "of a face" in a caption, with its article.
    pub fn phrase(self) -> &'static str {
        match self {
            Style::Photo => "a photo",
            Style::OilPainting => "an oil painting",
            Style::PencilDrawing => "a pencil drawing",
            Style::ComicBook => "a comic book drawing",
            Style::Watercolor => "a watercolor painting",
            Style::Mosaic => "a mosaic",
            Style::Neon => "a neon sign",
            Style::WantedPoster => "a wanted poster",
            Style::PopArt => "a pop art print",
            Style::Woodcut => "a woodcut",
        }
    }

    pub(super) fn framing(self) -> Framing {
        match self {
            Style::WantedPoster => Framing { scale: 0.80, shift: 0.07 },
            Style::Mosaic => Framing { scale: 1.12, shift: 0.02 },
            _ => Framing { scale: 1.0, shift: 0.0 },
        }
    }

    /// The finished picture.
    pub(super) fn finish(self, canvas: &Canvas, scene: Scene, seed: u64) -> Vec<Rgb> {
        let layers = Layers::new(canvas, scene, seed as u32);
        match self {
            Style::Photo => photo(&layers),
            Style::OilPainting => painted::oil(&layers),
            Style::PencilDrawing => painted::pencil(&layers),
            Style::ComicBook => printed::comic(&layers),
            Style::Watercolor => painted::watercolor(&layers),
            Style::Mosaic => printed::mosaic(&layers),
            Style::Neon => printed::neon(&layers),
            Style::WantedPoster => printed::wanted(&layers),
            Style::PopArt => printed::pop_art(&layers),
            Style::Woodcut => printed::woodcut(&layers),
        }
        .data
    }
}

/// The layers of a canvas, as styles read them.
struct Layers {
    rgb: Plane<Rgb>,
    ink: Plane<f32>,
    subject: Plane<f32>,
    scene: Scene,
    seed: u32,
    /// Pixels per 1/128 of the picture's side: 1 in a picture of 128 pixels.
    px: f32,
}

impl Layers {
    fn new(canvas: &Canvas, scene: Scene, seed: u32) -> Self {
        let size = canvas.size;
        Layers {
            rgb: Plane::new(size, canvas.rgb.clone()),
            ink: Plane::new(size, canvas.ink.clone()),
            subject: Plane::new(size, canvas.subject.clone()),
            scene,
            seed,
            px: size as f32 / 128.0,
        }
    }

    /// A pixel's place in units of 1/128 of the picture's side.
    fn place(&self, x: usize, y: usize) -> [f32; 2] {
        [x, y].map(|v| (v as f32 + 0.5) / self.px)
    }
}

/// Takes the backdrop out of focus, before the person is drawn.
pub(super) fn blur_backdrop(canvas: &mut Canvas) {
    let sigma = 1.7 * canvas.size as f32 / 128.0;
    canvas.rgb = Plane::new(canvas.size, std::mem::take(&mut canvas.rgb)).blurred(sigma).data;
    canvas.ink.fill(0.0);
}

fn photo(layers: &Layers) -> Plane<Rgb> {
    layers.rgb.map(|x, y, c| {
        let [px, py] = layers.place(x, y);
        let ink = layers.ink.at(x as i32, y as i32);
        let grain = 0.022 * (noise(px * 1.3, py * 1.3, layers.seed) - 0.5);
        let vignette = 1.0 - 0.26 * smoothstep(45.0, 95.0, (px - 64.0).hypot(py - 64.0));
        c.map(|v| {
            // A gentle S-curve gives the contrast of film.
            let v = v.clamp(0.0, 1.0);
            let v = v + 0.16 * (v - 0.5) * v * (1.0 - v) * 4.0;
            (v * (1.0 - 0.10 * ink) + grain) * vignette
        })
    })
}

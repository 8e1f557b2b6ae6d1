//! A small antialiased painter: polygons with exact coverage, tapered strokes, and three layers (colour, ink, subject).
//!
//! Coordinates are those of the picture whatever its size: `[-1, 1]` from left to right and from top to bottom.

/// A colour: sRGB components, nominally in `[0, 1]`.
pub type Rgb = [f32; 3];
/// A point, in the coordinates of the picture or of a frame.
pub(super) type Point = [f32; 2];

pub(super) fn lerp(a: f32, b: f32, t: f32) -> f32 {
    a + (b - a) * t
}

pub(super) fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    [lerp(a[0], b[0], t), lerp(a[1], b[1], t), lerp(a[2], b[2], t)]
}

pub(super) fn scaled(a: Rgb, factor: f32) -> Rgb {
    a.map(|component| component * factor)
}

pub(super) fn luminance(c: Rgb) -> f32 {
    0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2]
}

pub(super) fn smoothstep(low: f32, high: f32, x: f32) -> f32 {
    let t = ((x - low) / (high - low)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// A number in `[0, 1)` for a cell of the integer lattice.
pub(super) fn hash(x: i32, y: i32, seed: u32) -> f32 {
    let mut h =
        (x as u32).wrapping_mul(0x85eb_ca6b) ^ (y as u32).wrapping_mul(0xc2b2_ae35) ^ seed.wrapping_mul(0x27d4_eb2f);
    h = (h ^ (h >> 15)).wrapping_mul(0x2c1b_3c6d);
    h = (h ^ (h >> 12)).wrapping_mul(0x297a_2d39);
    ((h ^ (h >> 15)) >> 8) as f32 / (1u32 << 24) as f32
}

/// Smooth noise in `[0, 1]` that varies over a distance of 1.
pub(super) fn noise(x: f32, y: f32, seed: u32) -> f32 {
    let (fx, fy) = (x.floor(), y.floor());
    let (ix, iy) = (fx as i32, fy as i32);
    let (tx, ty) = (smoothstep(0.0, 1.0, x - fx), smoothstep(0.0, 1.0, y - fy));
    let top = lerp(hash(ix, iy, seed), hash(ix + 1, iy, seed), tx);
    let bottom = lerp(hash(ix, iy + 1, seed), hash(ix + 1, iy + 1, seed), tx);
    lerp(top, bottom, ty)
}

/// Noise of three octaves in `[0, 1]`.
pub(super) fn fractal(x: f32, y: f32, seed: u32) -> f32 {
    (noise(x, y, seed) * 4.0 + noise(x * 2.1, y * 2.1, seed + 1) * 2.0 + noise(x * 4.3, y * 4.3, seed + 2)) / 7.0
}

/// A closed Catmull-Rom curve through the points.
pub(super) fn smooth_closed(points: &[Point]) -> Vec<Point> {
    let n = points.len();
    let at = |i: usize| points[i % n];
    (0..n).flat_map(|i| segment(at(i + n - 1), at(i), at(i + 1), at(i + 2), 6)).collect()
}

/// An open Catmull-Rom curve through the points.
pub(super) fn smooth_open(points: &[Point]) -> Vec<Point> {
    let last = points.len() - 1;
    let mut curve: Vec<Point> = (0..last)
        .flat_map(|i| segment(points[i.saturating_sub(1)], points[i], points[i + 1], points[(i + 2).min(last)], 6))
        .collect();
    curve.push(points[last]);
    curve
}

fn segment(a: Point, b: Point, c: Point, d: Point, steps: usize) -> impl Iterator<Item = Point> {
    (0..steps).map(move |k| {
        let t = k as f32 / steps as f32;
        let (t2, t3) = (t * t, t * t * t);
        [0, 1].map(|i| {
            0.5 * (2.0 * b[i]
                + (c[i] - a[i]) * t
                + (2.0 * a[i] - 5.0 * b[i] + 4.0 * c[i] - d[i]) * t2
                + (3.0 * b[i] - a[i] - 3.0 * c[i] + d[i]) * t3)
        })
    })
}

/// An ellipse as a polygon.
pub(super) fn ellipse(centre: Point, rx: f32, ry: f32) -> Vec<Point> {
    (0..28)
        .map(|i| {
            let (sin, cos) = (i as f32 / 28.0 * std::f32::consts::TAU).sin_cos();
            [centre[0] + rx * cos, centre[1] + ry * sin]
        })
        .collect()
}

/// How much of every pixel of a box a shape covers.
pub(super) struct Mask {
    x0: usize,
    y0: usize,
    width: usize,
    height: usize,
    data: Vec<f32>,
}

impl Mask {
    /// The coverage of a pixel of the canvas.
    pub fn at(&self, x: usize, y: usize) -> f32 {
        if x < self.x0 || y < self.y0 || x >= self.x0 + self.width || y >= self.y0 + self.height {
            return 0.0;
        }
        self.data[(y - self.y0) * self.width + x - self.x0]
    }
}

/// The picture in the making. Later shapes lie over earlier ones, in all three layers.
pub(super) struct Canvas {
    pub size: usize,
    /// Colours as a soft, evenly lit painting.
    pub rgb: Vec<Rgb>,
    /// How strongly a contour passes through each pixel.
    pub ink: Vec<f32>,
    /// 1 where the person is, 0 where the backdrop is.
    pub subject: Vec<f32>,
    /// Whether the shapes now drawn belong to the person.
    pub drawing_subject: bool,
    /// Where shapes now drawn may show; everywhere if none.
    pub clip: Option<Mask>,
}

impl Canvas {
    pub fn new(size: usize) -> Self {
        let pixels = size * size;
        Canvas {
            size,
            rgb: vec![[0.0; 3]; pixels],
            ink: vec![0.0; pixels],
            subject: vec![0.0; pixels],
            drawing_subject: false,
            clip: None,
        }
    }

    /// Half the size: pixels per unit.
    pub fn unit(&self) -> f32 {
        self.size as f32 * 0.5
    }

    /// From the coordinates of the picture to pixels, whose centres lie at halves.
    pub fn to_pixels(&self, p: Point) -> Point {
        p.map(|v| (v + 1.0) * self.unit())
    }

    /// The centre of a pixel in the coordinates of the picture.
    pub fn centre(&self, x: usize, y: usize) -> Point {
        [x, y].map(|v| (v as f32 + 0.5) / self.unit() - 1.0)
    }

    fn empty_mask(&self, points: &[Point], margin: f32) -> Mask {
        let bound = |axis: usize| {
            let low = points.iter().map(|p| p[axis]).fold(f32::MAX, f32::min) - margin;
            let high = points.iter().map(|p| p[axis]).fold(f32::MIN, f32::max) + margin;
            let low = low.floor().clamp(0.0, self.size as f32) as usize;
            (low, (high.ceil().clamp(0.0, self.size as f32) as usize).saturating_sub(low))
        };
        let ((x0, width), (y0, height)) = (bound(0), bound(1));
        Mask { x0, y0, width, height, data: vec![0.0; width * height] }
    }

    /// The exact area coverage of a polygon, by accumulating signed areas along each row.
    pub fn polygon(&self, points: &[Point]) -> Mask {
        let points: Vec<Point> = points.iter().map(|&p| self.to_pixels(p)).collect();
        let mut mask = self.empty_mask(&points, 0.0);
        let stride = mask.width + 2;
        let mut areas = vec![0.0f32; stride * mask.height];
        for (i, &p) in points.iter().enumerate() {
            let q = points[(i + 1) % points.len()];
            let local = |p: Point| [p[0] - mask.x0 as f32, p[1] - mask.y0 as f32];
            accumulate(&mut areas, stride, mask.width, mask.height, local(p), local(q));
        }
        for y in 0..mask.height {
            let mut sum = 0.0;
            for x in 0..mask.width {
                sum += areas[y * stride + x];
                mask.data[y * mask.width + x] = sum.abs().min(1.0);
            }
        }
        mask
    }

    /// The coverage of a stroke along a polyline whose width goes from `widths[0]` to `widths[1]`.
    pub fn stroke(&self, points: &[Point], widths: [f32; 2]) -> Mask {
        let points: Vec<Point> = points.iter().map(|&p| self.to_pixels(p)).collect();
        let widths = widths.map(|w| w * self.unit());
        let widest = widths[0].max(widths[1]) * 0.5 + 1.0;
        let mut mask = self.empty_mask(&points, widest);
        let segments = (points.len().max(2) - 1) as f32;
        for (i, pair) in points.windows(2).enumerate() {
            let (a, b) = (pair[0], pair[1]);
            let d = [b[0] - a[0], b[1] - a[1]];
            let length2 = (d[0] * d[0] + d[1] * d[1]).max(1e-9);
            let part = self.empty_mask(pair, widest);
            for y in part.y0..part.y0 + part.height {
                for x in part.x0..part.x0 + part.width {
                    let p = [x as f32 + 0.5 - a[0], y as f32 + 0.5 - a[1]];
                    let t = ((p[0] * d[0] + p[1] * d[1]) / length2).clamp(0.0, 1.0);
                    let distance = (p[0] - t * d[0]).hypot(p[1] - t * d[1]);
                    let width = lerp(widths[0], widths[1], (i as f32 + t) / segments);
                    // A line thinner than a pixel is a faint line one pixel wide.
                    let cover = (width.max(1.0) * 0.5 + 0.5 - distance).clamp(0.0, 1.0) * width.min(1.0);
                    let cell = &mut mask.data[(y - mask.y0) * mask.width + x - mask.x0];
                    *cell = cell.max(cover);
                }
            }
        }
        mask
    }

    /// Paints a mask over everything below: `paint` gives the colour and the opacity at a point.
    pub fn fill(&mut self, mask: &Mask, paint: impl Fn(Point) -> (Rgb, f32)) {
        self.lay(mask, true, paint);
    }

    /// Paints a mask as light or pigment on what is below, whose contours stay.
    pub fn glaze(&mut self, mask: &Mask, paint: impl Fn(Point) -> (Rgb, f32)) {
        self.lay(mask, false, paint);
    }

    fn lay(&mut self, mask: &Mask, solid: bool, paint: impl Fn(Point) -> (Rgb, f32)) {
        for y in mask.y0..mask.y0 + mask.height {
            for x in mask.x0..mask.x0 + mask.width {
                let mut cover = mask.at(x, y);
                if let Some(clip) = &self.clip {
                    cover *= clip.at(x, y);
                }
                if cover <= 0.002 {
                    continue;
                }
                let (color, opacity) = paint(self.centre(x, y));
                let (cover, i) = (cover * opacity, y * self.size + x);
                self.rgb[i] = mix(self.rgb[i], color, cover);
                if solid {
                    self.ink[i] *= 1.0 - cover;
                    self.subject[i] = lerp(self.subject[i], f32::from(self.drawing_subject), cover);
                }
            }
        }
    }

    /// Draws a contour in the ink layer.
    pub fn ink(&mut self, mask: &Mask, strength: f32) {
        for y in mask.y0..mask.y0 + mask.height {
            for x in mask.x0..mask.x0 + mask.width {
                let clip = self.clip.as_ref().map_or(1.0, |clip| clip.at(x, y));
                let i = y * self.size + x;
                self.ink[i] = self.ink[i].max(mask.at(x, y) * strength * clip);
            }
        }
    }

    /// A filled polygon with a contour of the given width.
    pub fn shape(&mut self, points: &[Point], line: f32, paint: impl Fn(Point) -> (Rgb, f32)) {
        let mask = self.polygon(points);
        self.fill(&mask, paint);
        if line > 0.0 {
            let mut contour = points.to_vec();
            contour.extend(points.first());
            let mask = self.stroke(&contour, [line; 2]);
            self.ink(&mask, 1.0);
        }
    }

    /// A stroke of one colour, which is a contour too, as strong as `ink` says.
    pub fn line(&mut self, points: &[Point], widths: [f32; 2], color: Rgb, opacity: f32, ink: f32) {
        let mask = self.stroke(points, widths);
        self.glaze(&mask, |_| (color, opacity));
        self.ink(&mask, ink);
    }

    /// A soft round spot of light or shade: opaque in the middle, gone at its rim.
    pub fn spot(&mut self, centre: Point, rx: f32, ry: f32, color: Rgb, opacity: f32) {
        let mask = self.polygon(&ellipse(centre, rx, ry));
        self.glaze(&mask, |p| {
            let r2 = ((p[0] - centre[0]) / rx).powi(2) + ((p[1] - centre[1]) / ry).powi(2);
            (color, opacity * (1.0 - r2).max(0.0).powi(2))
        });
    }

    /// Paints the whole picture.
    pub fn cover(&mut self, paint: impl Fn(Point) -> Rgb) {
        for y in 0..self.size {
            for x in 0..self.size {
                self.rgb[y * self.size + x] = paint(self.centre(x, y));
            }
        }
    }
}

/// Adds the signed area to the right of an edge to the rows it crosses.
fn accumulate(areas: &mut [f32], stride: usize, width: usize, height: usize, p: Point, q: Point) {
    if p[1] == q[1] {
        return;
    }
    let (direction, p, q) = if p[1] < q[1] { (1.0, p, q) } else { (-1.0, q, p) };
    let slope = (q[0] - p[0]) / (q[1] - p[1]);
    let first = p[1].max(0.0);
    let mut x = p[0] + (first - p[1]) * slope;
    let last_row = (q[1].ceil().max(0.0) as usize).min(height);
    for y in first as usize..last_row {
        let dy = ((y + 1) as f32).min(q[1]) - (y as f32).max(p[1]);
        if dy <= 0.0 {
            continue;
        }
        let next = x + slope * dy;
        let area = dy * direction;
        let limit = width as f32;
        let (x0, x1) = (x.min(next).clamp(0.0, limit), x.max(next).clamp(0.0, limit));
        x = next;
        let row = &mut areas[y * stride..(y + 1) * stride];
        let (left, right) = (x0 as usize, x1.ceil() as usize);
        if right <= left + 1 {
            let inside = 0.5 * (x0 + x1) - left as f32;
            row[left] += area * (1.0 - inside);
            row[left + 1] += area * inside;
            continue;
        }
        // The edge crosses several pixels of the row: it covers the part of each that lies to its right.
        let s = 1.0 / (x1 - x0);
        let mut before = 0.0;
        for (i, cell) in row.iter_mut().enumerate().take(right + 1).skip(left) {
            let pixel = i as f32;
            let covered = if pixel >= x1 {
                1.0
            } else {
                let (a, b) = (pixel.max(x0), (pixel + 1.0).min(x1));
                s * (pixel - x0).max(0.0) + s * (b - a) * (pixel + 1.0 - 0.5 * (a + b))
            };
            *cell += area * (covered - before);
            before = covered;
        }
    }
}

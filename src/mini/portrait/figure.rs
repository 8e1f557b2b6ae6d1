//! The person: head, face and neck.

use super::canvas::{
    Canvas, Mask, Point, Rgb, ellipse, hash, lerp, mix, noise, scaled, smooth_closed, smooth_open, smoothstep,
};
use super::frame::Frame;
use super::{Age, FacialHair, Gender, HairStyle, Identity, Pose, Scene};
use super::{attire, hair};

/// Width of a contour, in units of the head.
pub(super) const LINE: f32 = 0.03;

/// A person in a pose, about to be drawn.
pub(super) struct Figure<'a> {
    pub identity: &'a Identity,
    pub pose: &'a Pose,
    pub scene: Scene,
    pub frame: &'a Frame,
}

/// Where the parts of the face are, in the head's frame.
pub(super) struct Layout {
    pub eye_y: f32,
    pub nose_y: f32,
    pub mouth_y: f32,
}

impl Figure<'_> {
    /// Draws the person from back to front. Returns the five landmarks in the coordinates of the picture.
    pub fn draw(&self, canvas: &mut Canvas) -> [Point; 5] {
        let h = self.identity.face_height;
        let eye_y = 0.02;
        let nose_y = eye_y + self.identity.nose_length + 0.04;
        let layout = Layout { eye_y, nose_y, mouth_y: lerp(nose_y, 0.94 * h, 0.47) };
        if self.scene == Scene::Astronaut {
            attire::helmet_back(self, canvas);
        }
        hair::back(self, canvas);
        self.neck(canvas);
        attire::clothes(self, canvas);
        hair::over_shoulders(self, canvas);
        self.ears(canvas);
        let head = self.head(canvas);
        canvas.clip = Some(head);
        self.complexion(canvas, &layout);
        self.beard(canvas, &layout);
        canvas.clip = None;
        self.nose(canvas, &layout);
        let corners = self.mouth(canvas, &layout);
        self.moustache(canvas, &layout);
        let eyes = [-1.0, 1.0].map(|side| self.eye(canvas, &layout, side));
        hair::front(self, canvas);
        self.brows(canvas, &layout);
        self.glasses(canvas, &layout);
        attire::headwear(self, canvas);
        let tip = self.nose_tip(&layout);
        [eyes[0], eyes[1], tip, corners[0], corners[1]]
    }

    /// The line width in units of the picture.
    pub fn line(&self) -> f32 {
        self.frame.length(LINE)
    }

    /// A colour under the scene's light.
    pub fn lit(&self, color: Rgb) -> Rgb {
        let light = self.scene.light();
        [color[0] * light[0], color[1] * light[1], color[2] * light[2]]
    }

    /// How bright a surface is whose normal's first two components are given: about 1 where it faces the viewer.
    pub fn shade(&self, nx: f32, ny: f32) -> f32 {
        let nz = (1.0 - nx * nx - ny * ny).max(0.0).sqrt();
        let [lx, ly] = self.pose.light;
        let lz = (1.0 - lx * lx - ly * ly).max(0.0).sqrt();
        0.52 + 0.58 * (nx * lx + ny * ly + nz * lz)
    }

    /// Skin as bright as `shade` says: shadows turn warmer, not merely darker.
    pub(super) fn skin(&self, shade: f32) -> Rgb {
        let skin = self.identity.skin();
        let dark = 1.0 - shade.min(1.0);
        self.lit([
            skin[0] * (1.0 - 0.85 * dark) + 0.5 * (shade - 1.0).max(0.0),
            skin[1] * (1.0 - 1.12 * dark) + 0.45 * (shade - 1.0).max(0.0),
            skin[2] * (1.0 - 1.15 * dark) + 0.4 * (shade - 1.0).max(0.0),
        ])
    }

    /// The outline of the head, in its frame.
    pub fn outline(&self) -> Vec<Point> {
        let i = self.identity;
        let (w, h) = (i.face_width, i.face_height);
        let bottom = h * lerp(0.97, 1.06, i.chin);
        let right = [
            [0.52 * w, -0.92 * h],
            [0.90 * w, -0.55 * h],
            [1.0 * w, -0.10 * h],
            [w * lerp(0.93, 1.0, i.cheeks), 0.28 * h],
            [w * lerp(0.74, 0.93, i.jaw), 0.62 * h],
            [w * lerp(0.34, 0.56, i.jaw) - 0.05 * w * i.chin, 0.92 * h],
        ];
        let mut points = vec![[0.0, -h]];
        points.extend(right);
        points.push([0.0, bottom]);
        points.extend(right.iter().rev().map(|p| [-p[0], p[1]]));
        smooth_closed(&points)
    }

    fn neck(&self, canvas: &mut Canvas) {
        let i = self.identity;
        let wide = i.face_width * if i.gender == Gender::Man { 0.62 } else { 0.50 };
        let points = [
            self.frame.flat([-wide, 0.3]),
            self.frame.flat([wide, 0.3]),
            self.frame.body([wide * 1.05, 1.15]),
            self.frame.body([wide * 1.8, 1.6]),
            self.frame.body([-wide * 1.8, 1.6]),
            self.frame.body([-wide * 1.05, 1.15]),
        ];
        let chin = i.face_height;
        canvas.shape(&points, self.line(), |p| {
            let [x, y] = self.frame.local(p);
            let under_chin = 1.0 - smoothstep(chin * 0.9, chin * 1.5, y);
            (self.skin(self.shade((x / wide * 0.8).clamp(-0.9, 0.9), 0.0) * (0.93 - 0.30 * under_chin)), 1.0)
        });
    }

    fn ears(&self, canvas: &mut Canvas) {
        let i = self.identity;
        for side in [-1.0, 1.0] {
            let centre = [side * (i.face_width + 0.035), 0.1];
            let shape: Vec<Point> =
                ellipse(centre, i.ear_size * 0.62, i.ear_size).iter().map(|p| self.frame.back([p[0], p[1]])).collect();
            let shade = self.shade(side * 0.6, 0.0) * 0.93;
            canvas.shape(&shape, self.line(), |_| (self.skin(shade), 1.0));
            let inner: Vec<Point> = [[0.02, -0.55], [0.3, -0.3], [0.2, 0.1], [0.0, 0.4]]
                .map(|p| self.frame.back([centre[0] + side * p[0] * i.ear_size, centre[1] + p[1] * i.ear_size]))
                .to_vec();
            let width = self.frame.length(0.028);
            canvas.line(&smooth_open(&inner), [width, width * 0.6], self.skin(shade * 0.72), 0.8, 0.5);
            if i.earrings {
                let at = self.frame.back([centre[0], centre[1] + i.ear_size + 0.04]);
                let r = self.frame.length(0.045);
                canvas.shape(&ellipse(at, r, r), self.line() * 0.6, |p| {
                    (mix([0.95, 0.78, 0.30], [1.0, 0.97, 0.8], (at[1] - p[1]) / r * 0.5 + 0.4), 1.0)
                });
            }
        }
    }

    fn head(&self, canvas: &mut Canvas) -> Mask {
        let outline = self.frame.map(&self.outline(), Frame::flat);
        let i = self.identity;
        let grain = i.seed as u32;
        canvas.shape(&outline, self.line(), |p| {
            let [x, y] = self.frame.local(p);
            let (nx, ny) = (0.86 * x / i.face_width, 0.82 * y / i.face_height);
            let fit = (nx * nx + ny * ny).sqrt().max(1.0);
            let pores = 0.012 * (noise(x * 26.0, y * 26.0, grain) - 0.5);
            (self.skin(self.shade(nx / fit, ny / fit) + pores), 1.0)
        });
        canvas.polygon(&outline)
    }

    /// Blush, sockets, age lines, freckles, a mole: what lies in the skin.
    fn complexion(&self, canvas: &mut Canvas, layout: &Layout) {
        let (i, f) = (self.identity, self.frame);
        let skin = i.skin();
        let blush = self.lit([skin[0] * 0.97, skin[1] * 0.72, skin[2] * 0.70]);
        let shadow = self.skin(0.62);
        for side in [-1.0, 1.0] {
            let cheek = f.face([side * (i.eye_spacing + 0.08), layout.nose_y - 0.02]);
            canvas.spot(cheek, f.length(0.21), f.length(0.16), blush, 0.45);
            let socket = f.face([side * i.eye_spacing, layout.eye_y - 0.035]);
            canvas.spot(socket, f.length(i.eye_width * 1.7), f.length(0.17), shadow, 0.42);
        }
        let under_lip = f.face([0.0, layout.mouth_y + 0.12]);
        canvas.spot(under_lip, f.length(0.16), f.length(0.06), shadow, 0.4);
        let forehead = f.face([self.pose.light[0] * 0.3, -0.45]);
        canvas.spot(forehead, f.length(0.38), f.length(0.24), self.skin(1.12), 0.45);
        if i.age == Age::Old {
            let crease = self.skin(0.55);
            let width = f.length(0.028);
            for side in [-1.0, 1.0] {
                let fold = [
                    [side * (i.nose_width + 0.035), layout.nose_y - 0.01],
                    [side * (i.mouth_width + 0.03), lerp(layout.nose_y, layout.mouth_y, 0.5)],
                    [side * (i.mouth_width + 0.06), layout.mouth_y + 0.03],
                ];
                canvas.line(&smooth_open(&f.map(&fold, Frame::face)), [width, width * 0.4], crease, 0.75, 0.6);
                let bag = [-0.75, 0.0, 0.75].map(|t: f32| {
                    [side * i.eye_spacing + t * i.eye_width, layout.eye_y + i.eye_height + 0.075 - 0.03 * t.abs()]
                });
                canvas.line(&smooth_open(&f.map(&bag, Frame::face)), [width * 0.8; 2], crease, 0.5, 0.3);
                for k in [-1.0, 0.0, 1.0] {
                    let x = i.eye_spacing + i.eye_width * 1.15;
                    let foot = [[side * x, layout.eye_y + 0.02 * k], [side * (x + 0.08), layout.eye_y + 0.055 * k]];
                    canvas.line(&f.map(&foot, Frame::face), [width * 0.6; 2], crease, 0.5, 0.25);
                }
            }
            for (k, wide) in [(0.0, 0.24), (1.0, 0.19)] {
                let y = layout.eye_y - i.brow_height - 0.14 - 0.085 * k;
                let line = [[-wide, y + 0.012], [-0.08, y - 0.008], [0.08, y], [wide, y + 0.012]];
                canvas.line(&smooth_open(&f.map(&line, Frame::face)), [width * 0.7; 2], crease, 0.5, 0.3);
            }
        }
        if i.freckles {
            for k in 0..26 {
                let at = |salt| hash(k, salt, i.seed as u32);
                let side = if k % 2 == 0 { 1.0 } else { -1.0 };
                let p = f.face([side * (0.06 + 0.34 * at(1)), layout.nose_y - 0.16 + 0.2 * at(2)]);
                let r = f.length(0.016 + 0.014 * at(3));
                canvas.spot(p, r * 1.4, r * 1.4, self.lit([skin[0] * 0.66, skin[1] * 0.48, skin[2] * 0.38]), 0.95);
            }
        }
        if let Some(mole) = i.mole {
            let r = f.length(0.034);
            canvas.spot(f.face(mole), r, r, [0.16, 0.09, 0.07], 1.0);
            let dot = canvas.polygon(&ellipse(f.face(mole), r * 0.5, r * 0.5));
            canvas.ink(&dot, 0.9);
        }
    }

    fn beard(&self, canvas: &mut Canvas, layout: &Layout) {
        let (i, f) = (self.identity, self.frame);
        let hair =
            if i.hair_style == HairStyle::Bald || i.age != Age::Old { i.hair() } else { mix(i.hair(), [0.8; 3], 0.25) };
        let (w, h, my) = (i.face_width, i.face_height, layout.mouth_y);
        let region: Vec<Point> = match i.facial_hair {
            FacialHair::None | FacialHair::Moustache => return,
            FacialHair::Goatee => vec![
                [-0.13, my + 0.09],
                [0.0, my + 0.075],
                [0.13, my + 0.09],
                [0.17, h * 0.95],
                [0.0, h * 1.2],
                [-0.17, h * 0.95],
            ],
            FacialHair::Beard | FacialHair::Stubble => vec![
                [-w * 1.1, 0.06],
                [-w * 0.86, 0.22],
                [-i.mouth_width - 0.10, my - 0.10],
                [-i.mouth_width * 0.55, layout.nose_y + 0.075],
                [0.0, layout.nose_y + 0.085],
                [i.mouth_width * 0.55, layout.nose_y + 0.075],
                [i.mouth_width + 0.10, my - 0.10],
                [w * 0.86, 0.22],
                [w * 1.1, 0.06],
                [w * 1.1, h * 0.8],
                [0.0, h * 1.3],
                [-w * 1.1, h * 0.8],
            ],
        };
        let stubble = i.facial_hair == FacialHair::Stubble;
        let points = smooth_closed(&f.map(&region, Frame::face));
        let mask = canvas.polygon(&points);
        let seed = i.seed as u32 + 5;
        let paint = |p: Point| {
            let [x, y] = f.local(p);
            let strand = noise(x * 30.0, y * 9.0, seed) - 0.5;
            let light = self.shade((0.8 * x / w).clamp(-0.9, 0.9), (0.35 * y / h).clamp(-0.3, 0.3));
            (self.lit(scaled(hair, light * (1.0 + 0.55 * strand))), if stubble { 0.36 + 0.3 * strand } else { 0.97 })
        };
        if stubble {
            canvas.glaze(&mask, paint);
        } else {
            canvas.fill(&mask, paint);
            let contour = canvas.stroke(&points, [self.line() * 0.8; 2]);
            canvas.ink(&contour, 0.9);
        }
    }

    fn moustache(&self, canvas: &mut Canvas, layout: &Layout) {
        let i = self.identity;
        if !matches!(i.facial_hair, FacialHair::Moustache | FacialHair::Beard | FacialHair::Goatee) {
            return;
        }
        let (top, wide) = (layout.nose_y + 0.055, i.mouth_width * 1.12 + 0.03);
        let low = layout.mouth_y - 0.015;
        let points = [
            [0.0, top + 0.012],
            [wide * 0.45, top],
            [wide * 0.95, low - 0.035],
            [wide * 1.12, low + 0.05],
            [wide * 0.6, low + 0.015],
            [0.0, low - 0.02],
            [-wide * 0.6, low + 0.015],
            [-wide * 1.12, low + 0.05],
            [-wide * 0.95, low - 0.035],
            [-wide * 0.45, top],
        ];
        let hair = if i.age == Age::Old { mix(i.hair(), [0.8; 3], 0.25) } else { i.hair() };
        let points = smooth_closed(&self.frame.map(&points, Frame::face));
        canvas.shape(&points, self.line() * 0.7, |p| {
            let [x, y] = self.frame.local(p);
            let strand = noise(x * 32.0 + y * 10.0, y * 8.0, i.seed as u32) - 0.5;
            (self.lit(scaled(hair, self.shade(x / i.face_width * 0.7, -0.1) * (1.0 + 0.5 * strand))), 1.0)
        });
    }
}

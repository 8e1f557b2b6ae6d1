//! The features of the face: nose, mouth, eyes, brows, and glasses.

use super::canvas::{Canvas, Point, ellipse, lerp, mix, scaled, smooth_closed, smooth_open, smoothstep};
use super::figure::{Figure, Layout};
use super::{Age, Expression, Gender, Glasses, HairStyle};

impl Figure<'_> {
    pub(super) fn nose_tip(&self, layout: &Layout) -> Point {
        self.frame.at(0.0, layout.nose_y - 0.03, self.frame.depth([0.0, layout.nose_y]) + 0.14)
    }

    pub(super) fn nose(&self, canvas: &mut Canvas, layout: &Layout) {
        let (i, f) = (self.identity, self.frame);
        let (tip, w, y) = (self.nose_tip(layout), i.nose_width, layout.nose_y);
        let dark = self.skin(0.48);
        let width = f.length(0.03);
        // The side away from the light lies in shade.
        let away = -self.pose.light[0].signum();
        let bridge = f.face([away * 0.035, layout.eye_y]);
        let wing = f.face([away * w, y]);
        let side = [bridge, tip, wing, f.face([away * w * 0.85, lerp(layout.eye_y, y, 0.55)])];
        let mask = canvas.polygon(&smooth_closed(&side));
        canvas.glaze(&mask, |_| (self.skin(0.68), 0.25 + 0.35 * i.nose_bridge));
        canvas.spot([tip[0], tip[1] + f.length(0.075)], f.length(w * 1.3), f.length(0.07), self.skin(0.5), 0.65);
        canvas.line(
            &[bridge, f.at(away * 0.05, lerp(layout.eye_y, y, 0.6), f.depth([0.0, y]) + 0.03)],
            [width * 0.5, width * 0.9],
            self.skin(0.6),
            0.2 + 0.5 * i.nose_bridge,
            0.15 + 0.75 * i.nose_bridge,
        );
        let base = f.depth([0.0, y]);
        let mut curve = Vec::new();
        for (x, dy, dz) in [
            (-1.0, -0.05, 0.0),
            (-1.08, 0.0, 0.0),
            (-0.7, 0.032, 0.04),
            (-0.35, 0.02, 0.09),
            (0.0, 0.045, 0.12),
            (0.35, 0.02, 0.09),
            (0.7, 0.032, 0.04),
            (1.08, 0.0, 0.0),
            (1.0, -0.05, 0.0),
        ] {
            curve.push(f.at(x * w, y + dy, base * 0.95 + dz));
        }
        canvas.line(&smooth_open(&curve), [width, width], dark, 0.75, 0.85);
        for side in [-1.0, 1.0] {
            let nostril = f.at(side * w * 0.5, y + 0.022, base + 0.06);
            canvas.spot(nostril, f.length(w * 0.34), f.length(0.034), self.skin(0.25), 0.95);
        }
        canvas.spot(
            [tip[0] + f.length(0.1 * self.pose.light[0] * w / 0.1), tip[1] - f.length(0.01)],
            f.length(0.06),
            f.length(0.055),
            self.skin(1.3),
            0.6,
        );
    }

    pub(super) fn mouth(&self, canvas: &mut Canvas, layout: &Layout) -> [Point; 2] {
        let (i, f) = (self.identity, self.frame);
        let (stretch, lift, open) = match self.pose.expression {
            Expression::Neutral => (1.0, 0.008, 0.0),
            Expression::Smile => (1.12, 0.045, 0.0),
            Expression::Grin => (1.18, 0.05, 0.075),
            Expression::Serious => (0.96, -0.025, 0.0),
            Expression::Surprised => (0.78, 0.0, 0.10),
        };
        let (w, y) = (i.mouth_width * stretch, layout.mouth_y);
        let (upper, lower) = (lerp(0.028, 0.062, i.lip_fullness), lerp(0.038, 0.085, i.lip_fullness));
        let corner = y - lift;
        let at = |x: f32, dy: f32| f.at(x, dy, f.depth([x, y]) + 0.03 * (1.0 - (x / w).abs()));
        let lips = self.lit(i.lips());
        let outer: Vec<Point> = [
            (-w, corner),
            (-w * 0.5, y - upper * 0.8),
            (-w * 0.16, y - upper),
            (0.0, y - upper * 0.75),
            (w * 0.16, y - upper),
            (w * 0.5, y - upper * 0.8),
            (w, corner),
            (w * 0.55, y + lower * 0.75 + open),
            (0.0, y + lower + open * 1.15),
            (-w * 0.55, y + lower * 0.75 + open),
        ]
        .map(|(x, dy)| at(x, dy))
        .to_vec();
        let middle = f.local(at(0.0, y))[1];
        canvas.shape(&smooth_closed(&outer), self.line() * 0.45 * (0.4 + i.lip_color), |p| {
            let below = smoothstep(middle - 0.01, middle + 0.05, f.local(p)[1]);
            (scaled(lips, lerp(0.84, 1.06, below)), 0.95)
        });
        let dark = [lips[0] * 0.42, lips[1] * 0.30, lips[2] * 0.32];
        let seam: Vec<Point> =
            [(-w * 1.02, corner), (-w * 0.5, y + 0.006), (0.0, y + 0.012), (w * 0.5, y + 0.006), (w * 1.02, corner)]
                .map(|(x, dy)| at(x, dy))
                .to_vec();
        if open > 0.0 {
            let mut inner = smooth_open(&seam);
            inner.extend(smooth_open(
                &[
                    (w * 0.94, corner + 0.01),
                    (w * 0.5, y + open * 0.85),
                    (0.0, y + open),
                    (-w * 0.5, y + open * 0.85),
                    (-w * 0.94, corner + 0.01),
                ]
                .map(|(x, dy)| at(x, dy)),
            ));
            let teeth =
                f.local(at(0.0, y + open * if self.pose.expression == Expression::Grin { 0.72 } else { 0.35 }))[1];
            canvas.shape(&inner, self.line() * 0.6, |p| {
                let below = smoothstep(teeth - 0.012, teeth + 0.012, f.local(p)[1]);
                (mix(self.lit([0.97, 0.95, 0.91]), [0.32, 0.07, 0.08], below), 1.0)
            });
        }
        let width = f.length(0.03);
        canvas.line(&smooth_open(&seam), [width, width], dark, 0.9, 1.0);
        let shine = at(self.pose.light[0] * 0.1, y + lower * 0.55 + open * 1.05);
        canvas.spot(shine, f.length(w * 0.5), f.length(lower * 0.4), [1.0, 0.93, 0.90], 0.3 + 0.3 * i.lip_color);
        [at(-w, corner), at(w, corner)]
    }

    /// Draws the eye of one side and returns the centre of its opening.
    pub(super) fn eye(&self, canvas: &mut Canvas, layout: &Layout, side: f32) -> Point {
        let (i, f) = (self.identity, self.frame);
        let wide_open = if self.pose.expression == Expression::Surprised { 1.25 } else { 1.0 };
        let squint = if self.pose.expression == Expression::Grin { 0.86 } else { 1.0 };
        let (w, h) = (i.eye_width, i.eye_height * wide_open * squint);
        let (sin, cos) = (-i.eye_tilt * side).sin_cos();
        let at = |x: f32, y: f32| {
            let (x, y) = (x * side, y);
            f.face([side * i.eye_spacing + x * cos - y * sin, layout.eye_y + x * sin + y * cos])
        };
        // x runs from the inner (-1) to the outer (1) corner.
        let lid = |points: &[Point]| smooth_open(&points.iter().map(|p| at(p[0] * w, p[1] * h)).collect::<Vec<_>>());
        let upper = lid(&[[-1.0, 0.25], [-0.55, -0.72], [0.1, -1.0], [0.65, -0.66], [1.0, 0.0]]);
        let lower = lid(&[[1.0, 0.0], [0.5, 0.68], [-0.1, 0.85], [-0.65, 0.62], [-1.0, 0.25]]);
        let mut opening = upper.clone();
        opening.extend(lower.iter().copied());
        let top = f.local(at(0.0, -h))[1];
        canvas.shape(&opening, 0.0, |p| {
            let shade = smoothstep(top - 0.01, top + h * 1.3, f.local(p)[1]);
            (self.lit(scaled([0.97, 0.96, 0.95], lerp(0.70, 1.0, shade))), 1.0)
        });
        canvas.clip = Some(canvas.polygon(&opening));
        let gaze = [self.pose.gaze[0] * w * 0.22 * side, self.pose.gaze[1] * h * 0.3 - h * 0.1];
        let pupil = at(gaze[0], gaze[1]);
        let r = f.length((i.eye_height * 0.98).max(0.062));
        let iris = i.iris();
        canvas.shape(&ellipse(pupil, r, r), self.line() * 0.5, |p| {
            let d = (p[0] - pupil[0]).hypot(p[1] - pupil[1]) / r;
            let color = scaled(iris, lerp(1.25, 0.9, d) + 0.35 * ((p[1] - pupil[1]) / r));
            (mix(color, scaled(iris, 0.3), smoothstep(0.72, 1.0, d)), 1.0)
        });
        let black = canvas.polygon(&ellipse(pupil, r * 0.48, r * 0.48));
        canvas.fill(&black, |_| ([0.03, 0.03, 0.04], 1.0));
        canvas.ink(&black, 1.0);
        canvas.clip = None;
        let glint = [pupil[0] + r * 0.75 * self.pose.light[0].signum() * 0.6, pupil[1] - r * 0.4];
        canvas.spot(glint, r * 0.5, r * 0.5, [1.0; 3], 1.0);
        let woman = i.gender == Gender::Woman;
        let lash = [0.10, 0.06, 0.05];
        let width = f.length(if woman { 0.042 } else { 0.032 });
        canvas.line(&upper, [width * 0.7, width * 1.1], lash, 0.95, 1.0);
        canvas.line(&lower, [width * 0.45; 2], self.skin(0.45), 0.6, 0.55);
        if woman {
            let flick = [at(w * 0.9, -h * 0.15), at(w * 1.28, -h * 0.75)];
            canvas.line(&flick, [width * 0.9, width * 0.25], lash, 0.95, 0.9);
        }
        let crease: Vec<Point> =
            [[-0.85, -0.55], [-0.4, -1.4], [0.2, -1.62], [0.8, -1.2]].map(|p: Point| at(p[0] * w, p[1] * h)).to_vec();
        canvas.line(&smooth_open(&crease), [width * 0.5; 2], self.skin(0.5), 0.55, 0.3);
        at(0.0, 0.0)
    }

    pub(super) fn brows(&self, canvas: &mut Canvas, layout: &Layout) {
        let (i, f) = (self.identity, self.frame);
        let raise = match self.pose.expression {
            Expression::Surprised => 0.05,
            Expression::Serious => -0.02,
            _ => 0.0,
        };
        let frown = if self.pose.expression == Expression::Serious { 0.03 } else { 0.0 };
        let color = if i.hair_style == HairStyle::Bald && i.age != Age::Old {
            mix(i.hair(), [0.1; 3], 0.5)
        } else {
            scaled(i.hair(), 0.72)
        };
        for side in [-1.0, 1.0] {
            let w = i.eye_width * 1.22;
            let base = layout.eye_y - i.brow_height - raise;
            let at = |t: f32, up: f32| {
                f.face([
                    side * (i.eye_spacing + t * w),
                    base - t * w * i.brow_tilt.tan() - up + if t < 0.0 { frown } else { 0.0 },
                ])
            };
            let arch = i.brow_arch;
            let curve = smooth_open(&[at(-0.95, 0.0), at(-0.3, arch * 0.6), at(0.35, arch), at(1.05, -0.01)]);
            let width = f.length(i.brow_thickness * 2.0);
            canvas.line(&curve, [width, width * 0.5], self.lit(color), 0.95, 0.9);
        }
    }

    pub(super) fn glasses(&self, canvas: &mut Canvas, layout: &Layout) {
        let (i, f) = (self.identity, self.frame);
        let (rx, ry, power): (f32, f32, f32) = match i.glasses {
            Glasses::None => return,
            Glasses::Round => (0.205, 0.195, 1.0),
            Glasses::Square => (0.215, 0.16, 0.45),
        };
        let color = [[0.08, 0.07, 0.08], [0.52, 0.16, 0.12], [0.72, 0.56, 0.22], [0.14, 0.22, 0.45]]
            [i.glasses_color.min(3) as usize];
        let width = f.length(0.042);
        let (rx, y) = (rx.min(i.eye_spacing - 0.03), layout.eye_y + 0.015);
        for side in [-1.0, 1.0] {
            let mut ring: Vec<Point> = (0..32)
                .map(|k| {
                    let (sin, cos) = (k as f32 / 32.0 * std::f32::consts::TAU).sin_cos();
                    let bend = |v: f32| v.signum() * v.abs().powf(power);
                    let (x, y) = (side * i.eye_spacing + rx * bend(cos), y + ry * bend(sin));
                    f.at(x, y, f.depth([side * i.eye_spacing, y]) + 0.05)
                })
                .collect();
            let lens = canvas.polygon(&ring);
            let centre = f.local(f.at(side * i.eye_spacing, y, f.depth([side * i.eye_spacing, y]) + 0.05));
            canvas.glaze(&lens, |p| {
                let [x, y] = f.local(p);
                let glare = smoothstep(0.05, 0.0, (x - centre[0] + (y - centre[1]) * 0.8 + 0.09).abs() - 0.02);
                ([0.93, 0.97, 1.0], 0.07 + 0.22 * glare)
            });
            ring.extend(ring.first().copied());
            canvas.line(&ring, [width; 2], color, 1.0, 1.0);
            let arm =
                [f.at(side * (i.eye_spacing + rx), y - 0.05, 0.35), f.back([side * i.face_width * 1.02, y - 0.02])];
            canvas.line(&arm, [width * 0.9; 2], color, 1.0, 0.9);
        }
        let z = f.depth([0.0, y]) + 0.07;
        let gap = i.eye_spacing - rx;
        let bridge = smooth_open(&[f.at(-gap, y - 0.02, z), f.at(0.0, y - 0.055, z), f.at(gap, y - 0.02, z)]);
        canvas.line(&bridge, [width; 2], color, 1.0, 1.0);
    }
}

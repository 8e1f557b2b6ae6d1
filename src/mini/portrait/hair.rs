//! Hair: behind the head, over the shoulders, and in front.

use super::canvas::{
    Canvas, Point, Rgb, ellipse, fractal, lerp, noise, scaled, smooth_closed, smooth_open, smoothstep,
};
use super::figure::Figure;
use super::frame::Frame;
use super::{Age, HairStyle, Scene};

/// Whether something on the head leaves no room above it.
fn covered(figure: &Figure) -> bool {
    matches!(figure.scene, Scene::Hat | Scene::Knight | Scene::Chef | Scene::Wizard | Scene::Pirate)
}

/// Hair as seen at a point: strands along the head's curve, and a band of gloss.
fn strands(figure: &Figure, p: Point, curls: f32) -> Rgb {
    let i = figure.identity;
    let [x, y] = figure.frame.local(p);
    let (nx, ny) = (0.62 * x / i.face_width, 0.62 * y / i.face_height);
    let length = (nx * nx + ny * ny).sqrt().max(1.0);
    let seed = i.seed as u32;
    let along = (x.atan2(0.4 - y)) * 14.0;
    let strand = noise(along, (x * x + y * y).sqrt() * 2.5, seed) - 0.5;
    let curl = fractal(x * 9.0 + y * 5.0, y * 9.0 - x * 5.0, seed + 1) - 0.5;
    let light = figure.shade(nx / length * 0.95, ny / length * 0.95);
    let gloss =
        smoothstep(0.16, 0.0, ((x * x * 0.7 + y * y).sqrt() - 0.78 * i.face_height).abs()) * 0.14 * (1.0 - curls);
    let tone = light * (1.0 + lerp(0.42 * strand, 0.62 * curl, curls)) + 0.06 * (strand - 0.1) * (1.0 - curls);
    let color = scaled(i.hair(), tone);
    figure.lit(color.map(|c| c + gloss * (0.25 + c) * (0.6 + strand)))
}

fn curls_of(figure: &Figure) -> f32 {
    if matches!(figure.identity.hair_style, HairStyle::Curly | HairStyle::Afro) { 1.0 } else { 0.0 }
}

fn tuft(figure: &Figure, canvas: &mut Canvas, points: &[Point], dim: f32) {
    let curls = curls_of(figure);
    canvas.shape(points, figure.line(), |p| (scaled(strands(figure, p, curls), dim), 1.0));
}

/// An outline with bumps, around `centre`.
fn bumpy(centre: Point, rx: f32, ry: f32, bumps: usize, depth: f32) -> Vec<Point> {
    let steps = bumps * 4;
    (0..steps)
        .map(|k| {
            let (sin, cos) = (k as f32 / steps as f32 * std::f32::consts::TAU).sin_cos();
            let r = 1.0 - depth + depth * 2.0 * (k as f32 / 4.0 * std::f32::consts::PI).sin().abs();
            [centre[0] + rx * r * cos, centre[1] + ry * r * sin]
        })
        .collect()
}

/// The hair behind the head.
pub(super) fn back(figure: &Figure, canvas: &mut Canvas) {
    let (i, f) = (figure.identity, figure.frame);
    let (w, h, v) = (i.face_width, i.face_height, i.hair_volume);
    let top = -h * lerp(1.06, 1.14, v);
    match i.hair_style {
        HairStyle::Bob => {
            let wide = w * lerp(1.22, 1.38, v);
            let points = [
                [0.0, top],
                [wide * 0.75, -h * 0.85],
                [wide, -0.2],
                [wide * 1.04, h * 0.45],
                [wide * 0.82, h * 0.82],
                [0.0, h * 0.75],
                [-wide * 0.82, h * 0.82],
                [-wide * 1.04, h * 0.45],
                [-wide, -0.2],
                [-wide * 0.75, -h * 0.85],
            ];
            tuft(figure, canvas, &smooth_closed(&f.map(&points, Frame::back)), 0.78);
        }
        HairStyle::Long => {
            let wide = w * lerp(1.18, 1.34, v);
            let points = [
                [0.0, top],
                [wide * 0.75, -h * 0.85],
                [wide, -0.2],
                [wide * 1.08, h * 0.6],
                [wide * 1.18, h * 1.35],
                [wide * 0.9, h * 1.75],
                [0.0, h * 1.5],
                [-wide * 0.9, h * 1.75],
                [-wide * 1.18, h * 1.35],
                [-wide * 1.08, h * 0.6],
                [-wide, -0.2],
                [-wide * 0.75, -h * 0.85],
            ];
            tuft(figure, canvas, &smooth_closed(&f.map(&points, Frame::back)), 0.76);
        }
        HairStyle::Curly => {
            let ring = bumpy([0.0, -h * 0.20], w * lerp(1.28, 1.42, v), h * lerp(1.0, 1.06, v), 13, 0.07);
            tuft(figure, canvas, &smooth_closed(&f.map(&ring, Frame::back)), 0.85);
        }
        HairStyle::Afro => {
            let squash = if covered(figure) { 0.85 } else { 1.0 };
            let r = w * lerp(1.55, 1.78, v);
            let ring = bumpy([0.0, -h * 0.36 * squash], r, r * 0.98 * squash, 22, 0.022);
            tuft(figure, canvas, &smooth_closed(&f.map(&ring, Frame::back)), 0.9);
        }
        HairStyle::Bun if !covered(figure) => {
            let r = lerp(0.25, 0.33, v);
            let ball = ellipse([0.0, -h - r * 0.62], r * 1.1, r);
            tuft(figure, canvas, &f.map(&ball, Frame::back), 0.92);
            let band = ellipse([0.0, -h * 1.01], r * 0.6, 0.045);
            canvas.shape(&f.map(&band, Frame::back), 0.0, |_| (scaled(i.hair(), 0.5), 1.0));
        }
        HairStyle::Ponytail => {
            let side = if i.part_right { 1.0 } else { -1.0 };
            let points = [
                [side * w * 0.55, -h * 0.95],
                [side * w * 1.15, -h * 1.02],
                [side * w * 1.62, -h * 0.55],
                [side * w * 1.72, h * 0.2],
                [side * w * 1.52, h * 0.85],
                [side * w * 1.38, h * 0.4],
                [side * w * 1.22, -h * 0.2],
                [side * w * 0.8, -h * 0.6],
            ];
            tuft(figure, canvas, &smooth_closed(&f.map(&points, Frame::back)), 0.9);
            let band = f.back([side * w * 0.86, -h * 0.9]);
            let r = f.length(0.09);
            canvas.shape(&ellipse(band, r, r), figure.line() * 0.7, |_| ([0.75, 0.22, 0.30], 1.0));
        }
        _ => {}
    }
}

/// Braids, which hang in front of the clothes.
pub(super) fn over_shoulders(figure: &Figure, canvas: &mut Canvas) {
    let (i, f) = (figure.identity, figure.frame);
    if i.hair_style != HairStyle::Braids {
        return;
    }
    for side in [-1.0, 1.0] {
        for k in (0..8).rev() {
            let t = k as f32 / 7.0;
            let r = lerp(0.155, 0.105, t) * lerp(0.9, 1.15, i.hair_volume);
            let at = [side * (i.face_width * 1.12 + 0.05 * (t * 3.0).sin()), lerp(0.12, 1.42, t)];
            let knot = ellipse(f.back([at[0], at[1]]), f.length(r), f.length(r * 0.92));
            tuft(figure, canvas, &knot, 0.95);
        }
        let tie = f.back([side * i.face_width * 1.12, 1.46]);
        let r = f.length(0.075);
        canvas.shape(&ellipse(tie, r, r), figure.line() * 0.7, |_| ([0.90, 0.75, 0.25], 1.0));
    }
}

/// The arc over the skull from the left to the right temple, `volume` outside the outline.
fn crown(figure: &Figure, volume: f32, low: f32) -> Vec<Point> {
    let i = figure.identity;
    (0..=20)
        .map(|k| {
            let angle = std::f32::consts::PI * (1.0 - k as f32 / 20.0);
            let (sin, cos) = angle.sin_cos();
            // A superellipse follows the skull, which is squarer than an ellipse.
            let bend = |v: f32| v.signum() * v.abs().powf(0.86);
            let x = bend(cos) * i.face_width * (1.0 + volume);
            let y = -bend(sin) * (i.face_height * (1.0 + volume * 0.8) + low) + low;
            figure.frame.back([x, y])
        })
        .collect()
}

/// The hair in front of the forehead and at the temples.
pub(super) fn front(figure: &Figure, canvas: &mut Canvas) {
    let (i, f) = (figure.identity, figure.frame);
    let (w, h, v) = (i.face_width, i.face_height, i.hair_volume);
    let line = -h * lerp(0.50, 0.64, i.hairline);
    let side = if i.part_right { 1.0 } else { -1.0 };
    let cap = |volume: f32, low: f32, hairline: &[Point]| {
        let mut points = crown(figure, volume, low);
        points.extend(smooth_open(&f.map(hairline, Frame::face)));
        points
    };
    // Hairlines run from the right to the left temple.
    let straight = [
        [w * 0.97, 0.0],
        [w * 0.84, -0.24],
        [w * 0.62, line + 0.03],
        [0.0, line - 0.03],
        [-w * 0.62, line + 0.03],
        [-w * 0.84, -0.24],
        [-w * 0.97, 0.0],
    ];
    match i.hair_style {
        HairStyle::Bald => {
            if i.age == Age::Old {
                for side in [-1.0, 1.0] {
                    let patch = [
                        [side * w * 1.04, 0.10],
                        [side * w * 1.12, -0.12],
                        [side * w * 1.03, -0.36],
                        [side * w * 0.86, -0.34],
                        [side * w * 0.90, -0.1],
                    ];
                    tuft(figure, canvas, &smooth_closed(&f.map(&patch, Frame::back)), 1.0);
                }
            } else {
                let shine = f.face([figure.pose.light[0] * 0.4, -h * 0.72]);
                canvas.spot(shine, f.length(0.26), f.length(0.13), [1.0, 0.97, 0.92], 0.5);
            }
        }
        HairStyle::Buzz => {
            let mask = canvas.polygon(&cap(0.015, -0.02, &straight));
            canvas.fill(&mask, |p| {
                let [x, y] = f.local(p);
                (strands(figure, p, 0.5), 0.72 + 0.25 * noise(x * 40.0, y * 40.0, i.seed as u32))
            });
            let edge = canvas.stroke(&smooth_open(&f.map(&straight, Frame::face)), [figure.line() * 0.6; 2]);
            canvas.ink(&edge, 0.6);
        }
        HairStyle::Short | HairStyle::Bun | HairStyle::Ponytail | HairStyle::Braids => {
            let swept = [
                [w * 0.98, 0.05],
                [w * 0.86, -0.22],
                [w * 0.72, line + 0.10 * if side > 0.0 { 0.2 } else { 1.8 }],
                [side * w * 0.42, line - 0.09],
                [side * w * 0.1, line + 0.02],
                [-side * w * 0.30, line + 0.10],
                [-w * 0.72, line + 0.10 * if side < 0.0 { 0.2 } else { 1.8 }],
                [-w * 0.86, -0.22],
                [-w * 0.98, 0.05],
            ];
            let swept = if side > 0.0 {
                swept
            } else {
                let mut s = swept;
                s[3..6].reverse();
                s
            };
            let parted = [
                [w * 0.98, 0.08],
                [w * 0.90, -0.16],
                [w * 0.66, line + 0.05],
                [w * 0.05, line - 0.12],
                [-w * 0.66, line + 0.05],
                [-w * 0.90, -0.16],
                [-w * 0.98, 0.08],
            ];
            if i.hair_style == HairStyle::Short {
                tuft(figure, canvas, &cap(lerp(0.07, 0.17, v), 0.02, &swept), 1.0);
            } else {
                tuft(figure, canvas, &cap(0.06, 0.02, &parted), 1.0);
            }
        }
        HairStyle::Spiky => {
            let mut points = Vec::new();
            for (k, p) in crown(figure, 0.06, 0.0).into_iter().enumerate() {
                let [x, y] = f.local(p);
                let out = if k % 2 == 1 && !covered(figure) { lerp(1.16, 1.34, v) } else { 1.0 };
                points.push(f.flat([x * out, y * out]));
            }
            let fringe = [
                [w * 0.97, 0.0],
                [w * 0.84, -0.22],
                [w * 0.62, line],
                [w * 0.42, line + 0.16],
                [w * 0.26, line],
                [w * 0.04, line + 0.18],
                [-w * 0.16, line],
                [-w * 0.36, line + 0.17],
                [-w * 0.60, line],
                [-w * 0.84, -0.22],
                [-w * 0.97, 0.0],
            ];
            points.extend(f.map(&fringe, Frame::face));
            tuft(figure, canvas, &points, 1.0);
        }
        HairStyle::Bob => {
            let bangs = -0.02 - i.brow_height - lerp(0.03, 0.13, i.hairline);
            let fringe = [
                [w * 0.99, 0.42],
                [w * 0.86, 0.10],
                [w * 0.80, bangs + 0.03],
                [w * 0.3, bangs],
                [0.0, bangs - 0.01],
                [-w * 0.3, bangs],
                [-w * 0.80, bangs + 0.03],
                [-w * 0.86, 0.10],
                [-w * 0.99, 0.42],
            ];
            tuft(figure, canvas, &cap(lerp(0.10, 0.2, v), 0.3, &fringe), 1.0);
        }
        HairStyle::Long => {
            let part = side * w * 0.18;
            let curtains = [
                [w * 1.0, 0.55],
                [w * 0.93, 0.12],
                [w * 0.82, -0.22],
                [w * 0.5 + part * 0.3, line + 0.02],
                [part, line - 0.17],
                [-w * 0.5 + part * 0.3, line + 0.02],
                [-w * 0.82, -0.22],
                [-w * 0.93, 0.12],
                [-w * 1.0, 0.55],
            ];
            tuft(figure, canvas, &cap(lerp(0.09, 0.17, v), 0.42, &curtains), 1.0);
        }
        HairStyle::Curly | HairStyle::Afro => {
            let afro = i.hair_style == HairStyle::Afro;
            let line = if afro { line - 0.04 } else { line };
            let mut hairline = Vec::new();
            for k in 0..=22 {
                let t = 1.0 - 2.0 * k as f32 / 22.0;
                let bump = if k % 2 == 0 {
                    0.0
                } else if afro {
                    0.025
                } else {
                    0.085
                };
                let arch = (1.0 - t.abs().powf(2.6)).max(0.0);
                hairline.push([t * w * 0.97, lerp(0.1, line, arch) + bump]);
            }
            tuft(figure, canvas, &cap(if afro { 0.25 } else { 0.16 }, 0.05, &hairline), 1.0);
        }
        HairStyle::Mohawk => {
            let mask = canvas.polygon(&cap(0.01, -0.05, &straight));
            canvas.fill(&mask, |p| (strands(figure, p, 0.5), 0.38));
            let wide = w * lerp(0.22, 0.34, v);
            let tall = if covered(figure) { 1.04 } else { lerp(1.32, 1.5, v) };
            let mut crest = vec![f.face([wide * 0.8, line + 0.1]), f.back([wide, -h * 0.95])];
            for k in 0..=6 {
                let t = 1.0 - k as f32 / 3.0;
                let spike = if k % 2 == 0 { 1.0 } else { 0.9 };
                crest.push(f.back([t * wide * 1.25, -h * (tall * spike - 0.16 * t * t)]));
            }
            crest.extend([f.back([-wide, -h * 0.95]), f.face([-wide * 0.8, line + 0.1]), f.face([0.0, line + 0.16])]);
            tuft(figure, canvas, &crest, 1.0);
        }
    }
}

//! What a person wears: clothes, and what the scene puts on the head.

use super::canvas::{Canvas, Point, Rgb, ellipse, lerp, mix, noise, scaled, smooth_closed, smooth_open, smoothstep};
use super::figure::Figure;
use super::frame::Frame;
use super::{Gender, Scene};

/// The colour of a hue in `[0, 1]`.
pub(super) fn hue(hue: f32, saturation: f32, value: f32) -> Rgb {
    [0.0, 2.0 / 3.0, 1.0 / 3.0].map(|offset| {
        let wave = (((hue + offset).fract() * 6.0 - 3.0).abs() - 1.0).clamp(0.0, 1.0);
        value * lerp(1.0, wave, saturation)
    })
}

/// The shoulders and what covers them.
pub(super) fn clothes(figure: &Figure, canvas: &mut Canvas) {
    let (i, f, line) = (figure.identity, figure.frame, figure.line());
    let broad = if i.gender == Gender::Man { 1.0 } else { 0.88 };
    let neck = i.face_width * 0.6;
    let base = i.face_height;
    let points = [
        [-neck, base * 1.32],
        [-0.75 * broad, base * 1.52],
        [-1.12 * broad, base * 1.78],
        [-1.28 * broad, 2.6],
        [-1.2, 4.0],
        [1.2, 4.0],
        [1.28 * broad, 2.6],
        [1.12 * broad, base * 1.78],
        [0.75 * broad, base * 1.52],
        [neck, base * 1.32],
        [neck * 0.55, base * 1.50],
        [0.0, base * 1.62],
        [-neck * 0.55, base * 1.50],
    ];
    let body = smooth_closed(&f.map(&points, Frame::body));
    let color = match figure.scene {
        Scene::Astronaut => [0.93, 0.94, 0.96],
        Scene::Knight => [0.66, 0.69, 0.74],
        Scene::Chef => [0.97, 0.97, 0.96],
        Scene::Wizard => [0.27, 0.16, 0.52],
        Scene::Pirate => [0.60, 0.13, 0.14],
        Scene::Crown => [0.62, 0.10, 0.18],
        Scene::Snow => hue(figure.pose.clothes, 0.65, 0.62),
        _ => hue(figure.pose.clothes, 0.55, 0.66),
    };
    let metal = figure.scene == Scene::Knight;
    let seed = figure.pose.seed as u32;
    canvas.shape(&body, line, |p| {
        let fold = noise(p[0] * 7.0 + p[1] * 2.0, p[1] * 3.0, seed) - 0.5;
        let shine = if metal { 0.55 * (p[0] * 14.0).sin().powi(3) } else { 0.0 };
        let light = figure.shade((p[0] * 0.75).clamp(-0.9, 0.9), -0.1);
        (figure.lit(scaled(color, light * (1.0 + 0.22 * fold) + 0.3 * shine)), 1.0)
    });
    let at = |x: f32, y: f32| f.body([x, base * y]);
    match figure.scene {
        Scene::Astronaut => {
            let collar = smooth_open(&[at(-0.85, 1.36), at(0.0, 1.66), at(0.85, 1.36)]);
            canvas.line(&collar, [f.length(0.17); 2], [0.62, 0.65, 0.70], 1.0, 0.5);
            canvas.line(&collar, [f.length(0.06); 2], [0.92, 0.45, 0.15], 1.0, 0.5);
        }
        Scene::Knight => {
            let collar = smooth_open(&[at(-0.62, 1.16), at(0.0, 1.5), at(0.62, 1.16)]);
            canvas.line(&collar, [f.length(0.2); 2], [0.46, 0.48, 0.53], 1.0, 0.6);
            canvas.line(&collar, [f.length(0.05); 2], [0.88, 0.90, 0.94], 1.0, 0.4);
        }
        Scene::Chef => {
            let knot = [at(-0.30, 1.28), at(0.30, 1.28), at(0.13, 1.62), at(-0.13, 1.62)];
            canvas.shape(&smooth_closed(&knot), line, |_| ([0.82, 0.17, 0.17], 1.0));
        }
        Scene::Scarf | Scene::Snow => {
            let color = hue(figure.pose.clothes + 0.45, 0.75, 0.85);
            let wrap = smooth_open(&[at(-0.52, 1.14), at(-0.25, 1.34), at(0.2, 1.36), at(0.52, 1.14)]);
            let tail = [at(0.22, 1.3), at(0.52, 1.32), at(0.5, 2.1), at(0.24, 2.08)];
            canvas.shape(&tail, line, |p| (scaled(color, if (p[1] * 16.0).sin() > 0.4 { 1.2 } else { 0.85 }), 1.0));
            let mask = canvas.stroke(&wrap, [f.length(0.34); 2]);
            canvas.fill(&mask, |p| (scaled(color, if ((p[0] + p[1]) * 16.0).sin() > 0.4 { 1.25 } else { 0.95 }), 1.0));
            canvas.line(&wrap, [line * 0.7; 2], scaled(color, 0.6), 0.7, 0.8);
        }
        Scene::Crown => {
            let fur = smooth_open(&[at(-1.1, 1.75), at(-0.55, 1.45), at(0.0, 1.72), at(0.55, 1.45), at(1.1, 1.75)]);
            canvas.line(&fur, [f.length(0.2); 2], [0.96, 0.95, 0.92], 1.0, 0.3);
            for k in 0..fur.len() / 3 {
                canvas.spot(fur[k * 3], f.length(0.035), f.length(0.05), [0.08; 3], 1.0);
            }
        }
        Scene::Wizard => {
            for (x, y) in [(-0.7, 1.9), (0.6, 1.8), (0.15, 2.1), (-0.3, 2.2)] {
                star(canvas, at(x, y), f.length(0.1));
            }
        }
        Scene::Pirate => {
            let edge = smooth_open(&[at(-0.35, 1.38), at(0.0, 2.1), at(0.35, 1.38)]);
            canvas.line(&edge, [f.length(0.08); 2], [0.92, 0.78, 0.35], 1.0, 0.5);
        }
        _ => {}
    }
}

fn star(canvas: &mut Canvas, at: Point, radius: f32) {
    let points: Vec<Point> = (0..10)
        .map(|k| {
            let (sin, cos) = (k as f32 / 10.0 * std::f32::consts::TAU - 1.57).sin_cos();
            let r = if k % 2 == 0 { radius } else { radius * 0.45 };
            [at[0] + r * cos, at[1] + r * sin]
        })
        .collect();
    canvas.shape(&points, 0.0, |_| ([0.98, 0.85, 0.35], 1.0));
}

/// The inside of a space helmet, behind the head.
pub(super) fn helmet_back(figure: &Figure, canvas: &mut Canvas) {
    let (f, r) = (figure.frame, figure.identity.face_height * 1.42);
    canvas.shape(&ellipse(f.body([0.0, -0.05]), f.length(r), f.length(r)), figure.line(), |p| {
        let shade = smoothstep(-0.8, 0.8, p[1]);
        (mix([0.26, 0.31, 0.40], [0.12, 0.15, 0.21], shade), 1.0)
    });
}

/// What the scene puts on the head.
pub(super) fn headwear(figure: &Figure, canvas: &mut Canvas) {
    let (i, f, line) = (figure.identity, figure.frame, figure.line());
    let (w, h) = (i.face_width, i.face_height);
    let brim = -h * 0.62;
    // A band round the head, seen from slightly above, as a curve from left to right.
    let band = |y: f32, wide: f32, sag: f32| {
        smooth_open(
            &[[-wide, y], [-wide * 0.6, y + sag * 0.75], [0.0, y + sag], [wide * 0.6, y + sag * 0.75], [wide, y]]
                .map(|p| f.back(p)),
        )
    };
    let metal = |base: Rgb, p: Point| {
        let x = f.local(p)[0];
        scaled(base, 0.72 + 0.55 * (0.5 + 0.5 * (x * 9.0 + 1.0).sin()).powi(2))
    };
    match figure.scene {
        Scene::Crown => {
            let gold = [0.96, 0.76, 0.24];
            let wide = w * 0.95;
            let mut points = band(brim, wide, 0.10);
            for k in 0..=8 {
                let t = 1.0 - k as f32 / 4.0;
                let y = if k % 2 == 0 { -h * 1.32 } else { -h * 1.0 };
                points.push(f.back([t * wide * 1.18, y + 0.08 * (1.0 - t * t)]));
            }
            canvas.shape(&points, line, |p| (metal(gold, p), 1.0));
            for k in 0..5 {
                let t = 1.0 - k as f32 / 2.0;
                let tip = f.back([t * wide * 1.18, -h * 1.34 + 0.08 * (1.0 - t * t)]);
                let gem = f.back([t * wide * 0.8, brim - 0.06 + 0.09 * (1.0 - t * t)]);
                let r = f.length(0.05);
                canvas.shape(&ellipse(tip, r, r), line * 0.6, |_| ([1.0, 0.90, 0.55], 1.0));
                let color = [[0.85, 0.12, 0.20], [0.15, 0.45, 0.85]][k % 2];
                canvas.shape(&ellipse(gem, r * 1.1, r * 1.2), line * 0.6, |_| (color, 1.0));
            }
        }
        Scene::Hat => {
            let felt = hue(figure.pose.clothes + 0.12, 0.45, 0.42);
            let dome = [
                [-w * 0.92, brim],
                [-w * 0.88, -h * 1.12],
                [-w * 0.35, -h * 1.40],
                [0.0, -h * 1.33],
                [w * 0.35, -h * 1.40],
                [w * 0.88, -h * 1.12],
                [w * 0.92, brim],
            ];
            let shape = |p: Point| (scaled(felt, figure.shade((f.local(p)[0] / w * 0.8).clamp(-0.9, 0.9), -0.2)), 1.0);
            canvas.shape(&smooth_closed(&f.map(&dome, Frame::back)), line, shape);
            canvas.line(&band(brim - 0.1, w * 0.93, 0.06), [f.length(0.15); 2], scaled(felt, 0.45), 1.0, 0.5);
            let disc = ellipse([0.0, brim + 0.0], w * 1.62, 0.13);
            canvas.shape(&f.map(&disc, Frame::back), line, |p| (scaled(shape(p).0, 0.9), 1.0));
        }
        Scene::Headphones => {
            let arc: Vec<Point> = (0..=16)
                .map(|k| {
                    let (sin, cos) = (std::f32::consts::PI * (1.0 - k as f32 / 16.0)).sin_cos();
                    f.back([cos * w * 1.2, 0.02 - sin * h * 1.2])
                })
                .collect();
            canvas.line(&arc, [f.length(0.13); 2], [0.13, 0.13, 0.15], 1.0, 0.9);
            canvas.line(&arc, [f.length(0.04); 2], [0.45, 0.45, 0.48], 0.9, 0.0);
            let color = hue(figure.pose.clothes + 0.3, 0.8, 0.85);
            for side in [-1.0, 1.0] {
                let cup = ellipse([side * w * 1.2, 0.08], 0.17, 0.26);
                canvas.shape(&f.map(&cup, Frame::back), line, |_| ([0.15, 0.15, 0.17], 1.0));
                let disc = ellipse([side * w * 1.25, 0.08], 0.10, 0.17);
                canvas.shape(&f.map(&disc, Frame::back), line * 0.6, |p| {
                    (scaled(color, 1.1 - 0.6 * (f.local(p)[1])), 1.0)
                });
            }
        }
        Scene::Astronaut => {
            let (r, centre) = (h * 1.42, f.body([0.0, -0.05]));
            let ring: Vec<Point> = ellipse(centre, f.length(r), f.length(r));
            let glass = canvas.polygon(&ring);
            canvas.glaze(&glass, |p| {
                let d = ((p[0] - centre[0]).hypot(p[1] - centre[1])) / f.length(r);
                ([0.75, 0.88, 1.0], 0.04 + 0.26 * smoothstep(0.80, 1.0, d))
            });
            let mut rim = ring.clone();
            rim.extend(ring.first());
            canvas.line(&rim, [f.length(0.12); 2], [0.92, 0.93, 0.95], 1.0, 0.6);
            let side = figure.pose.light[0].signum();
            let glare: Vec<Point> = (0..8)
                .map(|k| {
                    let (sin, cos) = (0.35 + k as f32 * 0.1).sin_cos();
                    [centre[0] + side * f.length(r * 0.86) * cos, centre[1] - f.length(r * 0.86) * sin]
                })
                .collect();
            canvas.line(&glare, [f.length(0.05), f.length(0.1)], [1.0; 3], 0.75, 0.3);
        }
        Scene::Knight => {
            let steel = [0.70, 0.73, 0.79];
            let helm = [
                [w * 1.10, 0.42],
                [w * 1.20, -0.1],
                [w * 1.06, -h * 0.85],
                [0.0, -h * 1.30],
                [-w * 1.06, -h * 0.85],
                [-w * 1.20, -0.1],
                [-w * 1.10, 0.42],
                [-w * 0.94, 0.30],
                [-w * 0.95, -0.25],
                [-w * 0.62, brim + 0.06],
                [0.0, brim + 0.02],
                [w * 0.62, brim + 0.06],
                [w * 0.95, -0.25],
                [w * 0.94, 0.30],
            ];
            let points = smooth_closed(&f.map(&helm, Frame::back));
            canvas.shape(&points, line, |p| (metal(steel, p), 1.0));
            let edge = f.map(&helm[7..], Frame::back);
            canvas.line(&smooth_open(&edge), [f.length(0.07); 2], [0.85, 0.68, 0.28], 1.0, 0.5);
            canvas.line(
                &[f.back([0.0, -h * 1.28]), f.back([0.0, brim])],
                [f.length(0.08); 2],
                [0.86, 0.88, 0.92],
                1.0,
                0.6,
            );
            let plume = [[0.0, -h * 1.26], [-0.12, -h * 1.62], [0.28, -h * 1.72], [0.75, -h * 1.35], [0.42, -h * 1.36]];
            canvas.shape(&smooth_closed(&f.map(&plume, Frame::back)), line, |p| {
                (scaled([0.80, 0.14, 0.16], 0.85 + 0.4 * noise(p[0] * 30.0, p[1] * 8.0, 3)), 1.0)
            });
        }
        Scene::Chef => {
            let cloth = |p: Point| (scaled([0.98, 0.98, 0.97], 0.80 + 0.24 * noise(f.local(p)[0] * 9.0, 1.0, 7)), 1.0);
            let puff = [
                [-w * 0.9, -h * 0.9],
                [-w * 1.25, -h * 1.2],
                [-w * 0.85, -h * 1.5],
                [-w * 0.3, -h * 1.58],
                [w * 0.35, -h * 1.6],
                [w * 0.9, -h * 1.48],
                [w * 1.25, -h * 1.2],
                [w * 0.9, -h * 0.9],
            ];
            canvas.shape(&smooth_closed(&f.map(&puff, Frame::back)), line, cloth);
            let mut points = band(brim, w * 0.98, 0.07);
            points.extend([f.back([w * 0.98, -h * 0.98]), f.back([-w * 0.98, -h * 0.98])]);
            canvas.shape(&points, line, |p| (scaled(cloth(p).0, 1.06), 1.0));
        }
        Scene::Wizard => {
            let blue = [0.24, 0.18, 0.58];
            let cone = [
                [-w * 0.95, brim],
                [-w * 0.45, -h * 1.35],
                [w * 0.18, -h * 1.95],
                [w * 0.42, -h * 1.35],
                [w * 0.95, brim],
            ];
            let cloth = |p: Point| (scaled(blue, figure.shade((f.local(p)[0] / w * 0.9).clamp(-0.9, 0.9), -0.1)), 1.0);
            canvas.shape(&f.map(&cone, Frame::back), line, cloth);
            for (x, y, r) in [(-0.22, -1.0, 0.10), (0.2, -1.12, 0.09), (0.02, -1.42, 0.07)] {
                star(canvas, f.back([x, y * h]), f.length(r));
            }
            canvas.line(&band(brim - 0.08, w * 0.93, 0.05), [f.length(0.12); 2], [0.92, 0.75, 0.30], 1.0, 0.5);
            let disc = ellipse([0.0, brim + 0.02], w * 1.6, 0.12);
            canvas.shape(&f.map(&disc, Frame::back), line, |p| (scaled(cloth(p).0, 0.88), 1.0));
        }
        Scene::Pirate => {
            let hat = [
                [-w * 1.35, brim - 0.02],
                [-w * 1.05, -h * 1.05],
                [-w * 0.4, -h * 1.3],
                [0.0, -h * 1.48],
                [w * 0.4, -h * 1.3],
                [w * 1.05, -h * 1.05],
                [w * 1.35, brim - 0.02],
                [w * 0.6, brim - 0.02],
                [0.0, brim + 0.03],
                [-w * 0.6, brim - 0.02],
            ];
            let points = smooth_closed(&f.map(&hat, Frame::back));
            canvas.shape(&points, line, |p| {
                (scaled([0.15, 0.13, 0.14], 0.8 + 0.5 * figure.shade(f.local(p)[0] * 0.5, -0.4)), 1.0)
            });
            canvas.line(
                &smooth_open(&f.map(&hat[..7], Frame::back)),
                [f.length(0.06); 2],
                [0.90, 0.76, 0.34],
                1.0,
                0.6,
            );
            let skull = f.back([0.0, -h * 1.06]);
            let r = f.length(0.13);
            canvas.line(
                &[[skull[0] - r * 1.6, skull[1] - r * 0.4], [skull[0] + r * 1.6, skull[1] + r * 1.6]],
                [r * 0.4; 2],
                [0.93; 3],
                1.0,
                0.3,
            );
            canvas.line(
                &[[skull[0] + r * 1.6, skull[1] - r * 0.4], [skull[0] - r * 1.6, skull[1] + r * 1.6]],
                [r * 0.4; 2],
                [0.93; 3],
                1.0,
                0.3,
            );
            canvas.shape(&ellipse(skull, r, r * 1.05), line * 0.5, |_| ([0.96; 3], 1.0));
            for side in [-0.4, 0.4] {
                canvas.spot([skull[0] + side * r, skull[1]], r * 0.38, r * 0.4, [0.05; 3], 1.0);
            }
        }
        _ => {}
    }
}

//! What is behind a person, and the weather in front.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::canvas::{Canvas, Point, Rgb, ellipse, fractal, mix, noise, scaled, smooth_closed, smoothstep};
use super::scene::Scene;
use crate::random::Address;

/// Paints the scene's backdrop over the whole picture.
pub(super) fn paint(canvas: &mut Canvas, scene: Scene, seed: u64) {
    let mut rng = Address::new(seed, "portrait backdrop").rng();
    let rng = &mut rng;
    match scene {
        Scene::Forest => forest(canvas, rng),
        Scene::Beach | Scene::Pirate => beach(canvas, rng),
        Scene::CityAtNight => city(canvas, rng),
        Scene::Space | Scene::Astronaut | Scene::Wizard => space(canvas, rng, scene),
        Scene::Snow => {
            gradient(canvas, [0.68, 0.78, 0.90], [0.90, 0.94, 0.98], rng);
            hills(canvas, 0.15, 0.12, [0.80, 0.87, 0.95], rng);
            trees(canvas, rng, 0.3, [0.30, 0.42, 0.45]);
            hills(canvas, 0.45, 0.08, [0.95, 0.97, 1.0], rng);
        }
        Scene::Mountains => mountains(canvas, rng),
        Scene::Desert => {
            gradient(canvas, [0.42, 0.70, 0.90], [0.95, 0.88, 0.72], rng);
            sun(canvas, [-0.6, -0.62], 0.14, [1.0, 0.95, 0.75]);
            hills(canvas, 0.05, 0.16, [0.90, 0.68, 0.38], rng);
            hills(canvas, 0.30, 0.14, [0.84, 0.57, 0.28], rng);
            for x in [-0.82, 0.78] {
                cactus(canvas, [x, 0.25]);
            }
        }
        Scene::Underwater => underwater(canvas, rng),
        Scene::Library => library(canvas, rng),
        Scene::Garden => garden(canvas, rng),
        Scene::Sunset => {
            canvas.cover(|p| {
                let t = (p[1] + 1.0) * 0.5;
                let low = mix([0.98, 0.55, 0.30], [1.0, 0.80, 0.42], smoothstep(0.5, 0.72, t));
                mix([0.33, 0.20, 0.46], low, smoothstep(0.0, 0.55, t))
            });
            sun(canvas, [0.58, 0.12], 0.24, [1.0, 0.88, 0.55]);
            hills(canvas, 0.32, 0.08, [0.33, 0.16, 0.30], rng);
        }
        Scene::Rain => {
            gradient(canvas, [0.40, 0.46, 0.53], [0.58, 0.62, 0.66], rng);
            for _ in 0..6 {
                let at = [rng.random_range(-1.0..1.0), rng.random_range(-1.0..-0.7)];
                canvas.spot(at, 0.55, 0.28, [0.30, 0.34, 0.40], 0.8);
            }
        }
        Scene::Knight => castle(canvas, rng),
        Scene::Chef => kitchen(canvas),
        Scene::Crown => velvet(canvas, [0.45, 0.06, 0.14]),
        Scene::Studio | Scene::Hat | Scene::Headphones | Scene::Scarf => studio(canvas, rng),
    }
}

/// Paints what falls between the viewer and the person.
pub(super) fn paint_foreground(canvas: &mut Canvas, scene: Scene, seed: u64) {
    let mut rng = Address::new(seed, "portrait foreground").rng();
    match scene {
        Scene::Snow => {
            for _ in 0..46 {
                let r = rng.random_range(0.012..0.034);
                let at = [rng.random_range(-1.0..1.0), rng.random_range(-1.0..1.0)];
                canvas.spot(at, r * 1.5, r * 1.5, [1.0; 3], 1.0);
            }
        }
        Scene::Rain => {
            for _ in 0..44 {
                let [x, y]: Point = [rng.random_range(-1.0..1.1), rng.random_range(-1.1..1.0)];
                canvas.line(&[[x, y], [x - 0.04, y + 0.17]], [0.006, 0.014], [0.85, 0.90, 0.97], 0.6, 0.1);
            }
        }
        Scene::Underwater => {
            for _ in 0..12 {
                let side = if rng.random_bool(0.5) { 1.0 } else { -1.0 };
                let at = [side * rng.random_range(0.5..0.95), rng.random_range(-1.0..0.9)];
                let r = rng.random_range(0.02..0.06);
                let mut ring = ellipse(at, r, r);
                ring.extend(ring.first().copied());
                canvas.spot(at, r, r, [0.8, 0.97, 1.0], 0.25);
                canvas.line(&ring, [0.013; 2], [0.85, 0.98, 1.0], 0.8, 0.5);
                canvas.spot([at[0] - r * 0.3, at[1] - r * 0.3], r * 0.5, r * 0.5, [1.0; 3], 0.9);
            }
        }
        _ => {}
    }
}

fn gradient(canvas: &mut Canvas, top: Rgb, bottom: Rgb, rng: &mut ChaCha8Rng) {
    let seed = rng.random();
    canvas.cover(|p| {
        let wobble = 0.05 * (fractal(p[0] * 1.5, p[1] * 2.5, seed) - 0.5);
        mix(top, bottom, ((p[1] + 1.0) * 0.5 + wobble).clamp(0.0, 1.0))
    });
}

fn studio(canvas: &mut Canvas, rng: &mut ChaCha8Rng) {
    const TONES: [Rgb; 6] = [
        [0.55, 0.66, 0.74],
        [0.74, 0.70, 0.62],
        [0.58, 0.68, 0.58],
        [0.78, 0.62, 0.58],
        [0.60, 0.57, 0.70],
        [0.68, 0.70, 0.72],
    ];
    let tone = TONES[rng.random_range(0..TONES.len())];
    let seed = rng.random();
    canvas.cover(|p| {
        let glow = 1.14 - 0.38 * (p[0] * p[0] * 0.8 + (p[1] + 0.1).powi(2)).min(1.4);
        scaled(tone, glow + 0.06 * (fractal(p[0] * 3.0, p[1] * 3.0, seed) - 0.5))
    });
}

fn sun(canvas: &mut Canvas, at: Point, radius: f32, color: Rgb) {
    canvas.spot(at, radius * 3.0, radius * 3.0, color, 0.55);
    canvas.shape(&ellipse(at, radius, radius), 0.012, |_| (color, 1.0));
}

/// A silhouette from a wavy line at the height `base` down to the bottom.
fn hills(canvas: &mut Canvas, base: f32, amplitude: f32, color: Rgb, rng: &mut ChaCha8Rng) {
    let seed = rng.random();
    let ridge = |x: f32| base + amplitude * 2.0 * (noise(x * 1.6 + 9.0, 0.5, seed) - 0.5);
    let mut points: Vec<Point> = (0..=24).map(|i| i as f32 / 12.0 * 1.05 - 1.05).map(|x| [x, ridge(x)]).collect();
    points.extend([[1.1, 1.1], [-1.1, 1.1]]);
    canvas.shape(&points, 0.012, |p| {
        (scaled(color, 1.06 - 0.25 * (p[1] - base).max(0.0) + 0.06 * (noise(p[0] * 9.0, p[1] * 14.0, seed) - 0.5)), 1.0)
    });
}

fn trees(canvas: &mut Canvas, rng: &mut ChaCha8Rng, base: f32, color: Rgb) {
    for i in 0..9 {
        let x = -1.0 + i as f32 * 0.25 + rng.random_range(-0.07..0.07);
        let height = rng.random_range(0.45..0.95);
        let shade = rng.random_range(0.75..1.15);
        for level in 0..3 {
            let (top, wide) = (base - height * (1.0 - 0.26 * level as f32), 0.08 + 0.05 * level as f32);
            let bottom = top + height * 0.48;
            canvas.shape(&[[x, top], [x + wide, bottom], [x - wide, bottom]], 0.010, |p| {
                (scaled(color, shade * (1.1 - 0.5 * (p[0] - x) / wide.max(0.01) * 0.4)), 1.0)
            });
        }
    }
}

fn forest(canvas: &mut Canvas, rng: &mut ChaCha8Rng) {
    let seed = rng.random();
    canvas.cover(|p| {
        let leaves = fractal(p[0] * 5.0, p[1] * 5.0, seed);
        let light = smoothstep(0.5, 0.8, leaves) * (0.9 - 0.4 * p[1]).max(0.0);
        mix(mix([0.10, 0.27, 0.13], [0.22, 0.45, 0.18], leaves), [0.80, 0.90, 0.48], 0.75 * light)
    });
    for (i, x) in [-0.95f32, -0.62, -0.3, 0.25, 0.58, 0.9].into_iter().enumerate() {
        let x = x + rng.random_range(-0.08..0.08);
        let wide = rng.random_range(0.05..0.10);
        let bark = mix([0.30, 0.19, 0.11], [0.42, 0.29, 0.18], rng.random());
        canvas.shape(
            &[[x - wide * 0.8, -1.1], [x + wide * 0.8, -1.1], [x + wide * 1.2, 0.9], [x - wide * 1.2, 0.9]],
            0.014,
            |p| {
                let side = (p[0] - x) / wide;
                (scaled(bark, 1.0 - 0.35 * side + 0.5 * (noise(p[0] * 40.0, p[1] * 5.0, seed + i as u32) - 0.5)), 1.0)
            },
        );
    }
    for _ in 0..26 {
        let at = [rng.random_range(-1.0..1.0), rng.random_range(-1.05..-0.55)];
        let green = mix([0.16, 0.40, 0.14], [0.45, 0.66, 0.22], rng.random());
        canvas.shape(&ellipse(at, rng.random_range(0.08..0.2), 0.09), 0.008, |_| (green, 0.9));
    }
    hills(canvas, 0.72, 0.06, [0.24, 0.42, 0.16], rng);
}

fn beach(canvas: &mut Canvas, rng: &mut ChaCha8Rng) {
    gradient(canvas, [0.30, 0.65, 0.92], [0.80, 0.93, 0.98], rng);
    sun(canvas, [0.68, -0.68], 0.13, [1.0, 0.95, 0.65]);
    for _ in 0..3 {
        let at: Point = [rng.random_range(-0.9..0.9), rng.random_range(-0.85..-0.45)];
        for dx in [-0.1, 0.0, 0.11] {
            canvas.spot([at[0] + dx, at[1] - 0.02], 0.15, 0.09, [1.0; 3], 0.9);
        }
    }
    let seed = rng.random();
    canvas.shape(&[[-1.1, 0.02], [1.1, 0.02], [1.1, 1.1], [-1.1, 1.1]], 0.012, |p| {
        let wave = smoothstep(0.60, 0.75, noise(p[0] * 5.0, p[1] * 24.0, seed));
        (mix(mix([0.05, 0.42, 0.68], [0.25, 0.75, 0.78], p[1] * 2.2), [0.9, 0.98, 1.0], 0.6 * wave), 1.0)
    });
    hills(canvas, 0.46, 0.05, [0.97, 0.96, 0.92], rng);
    hills(canvas, 0.52, 0.05, [0.94, 0.83, 0.60], rng);
}

fn city(canvas: &mut Canvas, rng: &mut ChaCha8Rng) {
    gradient(canvas, [0.05, 0.05, 0.17], [0.30, 0.16, 0.38], rng);
    canvas.shape(&ellipse([0.66, -0.70], 0.12, 0.12), 0.012, |_| ([0.96, 0.94, 0.80], 1.0));
    for layer in 0..2 {
        let base = mix([0.16, 0.14, 0.32], [0.08, 0.08, 0.18], layer as f32);
        let mut x = -1.1;
        while x < 1.0 {
            let wide = rng.random_range(0.2..0.36);
            let top = rng.random_range(-0.75..-0.1) + 0.3 * layer as f32;
            canvas.shape(&[[x, top], [x + wide, top], [x + wide, 1.1], [x, 1.1]], 0.012, |_| (base, 1.0));
            for row in 0..12 {
                for column in 0..((wide / 0.085) as i32) {
                    let at = [x + 0.04 + column as f32 * 0.085, top + 0.07 + row as f32 * 0.12];
                    if rng.random_bool(0.5) {
                        let glow = mix([1.0, 0.80, 0.36], [0.95, 0.93, 0.72], rng.random());
                        let window = [at, [at[0] + 0.045, at[1]], [at[0] + 0.045, at[1] + 0.06], [at[0], at[1] + 0.06]];
                        canvas.shape(&window, 0.0, |_| (glow, 0.95));
                    }
                }
            }
            x += wide + 0.01;
        }
    }
}

fn space(canvas: &mut Canvas, rng: &mut ChaCha8Rng, scene: Scene) {
    let seed = rng.random();
    let cloud = if scene == Scene::Wizard { [0.42, 0.16, 0.62] } else { [0.18, 0.26, 0.62] };
    canvas.cover(|p| {
        let t = smoothstep(0.38, 0.85, fractal(p[0] * 1.4 + 3.0, p[1] * 1.4, seed));
        let u = smoothstep(0.45, 0.9, fractal(p[0] * 1.7 - 5.0, p[1] * 1.7, seed + 9));
        mix(mix([0.03, 0.03, 0.10], cloud, t), [0.72, 0.28, 0.55], 0.6 * u)
    });
    for _ in 0..70 {
        let r = rng.random_range(0.008..0.026);
        let at = [rng.random_range(-1.0..1.0), rng.random_range(-1.0..1.0)];
        canvas.spot(at, r, r, [1.0, 0.98, 0.9], 1.0);
    }
    if scene != Scene::Wizard {
        let planet = [-0.70, -0.58];
        canvas.shape(&ellipse(planet, 0.24, 0.24), 0.014, |p| {
            let band = noise(0.5, (p[1] + 0.25 * p[0]) * 14.0, seed);
            let light =
                1.1 - 1.1 * ((p[0] - planet[0] + 0.08).powi(2) + (p[1] - planet[1] + 0.08).powi(2)).sqrt() / 0.24;
            (scaled(mix([0.88, 0.62, 0.40], [0.97, 0.84, 0.62], band), 0.35 + 0.75 * light.max(0.0)), 1.0)
        });
        canvas.line(&[[-1.05, -0.46], [-0.70, -0.57], [-0.36, -0.70]], [0.03, 0.03], [0.93, 0.84, 0.70], 0.9, 0.5);
    } else {
        canvas.shape(&ellipse([0.68, -0.66], 0.17, 0.17), 0.012, |_| ([0.97, 0.95, 0.82], 1.0));
        canvas.shape(&ellipse([0.75, -0.70], 0.14, 0.14), 0.0, |_| ([0.22, 0.12, 0.36], 1.0));
    }
}

fn mountains(canvas: &mut Canvas, rng: &mut ChaCha8Rng) {
    gradient(canvas, [0.36, 0.62, 0.90], [0.88, 0.94, 0.98], rng);
    for (x, top, wide) in [(-0.65, -0.72, 0.75), (0.7, -0.80, 0.8), (0.05, -0.35, 0.7)] {
        let (x, top) = (x + rng.random_range(-0.1..0.1), top + rng.random_range(-0.08..0.08));
        let rock = mix([0.42, 0.47, 0.58], [0.52, 0.54, 0.62], rng.random());
        canvas.shape(&[[x, top], [x + wide, 0.7], [x - wide, 0.7]], 0.014, |p| {
            (scaled(rock, if p[0] > x + 0.05 * (p[1] * 20.0).sin() { 0.74 } else { 1.08 }), 1.0)
        });
        let cap = |t: f32| wide * t / (0.7 - top);
        let snow = [
            [x, top],
            [x + cap(0.36), top + 0.36],
            [x + cap(0.10), top + 0.24],
            [x - cap(0.02), top + 0.40],
            [x - cap(0.14), top + 0.25],
            [x - cap(0.34), top + 0.34],
        ];
        canvas.shape(&snow, 0.010, |p| (if p[0] > x { [0.82, 0.87, 0.94] } else { [0.98, 0.99, 1.0] }, 1.0));
    }
    hills(canvas, 0.45, 0.10, [0.36, 0.55, 0.30], rng);
}

fn cactus(canvas: &mut Canvas, at: Point) {
    let green = [0.24, 0.52, 0.28];
    let [x, y] = at;
    for stem in [
        vec![[x, y + 0.4], [x, y - 0.4]],
        vec![[x, y], [x - 0.15, y - 0.02], [x - 0.15, y - 0.22]],
        vec![[x, y - 0.08], [x + 0.14, y - 0.10], [x + 0.14, y - 0.32]],
    ] {
        let mask = canvas.stroke(&stem, [0.10, 0.09]);
        canvas.fill(&mask, |p| (scaled(green, 1.0 - 0.9 * (p[0] - x).abs()), 1.0));
        canvas.line(&stem, [0.012; 2], [0.14, 0.36, 0.18], 0.8, 0.7);
    }
}

fn underwater(canvas: &mut Canvas, rng: &mut ChaCha8Rng) {
    let seed = rng.random();
    canvas.cover(|p| {
        let ray = smoothstep(0.52, 0.8, noise((p[0] + 0.35 * p[1]) * 4.5, 0.3, seed)) * (0.7 - 0.5 * p[1]).max(0.0);
        mix(mix([0.10, 0.62, 0.78], [0.02, 0.22, 0.45], (p[1] + 1.0) * 0.5), [0.75, 0.98, 0.98], 0.55 * ray)
    });
    for _ in 0..7 {
        let x: f32 = rng.random_range(-1.0..1.0);
        let height = rng.random_range(0.5..1.1);
        let green = mix([0.05, 0.40, 0.28], [0.30, 0.62, 0.25], rng.random());
        let points: Vec<Point> =
            (0..12).map(|i| [x + 0.06 * (i as f32 * 0.9).sin(), 1.05 - height * i as f32 / 11.0]).collect();
        canvas.line(&points, [0.09, 0.02], green, 1.0, 0.45);
    }
    for _ in 0..4 {
        let side = if rng.random_bool(0.5) { 1.0 } else { -1.0 };
        let [x, y]: Point = [side * rng.random_range(0.6..0.85), rng.random_range(-0.8..0.3)];
        let color = [[1.0, 0.65, 0.15], [0.95, 0.35, 0.30], [0.98, 0.88, 0.30]][rng.random_range(0..3)];
        canvas.shape(&[[x - side * 0.06, y], [x - side * 0.16, y - 0.06], [x - side * 0.16, y + 0.06]], 0.010, |_| {
            (color, 1.0)
        });
        canvas.shape(&ellipse([x, y], 0.10, 0.055), 0.010, |_| (color, 1.0));
        canvas.spot([x + side * 0.05, y - 0.01], 0.018, 0.018, [0.05; 3], 1.0);
    }
}

fn library(canvas: &mut Canvas, rng: &mut ChaCha8Rng) {
    canvas.cover(|_| [0.20, 0.12, 0.07]);
    for shelf in 0..5 {
        let bottom = -0.62 + 0.42 * shelf as f32;
        let mut x: f32 = -1.05;
        while x < 1.0 {
            let (wide, high) = (rng.random_range(0.06..0.12), rng.random_range(0.26..0.35));
            let color = [
                [0.58, 0.16, 0.14],
                [0.16, 0.34, 0.28],
                [0.18, 0.26, 0.46],
                [0.72, 0.52, 0.22],
                [0.44, 0.28, 0.18],
                [0.75, 0.68, 0.55],
            ][rng.random_range(0..6)];
            let top = bottom - high;
            canvas.shape(&[[x, top], [x + wide, top], [x + wide, bottom], [x, bottom]], 0.012, |p| {
                (scaled(color, 1.1 - 0.4 * ((p[0] - x) / wide - 0.4).abs()), 1.0)
            });
            x += wide + 0.006;
        }
        let shelf = [[-1.1, bottom], [1.1, bottom], [1.1, bottom + 0.05], [-1.1, bottom + 0.05]];
        canvas.shape(&shelf, 0.012, |_| ([0.48, 0.30, 0.16], 1.0));
    }
}

fn garden(canvas: &mut Canvas, rng: &mut ChaCha8Rng) {
    let seed = rng.random();
    canvas.cover(|p| {
        let leaves = fractal(p[0] * 6.0, p[1] * 6.0, seed);
        let meadow = mix([0.22, 0.48, 0.18], [0.52, 0.72, 0.30], leaves);
        mix([0.62, 0.84, 0.95], meadow, smoothstep(-0.72, -0.45, p[1] + 0.3 * (leaves - 0.5)))
    });
    for _ in 0..30 {
        let y: f32 = rng.random_range(-0.55..0.95);
        let at = [rng.random_range(-1.0..1.0), y];
        let r = 0.05 + 0.03 * (y + 1.0);
        let color = [[0.95, 0.35, 0.50], [1.0, 0.82, 0.25], [0.98, 0.95, 0.98], [0.66, 0.42, 0.85], [0.95, 0.45, 0.25]]
            [rng.random_range(0..5)];
        let petals: Vec<Point> = (0..20)
            .map(|i| {
                let (sin, cos) = (i as f32 / 20.0 * std::f32::consts::TAU).sin_cos();
                let r = r * if i % 4 < 2 { 1.25 } else { 0.75 };
                [at[0] + r * cos, at[1] + r * sin]
            })
            .collect();
        canvas.shape(&smooth_closed(&petals), 0.008, |_| (color, 1.0));
        canvas.spot(at, r * 0.5, r * 0.5, [0.98, 0.80, 0.20], 1.0);
    }
}

fn castle(canvas: &mut Canvas, rng: &mut ChaCha8Rng) {
    canvas.cover(|_| [0.30, 0.29, 0.30]);
    for row in 0..10 {
        for column in 0..7 {
            let x = -1.2 + 0.4 * column as f32 + if row % 2 == 0 { 0.0 } else { 0.2 };
            let y = -1.0 + 0.2 * row as f32;
            let stone = scaled([0.56, 0.54, 0.52], rng.random_range(0.82..1.1));
            canvas.shape(&[[x, y], [x + 0.38, y], [x + 0.38, y + 0.18], [x, y + 0.18]], 0.010, |p| {
                (scaled(stone, 1.05 - 0.5 * (p[1] - y)), 1.0)
            });
        }
    }
    for x in [-0.78f32, 0.78] {
        let banner = [[x - 0.16, -1.0], [x + 0.16, -1.0], [x + 0.16, -0.1], [x, 0.05], [x - 0.16, -0.1]];
        canvas.shape(&banner, 0.014, |p| (scaled([0.68, 0.12, 0.14], 1.0 - 0.8 * (p[0] - x).abs()), 1.0));
        canvas.shape(&ellipse([x, -0.5], 0.09, 0.11), 0.010, |_| ([0.92, 0.76, 0.30], 1.0));
    }
}

fn kitchen(canvas: &mut Canvas) {
    canvas.cover(|p| {
        let tile = [0, 1].map(|i| ((p[i] + 1.0) * 4.0).fract());
        let grout = tile[0] < 0.06 || tile[1] < 0.06;
        if grout { [0.72, 0.76, 0.76] } else { mix([0.90, 0.94, 0.92], [0.80, 0.88, 0.87], tile[1]) }
    });
    canvas.line(&[[-1.0, -0.62], [1.0, -0.62]], [0.03; 2], [0.45, 0.45, 0.47], 1.0, 0.8);
    for x in [-0.82f32, -0.5, 0.55, 0.85] {
        canvas.line(&[[x, -0.62], [x, -0.25]], [0.03; 2], [0.40, 0.40, 0.42], 1.0, 0.6);
        canvas.shape(&ellipse([x, -0.12], 0.12, 0.15), 0.014, |p| {
            (mix([0.75, 0.42, 0.24], [0.95, 0.70, 0.48], 0.5 - 3.0 * (p[0] - x)), 1.0)
        });
    }
}

fn velvet(canvas: &mut Canvas, color: Rgb) {
    canvas.cover(|p| {
        let fold = 0.5 + 0.5 * (p[0] * 13.0 + 0.6 * (p[1] * 2.0).sin()).sin();
        mix(scaled(color, 0.45), scaled(color, 1.4), fold * (1.0 - 0.25 * p[1]))
    });
}

//! Techniques made by tools: comic print, mosaic, neon, poster, pop art, woodcut.

use super::super::Scene;
use super::super::attire::hue;
use super::super::canvas::{Canvas, Point, Rgb, fractal, hash, lerp, luminance, mix, noise, scaled, smoothstep};
use super::Layers;
use super::filters::{Plane, kuwahara, saturate};

/// Scales a colour so that its brightness falls on one of a few steps, with soft borders between them.
fn stepped(c: Rgb, steps: f32) -> Rgb {
    let l = luminance(c).clamp(0.02, 1.0);
    let position = l * steps;
    let level = position.floor() + smoothstep(0.35, 0.65, position.fract());
    scaled(c, ((level + 0.25) / steps / l).min(2.0))
}

/// How much of a dot screen is inked: 1 within dots whose size grows with `dark`.
fn halftone(place: [f32; 2], pitch: f32, angle: f32, dark: f32) -> f32 {
    let (sin, cos) = angle.sin_cos();
    let (u, v) = ((place[0] * cos + place[1] * sin) / pitch, (place[1] * cos - place[0] * sin) / pitch);
    let distance = ((u - u.round()).powi(2) + (v - v.round()).powi(2)).sqrt();
    let radius = 0.75 * dark.clamp(0.0, 1.0).sqrt();
    smoothstep(radius + 0.14, radius - 0.14, distance)
}

/// Flat bright colours, dots in the shadows and on the backdrop, bold black contours.
pub(super) fn comic(layers: &Layers) -> Plane<Rgb> {
    let flat = kuwahara(&layers.rgb, (1.3 * layers.px).round().max(1.0) as usize);
    let bold = layers.ink.blurred(0.45 * layers.px);
    flat.map(|x, y, c| {
        let (ix, iy) = (x as i32, y as i32);
        let place = layers.place(x, y);
        let subject = layers.subject.at(ix, iy);
        let bright = saturate(c, 1.55).map(|v| v * 1.14 + 0.02);
        let cel = stepped(bright, 4.0);
        let dark = smoothstep(0.62, 0.15, luminance(c)) * 0.45 + 0.12 * (1.0 - subject);
        let dots = halftone(place, 3.0, 0.6, dark);
        let shaded = mix(cel, scaled(cel, 0.68), dots);
        let contour = smoothstep(0.20, 0.52, bold.at(ix, iy) * (0.75 + 0.45 * subject));
        mix(shaded, [0.03, 0.03, 0.05], contour)
    })
}

/// Small stones in mortar: every stone has one colour, and lies along the lines of the picture.
pub(super) fn mosaic(layers: &Layers) -> Plane<Rgb> {
    const PITCH: f32 = 2.9;
    let px = layers.px;
    let seed = layers.seed;
    let source = layers.rgb.map(|x, y, c| scaled(c, 1.0 - 0.72 * layers.ink.at(x as i32, y as i32))).blurred(0.55 * px);
    let centre = |i: i32, j: i32| {
        let jitter = |salt| 0.5 + 0.42 * (hash(i, j, seed + salt) - 0.5);
        [(i as f32 + jitter(1)) * PITCH, (j as f32 + jitter(2)) * PITCH]
    };
    layers.rgb.map(|x, y, _| {
        let place = layers.place(x, y);
        let cell = place.map(|v| (v / PITCH).floor() as i32);
        let (mut first, mut second, mut owner) = (f32::MAX, f32::MAX, (cell[0], cell[1]));
        for j in cell[1] - 1..=cell[1] + 1 {
            for i in cell[0] - 1..=cell[0] + 1 {
                let c = centre(i, j);
                // The Chebyshev distance makes the cells nearly square.
                let (dx, dy) = ((place[0] - c[0]).abs(), (place[1] - c[1]).abs());
                let d = dx.max(dy) + 0.25 * dx.min(dy);
                if d < first {
                    (second, first, owner) = (first, d, (i, j));
                } else if d < second {
                    second = d;
                }
            }
        }
        let c = centre(owner.0, owner.1);
        let color = source.sample(c[0] * px - 0.5, c[1] * px - 0.5);
        let tone = 0.90 + 0.24 * hash(owner.0, owner.1, seed + 3);
        let bevel = ((c[0] - place[0]) + (c[1] - place[1])) / PITCH * 0.22;
        let stone = scaled(saturate(color, 1.35).map(|v| v * 1.06 + 0.02), tone + bevel);
        let mortar = smoothstep(0.42, 0.05, second - first);
        mix(stone, [0.20, 0.19, 0.18], mortar * 0.62)
    })
}

/// Glowing tubes along the contours, on a dark wall.
pub(super) fn neon(layers: &Layers) -> Plane<Rgb> {
    let px = layers.px;
    let vivid = |c: Rgb| {
        let peak = c[0].max(c[1]).max(c[2]).max(0.05);
        let low = c[0].min(c[1]).min(c[2]);
        let span = (peak - low).max(0.06);
        c.map(|v| lerp((v - low) / span, v / peak, 0.35).clamp(0.0, 1.0))
    };
    // The tubes take the colour around them, so hair, lips and eyes keep theirs.
    let around = layers.rgb.blurred(1.3 * px);
    let tubes = layers.ink.map(|x, y, ink| {
        let subject = layers.subject.at(x as i32, y as i32);
        let color = vivid(around.at(x as i32, y as i32));
        let color = if subject > 0.5 { color } else { mix(color, [0.20, 0.45, 1.0], 0.5) };
        scaled(color, smoothstep(0.15, 0.75, ink) * (0.42 + 0.58 * subject))
    });
    let (near, far) = (tubes.blurred(1.5 * px), tubes.blurred(5.5 * px));
    tubes.map(|x, y, tube| {
        let (ix, iy) = (x as i32, y as i32);
        let place = layers.place(x, y);
        let brick = {
            let row = (place[1] / 7.0).floor();
            let along = (place[0] + if row as i32 % 2 == 0 { 0.0 } else { 7.0 }) / 14.0;
            if (place[1] / 7.0).fract() < 0.12 || along.fract() < 0.06 { 0.55 } else { 1.0 }
        };
        let subject = layers.subject.at(ix, iy);
        let wall = scaled([0.055, 0.045, 0.095], brick * (1.0 + 0.3 * noise(place[0], place[1], layers.seed)));
        let body = scaled(saturate(layers.rgb.at(ix, iy), 1.5), 0.30);
        let dim = mix(wall, body, subject * 0.92);
        let (n, f) = (near.at(ix, iy), far.at(ix, iy));
        let core = luminance(tube);
        [0, 1, 2].map(|k| dim[k] + 1.05 * tube[k] + 0.95 * n[k] + 1.15 * f[k] + 0.28 * core)
    })
}

/// Strokes of the letters on the poster, in a unit box.
fn letter(letter: char) -> &'static [&'static [Point]] {
    match letter {
        'W' => &[&[[0.0, 0.0], [0.22, 1.0], [0.5, 0.35], [0.78, 1.0], [1.0, 0.0]]],
        'A' => &[&[[0.0, 1.0], [0.5, 0.0], [1.0, 1.0]], &[[0.2, 0.65], [0.8, 0.65]]],
        'N' => &[&[[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]],
        'T' => &[&[[0.0, 0.0], [1.0, 0.0]], &[[0.5, 0.0], [0.5, 1.0]]],
        'E' => &[&[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]], &[[0.0, 0.5], [0.8, 0.5]]],
        'D' => &[&[[0.0, 0.0], [0.0, 1.0], [0.6, 1.0], [1.0, 0.7], [1.0, 0.3], [0.6, 0.0], [0.0, 0.0]]],
        'R' => {
            &[&[[0.0, 1.0], [0.0, 0.0], [0.7, 0.0], [1.0, 0.25], [0.7, 0.5], [0.0, 0.5]], &[[0.45, 0.5], [1.0, 1.0]]]
        }
        _ => &[],
    }
}

/// Sepia print on old paper, nailed to a wall, with the word everybody knows.
pub(super) fn wanted(layers: &Layers) -> Plane<Rgb> {
    let (size, seed) = (layers.rgb.size, layers.seed);
    let mut sheet = Canvas::new(size);
    let mut write = |text: &str, top: f32, high: f32, wide: f32, gap: f32, weight: f32| {
        let total = text.len() as f32 * (wide + gap) - gap;
        for (k, c) in text.chars().enumerate() {
            let x0 = -0.5 * total + k as f32 * (wide + gap);
            for stroke in letter(c) {
                let points: Vec<Point> = stroke.iter().map(|p| [x0 + p[0] * wide, top + p[1] * high]).collect();
                let mask = sheet.stroke(&points, [weight; 2]);
                sheet.ink(&mask, 1.0);
            }
        }
    };
    write("WANTED", -0.86, 0.20, 0.18, 0.08, 0.055);
    write("REWARD", 0.78, 0.10, 0.11, 0.06, 0.032);
    layers.rgb.map(|x, y, c| {
        let (ix, iy) = (x as i32, y as i32);
        let [cx, cy] = layers.place(x, y);
        let subject = layers.subject.at(ix, iy);
        let stain = fractal(cx * 0.035, cy * 0.035, seed + 2);
        let fibre = noise(cx * 0.9, cy * 0.35, seed + 3) - 0.5;
        let paper = scaled([0.90, 0.79, 0.58], 0.92 + 0.16 * (stain - 0.5) * 2.0 + 0.05 * fibre);
        let ragged = 5.0 * (fractal(cx * 0.09, cy * 0.09, seed + 4) - 0.5);
        let border = cx.min(cy).min(128.0 - cx).min(128.0 - cy) + ragged;
        let burnt = smoothstep(9.0, 2.5, border);
        // The picture sits in a box between the two words.
        let (left, top, bottom) = (cx - 14.0, cy - 26.0, 110.0 - cy);
        let inside = left.min(114.0 - cx).min(top).min(bottom);
        let tone = luminance(c).clamp(0.0, 1.0);
        let tone = lerp(0.62 + 0.3 * tone, tone, 0.35 + 0.65 * subject);
        let tone = tone * (1.0 - 0.62 * layers.ink.at(ix, iy) * (0.4 + 0.6 * subject));
        let print = mix([0.16, 0.09, 0.05], [0.93, 0.83, 0.64], smoothstep(0.02, 0.88, tone + 0.06 * fibre));
        let mut color =
            mix(paper, mix(print, scaled(print, 1.0 + 0.5 * (stain - 0.5)), 0.6), smoothstep(-0.4, 0.4, inside));
        color = mix(color, [0.20, 0.12, 0.07], smoothstep(1.3, 0.6, (inside - 0.2).abs()) * 0.9);
        color = mix(color, [0.19, 0.10, 0.06], 0.93 * sheet.ink[y * size + x]);
        color = mix(color, [0.34, 0.20, 0.10], burnt * 0.85);
        let plank = scaled([0.25, 0.16, 0.10], 0.75 + 0.5 * noise(cx * 0.8, cy * 0.06, seed + 5));
        mix(plank, color, smoothstep(1.2, 2.0, border))
    })
}

/// A silk-screen print: few loud colours, one flat backdrop with dots.
pub(super) fn pop_art(layers: &Layers) -> Plane<Rgb> {
    let seed = layers.seed;
    let base = hash(1, 2, seed);
    let (ground, dots_color) = (hue(base, 0.85, 0.98), hue(base + 0.12, 0.75, 1.0));
    let flat = kuwahara(&layers.rgb, (1.6 * layers.px).round().max(1.0) as usize);
    let soft = layers.subject.blurred(0.5 * layers.px);
    flat.map(|x, y, c| {
        let (ix, iy) = (x as i32, y as i32);
        let place = layers.place(x, y);
        let l = luminance(c);
        // The scene survives as a second ink on the ground.
        let scene = smoothstep(0.48, 0.42, l) * if layers.scene == Scene::Studio { 0.0 } else { 1.0 };
        let dots = halftone(place, 5.2, 0.78, 0.28);
        let back = mix(mix(ground, dots_color, dots), hue(base + 0.55, 0.75, 0.55), scene * 0.75);
        let back = mix(back, [0.05, 0.03, 0.08], 0.5 * layers.ink.at(ix, iy));
        // Strong colours: hair and lips keep their hue, skin becomes its loudest self.
        let loud = saturate(c, 2.1).map(|v| (v * 1.15 + 0.03).clamp(0.0, 1.0));
        let steps = stepped(loud, 2.6);
        let shadow = smoothstep(0.30, 0.16, l);
        let figure = mix(
            mix(steps, [1.0, 0.96, 0.80], smoothstep(0.74, 0.80, l) * 0.45),
            hue(base + 0.5, 0.9, 0.30),
            shadow * 0.45,
        );
        let figure = mix(figure, [0.06, 0.03, 0.10], smoothstep(0.35, 0.75, layers.ink.at(ix, iy)));
        mix(back, figure, smoothstep(0.3, 0.7, soft.at(ix, iy)))
    })
}

/// Black lines of swelling width cut along the forms, printed on cream paper.
pub(super) fn woodcut(layers: &Layers) -> Plane<Rgb> {
    let px = layers.px;
    let tones = layers.rgb.luminance().blurred(0.8 * px);
    let relief = tones.blurred(3.0 * px);
    layers.rgb.map(|x, y, _| {
        let (ix, iy) = (x as i32, y as i32);
        let [cx, cy] = layers.place(x, y);
        let subject = layers.subject.at(ix, iy);
        let tone = tones.at(ix, iy).clamp(0.0, 1.0);
        let wobble = 1.5 * (noise(cx * 0.12, cy * 0.12, layers.seed) - 0.5);
        // Lines bend with the form on the person and run level behind.
        let bend = 9.0 * relief.at(ix, iy) * subject;
        let along = if subject > 0.5 { cy * 0.94 + cx * 0.34 + bend } else { cy } + wobble;
        let wave = 0.5 + 0.5 * (along * 1.85).sin();
        let tone = (tone * 1.22 - 0.06).clamp(0.0, 1.0);
        let tone = smoothstep(0.0, 0.86, tone);
        let light = smoothstep(-0.20, 0.20, tone - wave * 0.86 - 0.02);
        let contour = smoothstep(0.25, 0.6, layers.ink.at(ix, iy) * (0.6 + 0.4 * subject));
        // Dark contours vanish in black: there the knife leaves a white edge.
        let white_edge = contour * smoothstep(0.30, 0.16, tone) * 0.85;
        let printed = (light * (1.0 - contour)).max(white_edge);
        let fleck = smoothstep(0.80, 0.95, noise(cx * 0.9, cy * 0.9, layers.seed + 5)) * 0.15;
        mix(mix([0.09, 0.08, 0.09], [0.4, 0.37, 0.33], fleck), [0.95, 0.90, 0.79], printed)
    })
}

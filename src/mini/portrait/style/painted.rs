//! Techniques made by hand: oil, pencil, watercolour.

use super::super::canvas::{Rgb, fractal, hash, mix, noise, scaled, smoothstep};
use super::Layers;
use super::filters::{Plane, kuwahara, saturate};

/// Dabs of thick paint that follow the forms, with the relief of bristles under a raking light.
pub(super) fn oil(layers: &Layers) -> Plane<Rgb> {
    let px = layers.px;
    let inked = layers.rgb.map(|x, y, c| scaled(c, 1.0 - 0.35 * layers.ink.at(x as i32, y as i32)));
    let dabs = kuwahara(&inked, (2.2 * px).round().max(1.0) as usize);
    let flow = dabs.luminance().blurred(2.0 * px);
    let bristles = layers.ink.map(|x, y, _| {
        // Strokes run along the contours: noise is averaged along the direction across the gradient.
        let [gx, gy] = flow.gradient(x, y);
        let length = gx.hypot(gy);
        let calm = 0.012;
        let (dx, dy) = ((-gy + calm * 0.8) / (length + calm), (gx + calm * 0.6) / (length + calm));
        let [cx, cy] = layers.place(x, y);
        (-4..=4)
            .map(|k| {
                let t = k as f32 * 0.9;
                noise((cx + dx * t) * 0.75, (cy + dy * t) * 0.75, layers.seed)
            })
            .sum::<f32>()
            / 9.0
    });
    let heights = bristles.blurred(0.4 * px);
    dabs.map(|x, y, c| {
        let [gx, gy] = heights.gradient(x, y);
        let relief = ((gx + gy) * px * 1.1).clamp(-0.10, 0.10);
        let tone = 0.98 + 0.22 * (heights.at(x as i32, y as i32) - 0.5) + relief;
        let warm = saturate(c, 1.32);
        [warm[0] * tone * 1.03 + 0.015, warm[1] * tone, warm[2] * tone * 0.93]
    })
}

/// Graphite on grained paper: contours and up to three layers of hatching.
pub(super) fn pencil(layers: &Layers) -> Plane<Rgb> {
    let px = layers.px;
    let tones = layers.rgb.luminance().blurred(0.7 * px);
    layers.rgb.map(|x, y, _| {
        let (ix, iy) = (x as i32, y as i32);
        let [cx, cy] = layers.place(x, y);
        let subject = layers.subject.at(ix, iy);
        let grain = noise(cx * 1.1, cy * 1.1, layers.seed);
        let wobble = 1.6 * (noise(cx * 0.08, cy * 0.08, layers.seed + 1) - 0.5);
        let tone = tones.at(ix, iy).clamp(0.0, 1.0);
        let tone = 1.0 - (1.0 - tone) * (0.42 + 0.58 * subject);
        let mut dark = 0.0f32;
        for (layer, (ax, ay, threshold)) in
            [(0.55f32, 0.83f32, 0.80f32), (-0.5, 0.86, 0.52), (0.9, 0.42, 0.30)].into_iter().enumerate()
        {
            let depth = smoothstep(threshold, threshold - 0.42, tone);
            let line = 0.5 + 0.5 * ((cx * ax + cy * ay + wobble) * 2.05 + layer as f32).sin();
            dark += depth * (0.20 + 0.50 * line) * (0.55 + 0.75 * grain) * 0.75;
        }
        let contour = layers.ink.at(ix, iy) * (0.55 + 0.45 * subject) * (0.72 + 0.4 * grain);
        let dark = 1.0 - (1.0 - dark.min(0.88)) * (1.0 - 0.88 * contour.min(1.0));
        let paper = 0.955 + 0.05 * (grain - 0.5);
        mix([paper, paper * 0.99, paper * 0.955], [0.17, 0.17, 0.20], dark.min(1.0))
    })
}

/// Thin washes on rough paper: wobbling borders, pigment gathered at the edges, an unpainted margin.
pub(super) fn watercolor(layers: &Layers) -> Plane<Rgb> {
    let (px, seed) = (layers.px, layers.seed);
    let flat = kuwahara(&layers.rgb, (1.6 * px).round().max(1.0) as usize);
    let wash = flat.map(|x, y, _| {
        let [cx, cy] = layers.place(x, y);
        let shift = |salt| {
            3.2 * (fractal(cx * 0.11, cy * 0.11, seed + salt) - 0.5)
                * (1.2 - 0.7 * layers.subject.at(x as i32, y as i32))
        };
        flat.sample(x as f32 + shift(10) * px, y as f32 + shift(20) * px)
    });
    let soft = wash.blurred(2.2 * px);
    let edges = wash.luminance();
    wash.map(|x, y, c| {
        let (ix, iy) = (x as i32, y as i32);
        let [cx, cy] = layers.place(x, y);
        let subject = layers.subject.at(ix, iy);
        let color = mix(c, soft.at(ix, iy), 0.45 - 0.3 * subject);
        let [gx, gy] = edges.gradient(x, y);
        let edge = smoothstep(0.02, 0.16, gx.hypot(gy) * px);
        let cloud = fractal(cx * 0.05, cy * 0.05, seed + 3) - 0.5;
        let grain = noise(cx * 0.9, cy * 0.9, seed + 4) - 0.5;
        // Transparent pigment lets the paper through: light colours nearly vanish, dark ones stay.
        let pigment =
            saturate(color, 1.35).map(|v| v.clamp(0.02, 1.0).powf(0.74 + 0.55 * cloud + 0.22 * grain + 0.30 * edge));
        let pencil = layers.ink.at(ix, iy) * (0.20 + 0.22 * subject) * (0.7 + 0.6 * grain);
        let pigment = scaled(pigment, 1.0 - pencil.clamp(0.0, 1.0));
        let border = cx.min(cy).min(128.0 - cx).min(128.0 - cy) + 9.0 * (fractal(cx * 0.07, cy * 0.07, seed + 7) - 0.5);
        let painted = smoothstep(4.0, 6.0, border);
        let rim = 0.10 * smoothstep(9.0, 5.5, border) * painted;
        let paper = 0.975 + 0.05 * grain + 0.012 * (hash(ix, iy, 3) - 0.5);
        mix([paper, paper * 0.985, paper * 0.95], scaled(pigment, 1.0 - rim), painted)
    })
}

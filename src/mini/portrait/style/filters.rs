//! Filters that styles share.

use super::super::canvas::{Rgb, luminance, mix};

/// A square plane of values.
#[derive(Clone)]
pub(super) struct Plane<T> {
    pub size: usize,
    pub data: Vec<T>,
}

impl<T: Copy> Plane<T> {
    pub fn new(size: usize, data: Vec<T>) -> Self {
        Plane { size, data }
    }

    /// The value of a pixel, of the nearest one outside.
    pub fn at(&self, x: i32, y: i32) -> T {
        let last = self.size as i32 - 1;
        self.data[y.clamp(0, last) as usize * self.size + x.clamp(0, last) as usize]
    }

    pub fn map<U>(&self, mut f: impl FnMut(usize, usize, T) -> U) -> Plane<U> {
        let data = self.data.iter().enumerate().map(|(i, &v)| f(i % self.size, i / self.size, v)).collect();
        Plane { size: self.size, data }
    }
}

impl Plane<Rgb> {
    /// The colour between pixels; `x` and `y` count pixels from the centre of the first.
    pub fn sample(&self, x: f32, y: f32) -> Rgb {
        let (fx, fy) = (x.floor(), y.floor());
        let (ix, iy) = (fx as i32, fy as i32);
        let top = mix(self.at(ix, iy), self.at(ix + 1, iy), x - fx);
        let bottom = mix(self.at(ix, iy + 1), self.at(ix + 1, iy + 1), x - fx);
        mix(top, bottom, y - fy)
    }

    pub fn luminance(&self) -> Plane<f32> {
        self.map(|_, _, c| luminance(c))
    }

    /// A Gaussian blur with the given standard deviation in pixels, approached by three box blurs.
    pub fn blurred(&self, sigma: f32) -> Self {
        let planes = [0, 1, 2].map(|i| self.map(|_, _, c| c[i]).blurred(sigma));
        self.map(|x, y, _| [0, 1, 2].map(|i| planes[i].data[y * self.size + x]))
    }
}

impl Plane<f32> {
    /// A Gaussian blur with the given standard deviation in pixels, approached by three box blurs of a width that need
    /// not be whole.
    pub fn blurred(&self, sigma: f32) -> Self {
        let radius = ((4.0 * sigma * sigma + 1.0).sqrt() - 1.0) * 0.5;
        let mut data = self.data.clone();
        let mut row = vec![0.0; self.size];
        for _ in 0..3 {
            for y in 0..self.size {
                box_row(&mut data[y * self.size..(y + 1) * self.size], 1, &mut row, radius);
            }
            for x in 0..self.size {
                box_row(&mut data[x..], self.size, &mut row, radius);
            }
        }
        Plane { size: self.size, data }
    }

    /// The gradient at a pixel by a Sobel filter.
    pub fn gradient(&self, x: usize, y: usize) -> [f32; 2] {
        let at = |dx: i32, dy: i32| self.at(x as i32 + dx, y as i32 + dy);
        [
            (at(1, -1) + 2.0 * at(1, 0) + at(1, 1) - at(-1, -1) - 2.0 * at(-1, 0) - at(-1, 1)) * 0.125,
            (at(-1, 1) + 2.0 * at(0, 1) + at(1, 1) - at(-1, -1) - 2.0 * at(0, -1) - at(1, -1)) * 0.125,
        ]
    }
}

/// One box blur along a line of `row.len()` values that lie `step` apart, the ends repeated.
fn box_row(data: &mut [f32], step: usize, row: &mut [f32], radius: f32) {
    let n = row.len() as i32;
    let whole = radius.floor() as i32;
    let part = radius - whole as f32;
    let norm = 1.0 / (2.0 * radius + 1.0);
    let at = |data: &[f32], i: i32| data[i.clamp(0, n - 1) as usize * step];
    let mut sum: f32 = (-whole..=whole).map(|i| at(data, i)).sum();
    for i in 0..n {
        row[i as usize] = (sum + part * (at(data, i - whole - 1) + at(data, i + whole + 1))) * norm;
        sum += at(data, i + whole + 1) - at(data, i - whole);
    }
    for (i, &value) in row.iter().enumerate() {
        data[i * step] = value;
    }
}

/// The Kuwahara filter: every pixel takes the mean of the calmest of the four windows beside it, which flattens
/// texture into dabs and keeps edges.
pub(super) fn kuwahara(image: &Plane<Rgb>, radius: usize) -> Plane<Rgb> {
    let n = image.size;
    let stride = n + 1;
    // Sums over all pixels above and to the left: three colours and the squared luminance and luminance.
    let mut sums = vec![[0.0f64; 5]; stride * stride];
    for y in 0..n {
        for x in 0..n {
            let c = image.data[y * n + x];
            let l = f64::from(luminance(c));
            let values = [f64::from(c[0]), f64::from(c[1]), f64::from(c[2]), l, l * l];
            for (k, value) in values.into_iter().enumerate() {
                sums[(y + 1) * stride + x + 1][k] =
                    value + sums[y * stride + x + 1][k] + sums[(y + 1) * stride + x][k] - sums[y * stride + x][k];
            }
        }
    }
    let window = |x0: usize, y0: usize, x1: usize, y1: usize| {
        let area = ((x1 - x0) * (y1 - y0)) as f64;
        [0, 1, 2, 3, 4].map(|k| {
            (sums[y1 * stride + x1][k] - sums[y0 * stride + x1][k] - sums[y1 * stride + x0][k]
                + sums[y0 * stride + x0][k])
                / area
        })
    };
    image.map(|x, y, _| {
        let (left, right) = (x.saturating_sub(radius), (x + radius + 1).min(n));
        let (top, bottom) = (y.saturating_sub(radius), (y + radius + 1).min(n));
        let mut best = (f64::MAX, [0.0; 3]);
        for (x0, x1) in [(left, x + 1), (x, right)] {
            for (y0, y1) in [(top, y + 1), (y, bottom)] {
                let m = window(x0, y0, x1, y1);
                let variance = m[4] - m[3] * m[3];
                if variance < best.0 {
                    best = (variance, [m[0] as f32, m[1] as f32, m[2] as f32]);
                }
            }
        }
        best.1
    })
}

/// A colour farther from (above 1) or nearer to (below 1) the grey of its luminance.
pub(super) fn saturate(c: Rgb, amount: f32) -> Rgb {
    let l = luminance(c);
    c.map(|v| (l + (v - l) * amount).clamp(0.0, 1.0))
}

//! Rotation, uniform scale and translation in the plane.

use crate::{Error, Result};

/// The map `(x, y) -> (a x - b y + tx, b x + a y + ty)`: a rotation, a uniform scale and a translation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Similarity {
    /// Scale times cosine of the rotation.
    pub a: f64,
    /// Scale times sine of the rotation.
    pub b: f64,
    /// Translation along x.
    pub tx: f64,
    /// Translation along y.
    pub ty: f64,
}

impl Similarity {
    /// The similarity that maps `from` nearest to `to`, in the least-squares sense.
    ///
    /// The same as Umeyama's method (1991) restricted to the plane and without reflections, where it has this closed
    /// form: with centred points as complex numbers p and q, `a + ib = sum(conj(p) q) / sum(|p|^2)`.
    ///
    /// # Errors
    /// [`Error::Argument`] where a coordinate is not finite, all points of `from` coincide, or the best map shrinks
    /// everything to a point.
    pub fn fit<const N: usize>(from: &[[f64; 2]; N], to: &[[f64; 2]; N]) -> Result<Self> {
        let fault = |argument: &'static str, expected: &str| {
            let found = format!("{:?}", if argument == "from" { from } else { to });
            Err(Error::argument("similarity fit", argument, expected, found))
        };
        let finite = |points: &[[f64; 2]; N]| points.iter().flatten().all(|value| value.is_finite());
        if !finite(from) {
            return fault("from", "finite points");
        }
        if !finite(to) {
            return fault("to", "finite points");
        }
        let mean = |points: &[[f64; 2]; N]| {
            let sum = points.iter().fold([0.0; 2], |sum, point| [sum[0] + point[0], sum[1] + point[1]]);
            [sum[0] / N as f64, sum[1] / N as f64]
        };
        let (from_mean, to_mean) = (mean(from), mean(to));
        let (mut real, mut imaginary, mut spread, mut target_spread) = (0.0, 0.0, 0.0, 0.0);
        for (p, q) in from.iter().zip(to) {
            let (px, py) = (p[0] - from_mean[0], p[1] - from_mean[1]);
            let (qx, qy) = (q[0] - to_mean[0], q[1] - to_mean[1]);
            real += px * qx + py * qy;
            imaginary += px * qy - py * qx;
            spread += px * px + py * py;
            target_spread += qx * qx + qy * qy;
        }
        let magnitude = |points: &[[f64; 2]; N]| points.iter().flatten().fold(1.0f64, |m, value| m.max(value.abs()));
        // Points closer together than rounding can tell apart say nothing of rotation or scale.
        if N < 2 || spread <= (1e-9 * magnitude(from)).powi(2) {
            return fault("from", "points that do not coincide");
        }
        if real.hypot(imaginary) <= 1e-9 * (spread * target_spread).sqrt() || target_spread == 0.0 {
            return fault("to", "points that a similarity without reflection can approach");
        }
        let (a, b) = (real / spread, imaginary / spread);
        Ok(Similarity {
            a,
            b,
            tx: to_mean[0] - (a * from_mean[0] - b * from_mean[1]),
            ty: to_mean[1] - (b * from_mean[0] + a * from_mean[1]),
        })
    }

    /// How many times longer lengths become.
    pub fn scale(&self) -> f64 {
        self.a.hypot(self.b)
    }

    /// Where the map takes a point.
    pub fn apply(&self, [x, y]: [f64; 2]) -> [f64; 2] {
        [self.a * x - self.b * y + self.tx, self.b * x + self.a * y + self.ty]
    }

    /// The map back. The scale must not be 0; that of a fitted map never is.
    pub fn inverse(&self) -> Self {
        let square = self.a * self.a + self.b * self.b;
        let (a, b) = (self.a / square, -self.b / square);
        Similarity { a, b, tx: -(a * self.tx - b * self.ty), ty: -(b * self.tx + a * self.ty) }
    }

    /// The rows of the map as a matrix on `(x, y, 1)`.
    pub fn matrix(&self) -> [[f64; 3]; 2] {
        [[self.a, -self.b, self.tx], [self.b, self.a, self.ty]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::face::ARCFACE_TEMPLATE;
    use crate::random::Address;

    fn near(a: [f64; 2], b: [f64; 2]) -> bool {
        (a[0] - b[0]).abs() < 1e-9 && (a[1] - b[1]).abs() < 1e-9
    }

    #[test]
    fn a_similarity_is_found_again_and_undone_by_its_inverse() -> Result<()> {
        for (angle, scale) in [(0.0f64, 1.0), (0.5, 3.0), (-2.0, 0.2), (3.1, 7.0)] {
            let map = Similarity { a: scale * angle.cos(), b: scale * angle.sin(), tx: 40.0, ty: -7.0 };
            let moved = ARCFACE_TEMPLATE.map(|point| map.apply(point));
            let fit = Similarity::fit(&ARCFACE_TEMPLATE, &moved)?;
            assert!((fit.scale() - scale).abs() < 1e-12);
            for (point, there) in ARCFACE_TEMPLATE.iter().zip(moved) {
                assert!(near(fit.apply(*point), there) && near(fit.inverse().apply(there), *point));
            }
        }
        Ok(())
    }

    #[test]
    fn no_neighbouring_similarity_fits_noisy_points_better() -> Result<()> {
        let mut sample = 0;
        let noisy = ARCFACE_TEMPLATE.map(|point| {
            point.map(|value| {
                sample += 1;
                value + 6.0 * Address::new(3, "noise").sample(sample).uniform()
            })
        });
        let fit = Similarity::fit(&noisy, &ARCFACE_TEMPLATE)?;
        let cost = |map: &Similarity| -> f64 {
            noisy
                .iter()
                .zip(ARCFACE_TEMPLATE)
                .map(|(&p, q)| map.apply(p).iter().zip(q).map(|(x, y)| (x - y).powi(2)).sum::<f64>())
                .sum()
        };
        for delta in [1e-4, -1e-4] {
            for moved in [
                Similarity { a: fit.a + delta, ..fit },
                Similarity { b: fit.b + delta, ..fit },
                Similarity { tx: fit.tx + delta, ..fit },
                Similarity { ty: fit.ty + delta, ..fit },
            ] {
                assert!(cost(&moved) > cost(&fit));
            }
        }
        Ok(())
    }

    #[test]
    fn points_that_say_nothing_are_refused() {
        let same = [[3.0, 4.0]; 5];
        let mut not_finite = ARCFACE_TEMPLATE;
        not_finite[2][1] = f64::NAN;
        for (from, to) in [
            (same, ARCFACE_TEMPLATE),
            (ARCFACE_TEMPLATE, same),
            (not_finite, ARCFACE_TEMPLATE),
            (ARCFACE_TEMPLATE, not_finite),
        ] {
            assert!(matches!(Similarity::fit(&from, &to), Err(Error::Argument { .. })));
        }
        // Mirrored points pull the rotation both ways alike.
        let (square, mirrored) =
            ([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]);
        assert!(Similarity::fit(&square, &mirrored).is_err());
    }
}

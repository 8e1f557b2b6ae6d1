//! The exponential function of a row of scores, which is where narrow heads spend most of their time.

use crate::ops::support::Real;
use crate::ops::vector;

/// A real type with an exponential function for many numbers at once.
pub(super) trait Exponential: Real {
    /// Replaces every number `x` of a row by `exp(x - shift)`, which is to be at most about 1. Minus infinity gives
    /// exactly 0, NaN gives NaN.
    fn exponentials(row: &mut [Self], shift: Self);
}

impl Exponential for f64 {
    fn exponentials(row: &mut [f64], shift: f64) {
        row.iter_mut().for_each(|x| *x = (*x - shift).exp());
    }
}

impl Exponential for f32 {
    /// Without a call or a branch, so that the compiler makes vector instructions of it.
    #[inline(always)]
    fn exponentials(row: &mut [f32], shift: f32) {
        row.iter_mut().for_each(|x| *x = vector::exp(*x - shift));
    }
}

#[cfg(test)]
mod tests {
    use super::Exponential;

    #[test]
    fn single_precision_exponentials_are_exact_to_the_last_digits() {
        let xs: Vec<f32> = (0..200_000).map(|i| -87.3 + i as f32 * (88.0 / 200_000.0)).collect();
        let mut found = xs.clone();
        f32::exponentials(&mut found, 0.0);
        for (x, found) in xs.iter().zip(&found) {
            let exact = f64::from(*x).exp();
            assert!(((f64::from(*found) - exact) / exact).abs() < 2e-7, "exp({x}) = {exact}, found {found}");
        }
    }

    #[test]
    fn hidden_scores_have_no_weight_and_faults_are_not_covered_up() {
        let mut row = [f32::NEG_INFINITY, -1000.0, -88.0, 5.0, f32::NAN];
        f32::exponentials(&mut row, 5.0);
        assert_eq!(row[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!(row[4].is_nan());
    }
}

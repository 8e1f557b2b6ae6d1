//! The exponential function of a row of scores, which is where narrow heads spend most of their time.

use crate::ops::support::Real;

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
    fn exponentials(row: &mut [f32], shift: f32) {
        row.iter_mut().for_each(|x| *x = exp(*x - shift));
    }
}

/// `exp(x) = 2^n exp(r)` with the integer `n` nearest to `x / ln 2`; exact to 2e-7 of the value. Below the smallest
/// normal number the result is 0, above `exp(88)` it stays there.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// `1.5 * 2^23`: added to a small number, it rounds the number to an integer, which then sits in the last bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, of which the first has few enough bits for `n * LN_2_HIGH` to be exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const SMALLEST: f32 = -87.33;
    const LARGEST: f32 = 88.0;
    let clamped = if x > LARGEST { LARGEST } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    // The minimax polynomial of Cephes (`expf`) for (exp(r) - 1 - r) / r^2 on |r| <= ln 2 / 2.
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let value = (p * r * r + r + 1.0) * power;
    if x < SMALLEST { 0.0 } else { value }
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

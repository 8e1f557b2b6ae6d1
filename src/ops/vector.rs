//! Loops over many numbers in the widest vector instructions the CPU has, and functions without a call or a branch, of
//! which the compiler makes such instructions.

/// Defines functions whose body is compiled a second time for AVX2, which runs where the CPU has it: a program built
/// for any x86-64 need not do with four numbers at a time. Both compute the same bits, as neither fuses products and
/// sums.
macro_rules! vectorised {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident<$T:ident: $bound:path>($($argument:ident: $type:ty),* $(,)?)
        $(-> $result:ty)? $body:block)+) => {$(
        $(#[$meta])*
        $vis fn $name<$T: $bound>($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body<$T: $bound>($($argument: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn wide<$T: $bound>($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the CPU has the instructions, as was asked just now.
                    return unsafe { wide($($argument),*) };
                }
            }
            body($($argument),*)
        }
    )+};
}
pub(crate) use vectorised;

/// `exp(x) = 2^n exp(r)` with the integer `n` nearest to `x / ln 2`; exact to 2e-7 of the value. Below the smallest
/// normal number the result is 0, above `exp(88.37)` infinity.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// `1.5 * 2^23`: added to a small number, it rounds the number to an integer, which then sits in the last bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, of which the first has few enough bits for `n * LN_2_HIGH` to be exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const SMALLEST: f32 = -87.33;
    const LARGEST: f32 = 88.37;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    // The minimax polynomial of Cephes (`expf`) for (exp(r) - 1 - r) / r^2 on |r| <= ln 2 / 2.
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let value = (p * r * r + r + 1.0) * power;
    let value = if x > LARGEST { f32::INFINITY } else { value };
    if x < SMALLEST { 0.0 } else { value }
}

/// The normal distribution function, exact to 2e-7: equation 7.1.26 of Abramowitz and Stegun, with the tail that is
/// small computed first, so that it keeps its digits.
#[inline(always)]
pub(super) fn normal_distribution(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = 1.061_405_4;
    let p = p * t - 1.453_152;
    let p = p * t + 1.421_413_7;
    let p = p * t - 0.284_496_73;
    let p = p * t + 0.254_829_6;
    let tail = 0.5 * p * t * exp(-z * z);
    if x < 0.0 { tail } else { 1.0 - tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_function_agrees_with_that_of_double_precision() {
        for i in -8700..8830 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            let found = f64::from(exp(x));
            assert!(((found - exact) / exact).abs() < 2e-7, "exp({x}) = {exact}, found {found}");
        }
        assert_eq!(
            [exp(-1e9), exp(f32::NEG_INFINITY), exp(1e9), exp(f32::INFINITY)],
            [0.0, 0.0, f32::INFINITY, f32::INFINITY]
        );
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn the_normal_distribution_agrees_with_that_of_double_precision() {
        for i in -2000..2000 {
            let x = i as f32 * 0.01;
            let exact = 0.5 * libm::erfc(-f64::from(x) * std::f64::consts::FRAC_1_SQRT_2);
            let found = f64::from(normal_distribution(x));
            assert!((found - exact).abs() < 2e-7, "{x}: {exact}, found {found}");
        }
        assert_eq!([normal_distribution(-1e9), normal_distribution(1e9)], [0.0, 1.0]);
        assert!(normal_distribution(f32::NAN).is_nan());
    }
}

//! Means over seeds, and how sure they are.

/// 97.5 % quantiles of Student's t distribution, by degrees of freedom from 1 on.
const STUDENT_T: [f64; 10] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];

/// A mean over seeds with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub mean: f64,
    /// Half of the interval's width; none for a single value.
    pub half_width: Option<f64>,
}

impl Estimate {
    /// The mean of some values, none where there are none. The interval is that of Student's t distribution.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.collect();
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let half_width = match values.len() {
            0 => return None,
            1 => None,
            many => {
                let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
                Some(STUDENT_T.get(many - 2).unwrap_or(&2.0) * (variance / count).sqrt())
            }
        };
        Some(Estimate { mean, half_width })
    }

    /// `0.345 ± 0.012`
    pub fn text(&self, decimals: usize) -> String {
        match self.half_width {
            Some(half) => format!("{:.decimals$} ± {half:.decimals$}", self.mean),
            None => format!("{:.decimals$}", self.mean),
        }
    }
}

/// The mean of some values; not a number where there are none.
pub fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_seeds_give_the_interval_of_two_degrees_of_freedom() {
        let estimate = Estimate::of([1.0, 2.0, 3.0].into_iter()).unwrap();
        assert_eq!(estimate.mean, 2.0);
        assert!((estimate.half_width.unwrap() - 4.303 / 3f64.sqrt()).abs() < 1e-12);
        assert_eq!(estimate.text(2), "2.00 ± 2.48");
        assert_eq!(Estimate::of([1.5].into_iter()).unwrap().text(1), "1.5");
        assert_eq!(Estimate::of([].into_iter()), None);
    }
}

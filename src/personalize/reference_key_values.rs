//! The reference's keys and values over the steps of a picture.

use super::Options;
use crate::Result;
use crate::models::unet::KeyValues;

/// Passes of the KV encoder that serve several steps are made no larger than this many samples: beyond, a GPU gains next
/// to nothing by it, and the keys and values of a sample take much memory.
const SAMPLES: usize = 8;

/// Hands out the keys and values of each step, and has those of several coming steps computed in one pass.
pub(super) struct ReferenceKeyValues {
    /// Those of the encodings, each of which serves `interval` steps.
    timesteps: Vec<usize>,
    interval: usize,
    /// Samples of one encoding.
    samples: usize,
    /// Encodings of one pass.
    together: usize,
    kept: Option<Kept>,
}

/// The result of one pass: `count` encodings from `first` on, one after the other in the batch.
struct Kept {
    first: usize,
    count: usize,
    key_values: KeyValues,
}

impl ReferenceKeyValues {
    /// `timesteps`: of all steps; `samples`: what the KV encoder takes for one of them.
    pub fn new(timesteps: &[usize], samples: usize, options: &Options) -> Self {
        let interval = options.reference_interval.max(1);
        let fitting = (SAMPLES / samples.max(1)).max(1);
        ReferenceKeyValues {
            timesteps: timesteps.chunks(interval).map(|steps| steps[(steps.len() - 1) / 2]).collect(),
            interval,
            samples,
            together: options.reference_steps.clamp(1, fitting),
            kept: None,
        }
    }

    /// The keys and values of a step. `encode` makes those of some timesteps, one after the other in the batch; what it
    /// returns `None` for has none.
    ///
    /// # Errors
    /// Those of `encode`, and [`crate::Error::Candle`] where it returns fewer samples.
    pub fn at(
        &mut self,
        step: usize,
        encode: impl FnOnce(&[usize]) -> Result<Option<KeyValues>>,
    ) -> Result<Option<KeyValues>> {
        let place = step / self.interval;
        if self.kept.as_ref().is_none_or(|kept| !(kept.first..kept.first + kept.count).contains(&place)) {
            // The old ones first: there is not room for both.
            self.kept = None;
            let coming: Vec<usize> = self.timesteps.iter().skip(place).take(self.together).copied().collect();
            let encoded = encode(&coming)?;
            self.kept = encoded.map(|key_values| Kept { first: place, count: coming.len(), key_values });
        }
        let Some(Kept { first, count, key_values }) = &self.kept else { return Ok(None) };
        if *count == 1 {
            return Ok(Some(key_values.clone()));
        }
        // Whole samples of a contiguous tensor: nothing is copied.
        let part = |tensor: &candle_core::Tensor| tensor.narrow(0, (place - first) * self.samples, self.samples);
        Ok(Some(key_values.map(|_, tensor| Ok(part(tensor)?))?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::Error;

    /// Keys and values that say which timestep and sample they are of.
    fn encoded(timesteps: &[usize], samples: usize) -> Result<KeyValues> {
        let numbers = timesteps.iter().flat_map(|t| (0..samples).map(move |sample| (10 * t + sample) as f64));
        let keys = Tensor::from_iter(numbers, &Device::Cpu)?.reshape((timesteps.len() * samples, 1, 1))?;
        let mut key_values = KeyValues::default();
        key_values.insert("block", keys.clone(), (keys * -1.0)?);
        Ok(key_values)
    }

    /// The timesteps whose encodings the steps get, and those of every pass.
    fn walk(timesteps: &[usize], samples: usize, options: &Options) -> Result<(Vec<usize>, Vec<Vec<usize>>)> {
        let mut references = ReferenceKeyValues::new(timesteps, samples, options);
        let (mut handed, mut passes) = (Vec::new(), Vec::new());
        for step in 0..timesteps.len() {
            let key_values = references.at(step, |coming| {
                passes.push(coming.to_vec());
                encoded(coming, samples).map(Some)
            })?;
            let Some((keys, values)) = key_values.as_ref().and_then(|all| all.get("block")) else { panic!("none") };
            let of = keys.flatten_all()?.to_vec1::<f64>()?;
            let first = of[0] as usize / 10;
            assert_eq!(of, (0..samples).map(|sample| (10 * first + sample) as f64).collect::<Vec<_>>());
            assert_eq!((values + keys)?.abs()?.sum_all()?.to_scalar::<f64>()?, 0.0);
            assert!(keys.is_contiguous() && values.is_contiguous());
            handed.push(first);
        }
        Ok((handed, passes))
    }

    #[test]
    fn every_step_gets_its_own_and_a_pass_computes_those_of_several() -> Result<()> {
        let timesteps = [90, 70, 50, 30, 10];
        for (reference_steps, passes) in [
            (1, vec![vec![90], vec![70], vec![50], vec![30], vec![10]]),
            (2, vec![vec![90, 70], vec![50, 30], vec![10]]),
            (3, vec![vec![90, 70, 50], vec![30, 10]]),
            (9, vec![vec![90, 70, 50, 30], vec![10]]), // 8 samples are the most
        ] {
            let options = Options { reference_steps, ..Options::default() };
            assert_eq!(walk(&timesteps, 2, &options)?, (timesteps.to_vec(), passes));
        }
        // Pictures that fill a pass by themselves.
        let options = Options { reference_steps: 3, ..Options::default() };
        assert_eq!(walk(&timesteps[..2], 9, &options)?, (vec![90, 70], vec![vec![90], vec![70]]));
        Ok(())
    }

    #[test]
    fn neighbouring_steps_share_those_of_the_step_in_their_middle() -> Result<()> {
        let timesteps = [90, 80, 70, 60, 50, 40, 30, 20];
        for (reference_interval, reference_steps, handed, passes) in [
            (2, 1, [90, 90, 70, 70, 50, 50, 30, 30], vec![vec![90], vec![70], vec![50], vec![30]]),
            (3, 2, [80, 80, 80, 50, 50, 50, 30, 30], vec![vec![80, 50], vec![30]]),
            (20, 2, [60; 8], vec![vec![60]]),
        ] {
            let options = Options { reference_interval, reference_steps, ..Options::default() };
            assert_eq!(walk(&timesteps, 2, &options)?, (handed.to_vec(), passes));
        }
        Ok(())
    }

    #[test]
    fn without_a_kv_path_no_step_has_any() -> Result<()> {
        let mut references = ReferenceKeyValues::new(&[20, 10], 0, &Options::default());
        for step in 0..2 {
            assert!(references.at(step, |_| Ok(None))?.is_none());
        }
        let failed = references.at(0, |_| Err(Error::argument("encode", "timesteps", "others", "these")));
        assert!(failed.is_err());
        Ok(())
    }
}

//! The portraits that pretraining sees.

use std::ops::Range;
use std::time::Instant;

use candle_core::{Device, Tensor};
use image::RgbImage;
use rand::Rng;

use super::workers::Workers;
use crate::data::to_tensor;
use crate::face::Landmarks;
use crate::mini::portrait::{Identity, Portrait, Pose, Scene, Style};
use crate::random::Address;
use crate::{Error, Result};

/// Seeds of the identities that pretraining may draw.
pub const TRAINING_IDENTITIES: Range<u64> = 0..100_000;
/// Seeds from here on are held out: no network of the miniature has seen one of these people.
pub const HELD_OUT_FROM: u64 = 1_000_000;

/// A drawn portrait.
#[derive(Clone, Debug)]
pub struct Photo {
    /// What is drawn.
    pub portrait: Portrait,
    /// The picture.
    pub image: RgbImage,
    /// The true landmarks, in pixels, the centre of the first pixel at `[0, 0]`.
    pub landmarks: Landmarks,
}

/// A portrait of a training identity, all else drawn at `address`. A quarter of them are photos.
///
/// # Errors
/// [`Error::Argument`] for an identity that is not for training.
pub fn training_portrait(identity: u64, address: Address) -> Result<Portrait> {
    if !TRAINING_IDENTITIES.contains(&identity) {
        let expected = format!("a training identity, {TRAINING_IDENTITIES:?}");
        return Err(Error::argument("training_portrait", "identity", expected, identity.to_string()));
    }
    let mut rng = address.rng();
    let style = match rng.random_range(0..4) {
        0 => Style::Photo,
        _ => Style::ALL[rng.random_range(0..Style::ALL.len())],
    };
    Ok(Portrait {
        identity: Identity::from_seed(identity),
        style,
        scene: Scene::ALL[rng.random_range(0..Scene::ALL.len())],
        pose: Pose::from_seed(rng.random_range(0..1 << 40)),
    })
}

/// Draws `count` portraits, `per_identity` of each person one after the other.
///
/// `identities`: the people to choose from at random.
///
/// # Errors
/// As [`training_portrait`].
pub fn draw_pool(
    workers: &Workers,
    count: usize,
    per_identity: usize,
    identities: Range<u64>,
    seed: u64,
    size: usize,
) -> Result<Vec<Photo>> {
    let began = Instant::now();
    let photos = workers.map(count, 8, |range| {
        range
            .map(|index| {
                let (person, address) = (index / per_identity.max(1), Address::new(seed, "pretraining portrait"));
                let identity = match identities.end - identities.start {
                    // Where there are as many people as the pool can hold, each has a place.
                    all if all as usize <= count.div_ceil(per_identity.max(1)) => {
                        identities.start + person as u64 % all
                    }
                    _ => {
                        Address::new(seed, "pretraining identity").sample(person).rng().random_range(identities.clone())
                    }
                };
                let portrait = training_portrait(identity, address.sample(index))?;
                let drawn = portrait.render(size as u32);
                let landmarks = drawn.landmarks.map(|point| point.map(|value| f64::from(value) - 0.5));
                Ok(Photo { portrait, image: drawn.image, landmarks })
            })
            .collect::<Result<Vec<_>>>()
    })?;
    println!("{count} portraits drawn in {:.1} s", began.elapsed().as_secs_f64());
    Ok(photos.into_iter().flatten().collect())
}

/// The pictures of some portraits, `(batch, 3, size, size)` in [-1, 1], f32.
///
/// # Errors
/// [`Error::Candle`] where memory is out.
pub fn images<'a>(photos: impl IntoIterator<Item = &'a Photo>) -> Result<Tensor> {
    let tensors: Vec<Tensor> =
        photos.into_iter().map(|photo| to_tensor(&photo.image, &Device::Cpu)).collect::<Result<_>>()?;
    Ok(Tensor::stack(&tensors, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pretraining_draws_training_identities_only() -> Result<()> {
        let workers = Workers::new(2)?;
        let photos = draw_pool(&workers, 12, 3, TRAINING_IDENTITIES, 5, 16)?;
        assert!(photos.iter().all(|photo| TRAINING_IDENTITIES.contains(&photo.portrait.identity.seed)));
        assert!(
            photos.chunks(3).all(|same| same.iter().all(|photo| photo.portrait.identity == same[0].portrait.identity))
        );
        const { assert!(TRAINING_IDENTITIES.end <= HELD_OUT_FROM) };
        Ok(())
    }

    #[test]
    fn held_out_identities_are_refused() {
        let error = training_portrait(HELD_OUT_FROM, Address::new(0, "x")).unwrap_err();
        assert!(matches!(error, Error::Argument { .. }), "{error}");
    }
}

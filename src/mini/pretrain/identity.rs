//! The identity network: faces of one person near each other, in whatever style.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor};
use rand::Rng;

use super::clip::cross_entropy;
use super::pool::{Photo, TRAINING_IDENTITIES, draw_pool, images};
use super::training::{Losses, MicroBatch, Options, Recipe, train};
use super::workers::Workers;
use crate::face::aligned_crop;
use crate::mini::MiniConfig;
use crate::models::identity::{IdentityNetwork, normalise};
use crate::models::mini_identity::MiniIdentity;
use crate::nn::{Init, Parameters, Weights};
use crate::random::Address;
use crate::{Result, ops};

/// Portraits of each person.
const PER_IDENTITY: usize = 8;
/// The angular margin of ArcFace (Deng et al. 2019), reached after a third of the training.
const MARGIN: f64 = 0.3;
/// ArcFace's scale of the cosines.
const SCALE: f64 = 20.0;
/// How far landmarks are off while training, in pixels: a detector is no better.
const JITTER: f64 = 1.2;

/// Trains the identity network by additive angular margin on crops aligned by the true landmarks, slightly moved; then
/// says how well it tells apart people that training did not show.
///
/// # Errors
/// Those of [`train`].
pub fn identity(options: &Options) -> Result<()> {
    let workers = Workers::new(options.threads)?;
    let config = MiniConfig::mini();
    let classes = (options.pool / PER_IDENTITY).max(2);
    let count = classes * PER_IDENTITY;
    let photos = draw_pool(&workers, count, PER_IDENTITY, 0..classes as u64, options.seed ^ 2, config.resolution)?;
    let parameters = Parameters::new();
    let weights = Weights::trainable(&parameters, options.seed, DType::F32, &Device::Cpu);
    let network = config.load_identity_network(&weights)?;
    let centres = weights.pp("identity_classes").get((classes, network.dimension()), "weight", Init::Normal(0.1))?;
    let recipe = Recipe {
        stage: "identity",
        parameters: &parameters,
        batch: 64,
        learning_rate: 2e-3,
        weight_decay: 1e-3,
        ema_decay: 0.99,
        mirror: None,
        constants: HashMap::new(),
    };
    train(options, &workers, &recipe, |micro| loss(&network, &centres, &photos, micro))?;

    // People of the training range, but behind those that were drawn.
    let others = classes as u64..TRAINING_IDENTITIES.end;
    let strangers = draw_pool(&workers, 200 * 2, 2, others, options.seed ^ 3, config.resolution)?;
    let embedded = workers.map(strangers.len(), 8, |range| embed(&network, &strangers[range], |_| 0.0))?;
    report(&Tensor::cat(&embedded, 0)?.detach())
}

fn embed(network: &MiniIdentity, photos: &[Photo], mut move_by: impl FnMut(usize) -> f64) -> Result<Tensor> {
    let references: Vec<&Photo> = photos.iter().collect();
    embed_all(network, &references, &mut move_by)
}

fn embed_all(network: &MiniIdentity, photos: &[&Photo], move_by: &mut impl FnMut(usize) -> f64) -> Result<Tensor> {
    let landmarks: Vec<_> = photos
        .iter()
        .enumerate()
        .map(|(i, photo)| photo.landmarks.map(|point| point.map(|value| value + move_by(i))))
        .collect();
    let images = images(photos.iter().copied())?;
    network.embed(&aligned_crop(&images, &landmarks, network.crop_size())?)
}

fn loss(network: &MiniIdentity, centres: &Tensor, photos: &[Photo], micro: &MicroBatch) -> Result<Losses> {
    let mut generators = micro.each("identity portrait", Address::rng);
    let chosen: Vec<usize> = generators.iter_mut().map(|rng| rng.random_range(0..photos.len())).collect();
    let pictures: Vec<&Photo> = chosen.iter().map(|index| &photos[*index]).collect();
    let mut move_by = |i: usize| {
        let rng = &mut generators[i];
        JITTER * (rng.random::<f64>() + rng.random::<f64>() + rng.random::<f64>() - 1.5) * 2.0
    };
    let embedded = embed_all(network, &pictures, &mut move_by)?;
    let cosines = ops::linear(&embedded, &normalise(centres)?, None)?;
    let classes: Vec<u32> = chosen.iter().map(|index| (index / PER_IDENTITY) as u32).collect();
    let right = cosines.argmax(D::Minus1)?.to_vec1::<u32>()?;
    let right = right.iter().zip(&classes).filter(|(guess, truth)| guess == truth).count();

    let margin = MARGIN * (3.0 * micro.progress).min(1.0);
    let index = Tensor::from_slice(&classes, (classes.len(), 1), cosines.device())?;
    let own = cosines.gather(&index, 1)?;
    // cos(angle + margin)
    let sine = (own.sqr()?.affine(-1.0, 1.0)?.clamp(0.0, 1.0)? + 1e-6)?.sqrt()?;
    let harder = ((&own * margin.cos())? - (sine * margin.sin())?)?;
    let one_hot = Tensor::zeros(cosines.shape(), DType::F32, cosines.device())?.scatter_add(
        &index,
        &Tensor::ones((classes.len(), 1), DType::F32, cosines.device())?,
        1,
    )?;
    let logits = ((cosines + one_hot.broadcast_mul(&(harder - own)?)?)? * SCALE)?;
    let parts = vec![("accuracy", right as f64 / classes.len() as f64)];
    Ok(Losses { loss: cross_entropy(&logits, &classes)?, parts })
}

/// Cosines within and between people, of embeddings in pairs `(2 * people, dimension)`.
fn report(embedded: &Tensor) -> Result<()> {
    let similarity = embedded.matmul(&embedded.t()?)?.to_vec2::<f32>()?;
    let people = similarity.len() / 2;
    let (mut same, mut other, mut found) = (0.0, 0.0, 0);
    for person in 0..people {
        same += similarity[2 * person][2 * person + 1];
        let row = |j: usize| similarity[2 * person][2 * j + 1];
        let best = (0..people).max_by(|a, b| row(*a).total_cmp(&row(*b)));
        found += usize::from(best == Some(person));
        other += (0..people).filter(|j| *j != person).map(row).sum::<f32>() / (people - 1).max(1) as f32;
    }
    let count = people as f32;
    println!(
        "identity: {people} unseen people: cosine {:.3} to themselves, {:.3} to others, {:.1} % found among all",
        same / count,
        other / count,
        100.0 * found as f32 / count,
    );
    Ok(())
}

//! The identity network: faces of one person near each other, in whatever style.

use std::collections::HashMap;

use candle_core::{D, DType, Tensor};
use rand::Rng;

use super::clip::{accuracy, cross_entropy, one_hot};
use super::pool::{PER_IDENTITY, Pool};
use super::training::{Losses, MicroBatch, Options, Recipe, train};
use crate::face::aligned_crop;
use crate::mini::MiniConfig;
use crate::models::identity::{IdentityNetwork, normalise};
use crate::models::mini_identity::{self, MiniIdentity};
use crate::nn::{Init, Parameters};
use crate::random::Address;
use crate::{Result, ops};

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
    train_network(options, "identity", "identity_network", &MiniConfig::mini().identity_network)
}

/// The same for a network of another shape ([`mini_identity::Config::held_out`]) and seed, which is not part of the
/// miniature: it judges likeness where the miniature's own network was a teacher.
///
/// # Errors
/// Those of [`train`].
pub fn held_out_identity(options: &Options) -> Result<()> {
    let options = Options { seed: options.seed + 1000, ..options.clone() };
    train_network(&options, "held_out_identity", "held_out_identity", &mini_identity::Config::held_out())
}

fn train_network(options: &Options, stage: &'static str, prefix: &str, config: &mini_identity::Config) -> Result<()> {
    let (workers, pool) = (options.workers()?, Pool::of(options)?);
    let classes = pool.people();
    let parameters = Parameters::new();
    let weights = options.trainable(&parameters);
    let network = MiniIdentity::load(config, &weights.pp(prefix))?;
    let centres = weights.pp("identity_classes").get((classes, network.dimension()), "weight", Init::Normal(0.1))?;
    let recipe = Recipe {
        stage,
        parameters: &parameters,
        batch: options.batch_or(64, 256),
        learning_rate: 2e-3,
        weight_decay: 1e-3,
        ema_decay: 0.99,
        mirror: None,
        constants: HashMap::new(),
    };
    train(options, &workers, &recipe, |micro| loss(options, &network, &centres, &pool, micro))?;

    let strangers = Pool::draw_held_out(options, 200 * PER_IDENTITY)?;
    let pairs: Vec<usize> =
        (0..strangers.people()).flat_map(|person| [0, 1].map(|i| person * PER_IDENTITY + i)).collect();
    let mut embedded = Vec::new();
    for chosen in pairs.chunks(40) {
        embedded.push(embed(options, &network, &strangers.images(chosen)?, &strangers, chosen, |_| 0.0)?.detach());
    }
    report(stage, &Tensor::cat(&embedded, 0)?)
}

/// Embeddings of the faces in pictures of some portraits, f32, whose landmarks are moved.
fn embed(
    options: &Options,
    network: &MiniIdentity,
    images: &Tensor,
    pool: &Pool,
    chosen: &[usize],
    mut move_by: impl FnMut(usize) -> f64,
) -> Result<Tensor> {
    let moved = |(i, index): (usize, &usize)| pool.landmarks[*index].map(|point| point.map(|value| value + move_by(i)));
    let landmarks: Vec<_> = chosen.iter().enumerate().map(moved).collect();
    let crops = aligned_crop(images, &landmarks, network.crop_size())?;
    ops::cast(&network.embed(&options.input(&crops)?)?, DType::F32)
}

/// What previews and samples look like: in a third of the batches the pictures are blurred and noisy.
fn degraded(images: Tensor, micro: &MicroBatch) -> Result<Tensor> {
    let mut rng = micro.address("identity blur").sample(micro.samples.start).rng();
    if rng.random_bool(0.67) {
        return Ok(images);
    }
    let (side, x) = (images.dim(2)?, ops::to_channels_last(&images)?);
    let small = rng.random_range(side / 3..side);
    let x = ops::resize_bilinear(&ops::resize_bilinear(&x, small, small, true)?, side, side, false)?;
    let noise = micro.noise("identity noise", &x.dims()[1..])?;
    ops::to_channels_first(&(x + (noise * rng.random_range(0.0..0.15))?)?)
}

fn loss(
    options: &Options,
    network: &MiniIdentity,
    centres: &Tensor,
    pool: &Pool,
    micro: &MicroBatch,
) -> Result<Losses> {
    let mut generators = micro.each("identity portrait", Address::rng);
    let chosen: Vec<usize> = generators.iter_mut().map(|rng| rng.random_range(0..pool.len())).collect();
    let move_by = |i: usize| {
        let rng = &mut generators[i];
        JITTER * (rng.random::<f64>() + rng.random::<f64>() + rng.random::<f64>() - 1.5) * 2.0
    };
    let images = degraded(pool.images(&chosen)?, micro)?;
    let embedded = embed(options, network, &images, pool, &chosen, move_by)?;
    let cosines = ops::linear(&embedded, &normalise(centres)?, None)?;
    let classes: Vec<u32> = chosen.iter().map(|index| (index / PER_IDENTITY) as u32).collect();
    let one_hot = one_hot(&classes, centres.dim(0)?, &options.device)?;

    let margin = MARGIN * (3.0 * micro.progress).min(1.0);
    let own = (&cosines * &one_hot)?.sum_keepdim(D::Minus1)?;
    // cos(angle + margin)
    let sine = (own.sqr()?.affine(-1.0, 1.0)?.clamp(0.0, 1.0)? + 1e-6)?.sqrt()?;
    let harder = ((&own * margin.cos())? - (sine * margin.sin())?)?;
    let logits = ((&cosines + one_hot.broadcast_mul(&(harder - own)?)?)? * SCALE)?;
    Ok(Losses { loss: cross_entropy(&logits, &one_hot)?, parts: vec![("accuracy", accuracy(&cosines, &one_hot)?)] })
}

/// Cosines within and between people, of embeddings in pairs `(2 * people, dimension)`.
fn report(stage: &str, embedded: &Tensor) -> Result<()> {
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
        "{stage}: {people} unseen people: cosine {:.3} to themselves, {:.3} to others, {:.1} % found among all",
        same / count,
        other / count,
        100.0 * found as f32 / count,
    );
    Ok(())
}

//! The face locator: where the landmarks are, and whether there is a face at all.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::pool::{Photo, TRAINING_IDENTITIES, draw_pool, images};
use super::training::{Losses, MicroBatch, Options, Recipe, train};
use super::workers::Workers;
use crate::face::Landmarks;
use crate::mini::MiniConfig;
use crate::models::mini_face_locator::MiniFaceLocator;
use crate::nn::{Parameters, Weights};
use crate::random::Address;
use crate::{Result, ops};

/// Side of the pictures while training, in pixels: what the network sees anyway.
const SIDE: usize = 64;

/// Trains the face locator on portraits that are moved, zoomed, blurred and noised, as previews are; a fifth of the
/// samples show no face.
///
/// # Errors
/// Those of [`train`].
pub fn face_locator(options: &Options) -> Result<()> {
    let workers = Workers::new(options.threads)?;
    let config = MiniConfig::mini();
    let photos = draw_pool(&workers, options.pool, 1, TRAINING_IDENTITIES, options.seed ^ 4, config.resolution)?;
    let parameters = Parameters::new();
    let weights = Weights::trainable(&parameters, options.seed, DType::F32, &Device::Cpu);
    let network = config.load_face_locator(&weights)?;
    let recipe = Recipe {
        stage: "face_locator",
        parameters: &parameters,
        batch: 64,
        learning_rate: 2e-3,
        weight_decay: 1e-3,
        ema_decay: 0.995,
        mirror: None,
        constants: HashMap::new(),
    };
    train(options, &workers, &recipe, |micro| loss(&network, &photos, micro))
}

/// Smooth L1 over the landmarks of samples with a face, and binary cross-entropy over the presence.
fn loss(network: &MiniFaceLocator, photos: &[Photo], micro: &MicroBatch) -> Result<Losses> {
    let samples: Vec<_> =
        micro.each("located face", |address| sample(photos, address)).into_iter().collect::<Result<_>>()?;
    let pictures: Vec<&Tensor> = samples.iter().map(|(picture, _)| picture).collect();
    let pictures = Tensor::cat(&pictures, 0)?;
    let count = samples.len();
    let present: Vec<f32> = samples.iter().map(|(_, face)| if face.is_some() { 1.0 } else { 0.0 }).collect();
    let targets: Vec<f32> = samples
        .iter()
        .flat_map(|(_, face)| face.unwrap_or([[0.0; 2]; 5]))
        .flatten()
        .map(|value| ((value + 0.5) / SIDE as f64) as f32)
        .collect();
    let faces = present.iter().sum::<f32>().max(1.0);
    let (present, targets) =
        (Tensor::from_vec(present, count, &Device::Cpu)?, Tensor::from_vec(targets, (count, 5, 2), &Device::Cpu)?);

    let prediction = network.forward(&pictures)?;
    let difference = (prediction.landmarks - targets)?.broadcast_mul(&present.reshape((count, 1, 1))?)?;
    // Pseudo-Huber, quadratic below about one pixel.
    let scale = 1.0 / SIDE as f64;
    let smooth =
        ((((&difference * (1.0 / scale))?.sqr()? + 1.0)?.sqrt()? - 1.0)?.sum_all()? / f64::from(10.0 * faces))?;
    let pixels = difference.sqr()?.sum(D::Minus1)?.sqrt()?.sum_all()?.to_scalar::<f32>()? / (5.0 * faces) * SIDE as f32;

    // log(1 + exp(-|x|)) + max(x, 0) - x y
    let logits = prediction.presence;
    let entropy = ((logits.abs()?.neg()?.exp()? + 1.0)?.log()? + logits.relu()?)?;
    let entropy = (entropy - (&logits * &present)?)?.mean_all()?;
    let right = logits.ge(0f32)?.to_dtype(DType::F32)?.eq(&present)?.to_dtype(DType::F32)?.mean_all()?;
    let parts = vec![("pixels of 64", f64::from(pixels)), ("accuracy", f64::from(right.to_scalar::<f32>()?))];
    Ok(Losses { loss: (smooth + entropy)?, parts })
}

/// A picture `(1, 3, SIDE, SIDE)` and where its face is, if it shows one.
fn sample(photos: &[Photo], address: Address) -> Result<(Tensor, Option<Landmarks>)> {
    let mut rng = address.rng();
    let photo = &photos[rng.random_range(0..photos.len())];
    let picture = images([photo])?.permute((0, 2, 3, 1))?.contiguous()?;
    let source = photo.image.width() as f64;
    let face = rng.random_bool(0.8);
    // From a pixel of the new picture to where it is read in the portrait.
    let step = source / SIDE as f64;
    let (zoom, centre) = match face {
        true => (rng.random_range(0.8..1.2), [0.0, 0.0].map(|_: f64| source * rng.random_range(0.42..0.58))),
        // A small piece near a border, in which no whole face fits.
        false => {
            let corner = [rng.random_range(0.0..0.22), rng.random_range(0.0..1.0)];
            let corner = if rng.random_bool(0.5) { corner } else { [1.0 - corner[0], corner[1]] };
            (rng.random_range(0.2..0.4), corner.map(|part: f64| part * source))
        }
    };
    let angle: f64 = rng.random_range(-0.25..0.25);
    let (a, b) = (step * zoom * angle.cos(), step * zoom * angle.sin());
    let middle = (SIDE as f64 - 1.0) / 2.0;
    let matrix = [[a, -b, centre[0] - a * middle + b * middle], [b, a, centre[1] - b * middle - a * middle]];
    let half = if step * zoom > 1.4 { ops::resize_bilinear(&picture, SIDE, SIDE, true)? } else { picture };
    let ratio = half.dim(1)? as f64 / source;
    let in_half = matrix.map(|[x, y, t]| [x * ratio, y * ratio, (t + 0.5) * ratio - 0.5]);
    let mut new = ops::warp_affine(&half, &[in_half], SIDE, SIDE)?;

    let determinant = a * a + b * b;
    let landmarks = photo.landmarks.map(|[x, y]| {
        let (x, y) = (x - matrix[0][2], y - matrix[1][2]);
        [(a * x + b * y) / determinant, (a * y - b * x) / determinant]
    });
    let inside = landmarks.iter().filter(|point| point.iter().all(|value| (0.0..SIDE as f64).contains(value))).count();
    new = degrade(&new, &mut rng, address)?;
    if !face && rng.random_bool(0.3) {
        // Something that is no picture at all: smooth noise.
        let side = 1 << rng.random_range(1..7);
        let noise =
            address.sample(address.sample as usize + (1 << 20)).normal((1, side, side, 3), DType::F32, &Device::Cpu)?;
        let noise = (ops::resize_bilinear(&noise, SIDE, SIDE, false)? * 0.6)?.clamp(-1f32, 1f32)?;
        return Ok((noise.permute((0, 3, 1, 2))?.contiguous()?, None));
    }
    // Half a face is neither: in the rare case, it counts as none from two points on that are missing.
    let found = (inside == 5 || face && inside == 4).then_some(landmarks);
    Ok((new.permute((0, 3, 1, 2))?.contiguous()?, found))
}

/// Blur, noise and changes of light and contrast, each in half the samples.
fn degrade(picture: &Tensor, rng: &mut ChaCha8Rng, address: Address) -> Result<Tensor> {
    let mut new = picture.clone();
    if rng.random_bool(0.5) {
        let side = rng.random_range(14..SIDE);
        new = ops::resize_bilinear(&ops::resize_bilinear(&new, side, side, true)?, SIDE, SIDE, false)?;
    }
    if rng.random_bool(0.5) {
        let strength = rng.random_range(0.0..0.3);
        let grain = 1 << rng.random_range(0..3);
        let noise = address.sample(address.sample as usize + (1 << 21)).normal(
            (1, SIDE / grain, SIDE / grain, 3),
            DType::F32,
            &Device::Cpu,
        )?;
        new = (new + (ops::resize_bilinear(&noise, SIDE, SIDE, false)? * strength)?)?;
    }
    if rng.random_bool(0.5) {
        new = new.affine(rng.random_range(0.5..1.2), rng.random_range(-0.25..0.25))?;
    }
    Ok(new.clamp(-1f32, 1f32)?)
}

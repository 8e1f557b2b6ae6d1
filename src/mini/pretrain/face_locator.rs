//! The face locator: where the landmarks are, and whether there is a face at all.

use std::collections::HashMap;

use candle_core::{D, DType, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::pool::Pool;
use super::training::{Losses, MicroBatch, Options, Recipe, train};
use crate::face::Landmarks;
use crate::mini::{MiniConfig, RESOLUTION};
use crate::models::mini_face_locator::MiniFaceLocator;
use crate::nn::Parameters;
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
    let (workers, config, pool) = (options.workers()?, MiniConfig::mini(), Pool::of(options)?);
    let parameters = Parameters::new();
    let weights = options.trainable(&parameters);
    let network = config.load_face_locator(&weights)?;
    let recipe = Recipe {
        stage: "face_locator",
        parameters: &parameters,
        batch: options.batch_or(64, 256),
        learning_rate: 2e-3,
        weight_decay: 1e-3,
        ema_decay: 0.995,
        mirror: None,
        constants: HashMap::new(),
    };
    train(options, &workers, &recipe, |micro| loss(options, &network, &pool, micro))?;

    let held_out = Pool::draw_held_out(options, 256)?;
    let plain = MicroBatch::of(options, u64::MAX, 0..held_out.len());
    let measured = loss(options, &network, &held_out, &plain)?;
    let number = |i: usize| -> Result<f32> { Ok(measured.parts[i].1.to_scalar::<f32>()?) };
    println!(
        "face_locator: held-out people: {:.2} pixels of {SIDE} off, presence right in {:.1} %",
        number(0)?,
        100.0 * number(1)?
    );
    Ok(())
}

/// Samples that are changed alike.
const GROUP: usize = 16;

/// Smooth L1 over the landmarks of samples with a face, and binary cross-entropy over the presence.
fn loss(options: &Options, network: &MiniFaceLocator, pool: &Pool, micro: &MicroBatch) -> Result<Losses> {
    let (mut pictures, mut faces) = (Vec::new(), Vec::new());
    let addresses = micro.each("located face", |address| address);
    for group in addresses.chunks(GROUP) {
        let (group, found) = samples(pool, group, micro)?;
        pictures.push(group);
        faces.extend(found);
    }
    let (pictures, count) = (options.input(&Tensor::cat(&pictures, 0)?)?, faces.len());
    let present: Vec<f32> = faces.iter().map(|face| if face.is_some() { 1.0 } else { 0.0 }).collect();
    let targets: Vec<f32> = faces
        .iter()
        .flat_map(|face| face.unwrap_or([[0.0; 2]; 5]))
        .flatten()
        .map(|value| ((value + 0.5) / SIDE as f64) as f32)
        .collect();
    let faces = present.iter().sum::<f32>().max(1.0);
    let (present, targets) = (
        Tensor::from_vec(present, count, &options.device)?,
        Tensor::from_vec(targets, (count, 5, 2), &options.device)?,
    );

    let prediction = network.forward(&pictures)?;
    let difference =
        (ops::cast(&prediction.landmarks, DType::F32)? - targets)?.broadcast_mul(&present.reshape((count, 1, 1))?)?;
    // Pseudo-Huber, quadratic below about one pixel.
    let scale = 1.0 / SIDE as f64;
    let smooth =
        ((((&difference * (1.0 / scale))?.sqr()? + 1.0)?.sqrt()? - 1.0)?.sum_all()? / f64::from(10.0 * faces))?;
    let distances = difference.detach().sqr()?.sum(D::Minus1)?.sqrt()?;
    let pixels = (distances.sum_all()? * (SIDE as f64 / f64::from(5.0 * faces)))?;

    // log(1 + exp(-|x|)) + max(x, 0) - x y
    let logits = ops::cast(&prediction.presence, DType::F32)?;
    let entropy = ((logits.abs()?.neg()?.exp()? + 1.0)?.log()? + logits.relu()?)?;
    let entropy = (entropy - (&logits * &present)?)?.mean_all()?;
    let right = logits.detach().ge(0f32)?.to_dtype(DType::F32)?.eq(&present)?.to_dtype(DType::F32)?.mean_all()?;
    let parts = vec![("pixels of 64", pixels), ("accuracy", right)];
    Ok(Losses { loss: (smooth + entropy)?, parts })
}

/// Pictures `(samples, 3, SIDE, SIDE)` of a few samples, and where their faces are: four fifths show one, but for what
/// chance moves out of the picture.
fn samples(pool: &Pool, addresses: &[Address], micro: &MicroBatch) -> Result<(Tensor, Vec<Option<Landmarks>>)> {
    let with = (addresses.len() * 4).div_ceil(5);
    let (mut chosen, mut matrices, mut faces) = (Vec::new(), Vec::new(), Vec::new());
    for (i, address) in addresses.iter().enumerate() {
        let mut rng = address.rng();
        let index = rng.random_range(0..pool.len());
        let (matrix, landmarks) = place(&mut rng, i < with, &pool.landmarks[index]);
        chosen.push(index);
        matrices.push(matrix);
        faces.push(landmarks);
    }
    let pictures = pool.channels_last(&chosen)?;
    // Faces are read from pictures of half the size, as the new ones are smaller.
    let half = ops::resize_bilinear(&pictures.narrow(0, 0, with)?.contiguous()?, SIDE, SIDE, true)?;
    let ratio = SIDE as f64 / RESOLUTION as f64;
    let in_half = |matrix: &[[f64; 3]; 2]| matrix.map(|[x, y, t]| [x * ratio, y * ratio, (t + 0.5) * ratio - 0.5]);
    let in_half: Vec<_> = matrices[..with].iter().map(in_half).collect();
    let mut parts = vec![ops::warp_affine(&half, &in_half, SIDE, SIDE)?];
    if with < addresses.len() {
        let rest = pictures.narrow(0, with, addresses.len() - with)?.contiguous()?;
        parts.push(ops::warp_affine(&rest, &matrices[with..], SIDE, SIDE)?);
    }
    let address = addresses[0];
    let mut rng = Address { purpose: "located face degraded", ..address }.rng();
    let mut pictures = degrade(&Tensor::cat(&parts, 0)?, &mut rng, micro)?;
    if with < addresses.len() && rng.random_bool(0.6) {
        // One that is no picture at all: smooth noise.
        let side = 1 << rng.random_range(1..7);
        let noise = micro.noise("no picture", &[side, side, 3])?.narrow(0, 0, 1)?.contiguous()?;
        let noise = (ops::resize_bilinear(&noise, SIDE, SIDE, false)? * 0.6)?.clamp(-1f32, 1f32)?;
        pictures = Tensor::cat(&[&pictures.narrow(0, 0, addresses.len() - 1)?, &noise], 0)?;
        faces.truncate(addresses.len() - 1);
        faces.push(None);
    }
    Ok((pictures.permute((0, 3, 1, 2))?.contiguous()?, faces))
}

/// How a portrait is moved: the matrix from a pixel of the new picture to where it is read, and where the landmarks
/// come to lie, if a face is to be seen.
fn place(rng: &mut ChaCha8Rng, face: bool, landmarks: &Landmarks) -> ([[f64; 3]; 2], Option<Landmarks>) {
    let source = RESOLUTION as f64;
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
    let determinant = a * a + b * b;
    let moved = landmarks.map(|[x, y]| {
        let (x, y) = (x - matrix[0][2], y - matrix[1][2]);
        [(a * x + b * y) / determinant, (a * y - b * x) / determinant]
    });
    let inside = moved.iter().filter(|point| point.iter().all(|value| (0.0..SIDE as f64).contains(value))).count();
    // Half a face is neither: in the rare case, it counts as none from two points on that are missing.
    (matrix, (inside == 5 || face && inside == 4).then_some(moved))
}

/// Blur, noise and changes of light and contrast, each of half the groups.
fn degrade(pictures: &Tensor, rng: &mut ChaCha8Rng, micro: &MicroBatch) -> Result<Tensor> {
    let mut new = pictures.clone();
    if rng.random_bool(0.5) {
        let side = rng.random_range(14..SIDE);
        new = ops::resize_bilinear(&ops::resize_bilinear(&new, side, side, true)?, SIDE, SIDE, false)?;
    }
    if rng.random_bool(0.5) {
        let (strength, side) = (rng.random_range(0.0..0.3), SIDE / (1 << rng.random_range(0..3)));
        let noise = micro.noise("grain", &[side, side, 3])?.narrow(0, 0, pictures.dim(0)?)?.contiguous()?;
        new = (new + (ops::resize_bilinear(&noise, SIDE, SIDE, false)? * strength)?)?;
    }
    if rng.random_bool(0.5) {
        new = new.affine(rng.random_range(0.5..1.2), rng.random_range(-0.25..0.25))?;
    }
    Ok(new.clamp(-1f32, 1f32)?)
}

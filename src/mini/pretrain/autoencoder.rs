//! The autoencoder: pictures of 128 pixels to latents of 32 and back.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor};
use rand::Rng;

use super::files::{load_tensors, save_tensors};
use super::pool::{Photo, TRAINING_IDENTITIES, draw_pool, images};
use super::training::{Losses, MicroBatch, Options, Recipe, train};
use super::workers::Workers;
use crate::Result;
use crate::data::{from_tensor, save_png, to_tensor};
use crate::mini::MiniConfig;
use crate::models::taesd::{Config, Taesd};
use crate::nn::{Parameters, Weights};
use crate::train::ContactSheet;

/// Side of the squares that are cut out of the pictures: small ones give more different updates in the same time.
const CROP: u32 = 64;
/// Noise on the latents while training: the decoder learns to take latents that are a little off, and the encoder to
/// spread its latents out, as far as the penalty lets it.
const LATENT_NOISE: f64 = 0.1;
const LATENT_PENALTY: f64 = 2e-3;
/// Weight and side of the squares whose mean colour counts by itself. The absolute error alone lets a small network
/// settle in a state without one axis of colour, from which it does not come back.
const COLOUR_WEIGHT: f64 = 4.0;
const COLOUR_SQUARE: usize = 8;

/// Trains the autoencoder, then measures the scale and shift that bring its latents to mean 0 and variance 1.
///
/// The loss is the mean absolute error, plus half the squared error, plus the absolute error of the differences of
/// neighbouring pixels, which keeps edges sharp, plus the squared error of the mean colour of small squares.
///
/// # Errors
/// Those of [`train`].
pub fn autoencoder(options: &Options) -> Result<()> {
    let workers = Workers::new(options.threads)?;
    let size = MiniConfig::mini().resolution;
    let photos = draw_pool(&workers, options.pool, 1, TRAINING_IDENTITIES, options.seed, size)?;
    let parameters = Parameters::new();
    let weights = Weights::trainable(&parameters, options.seed, DType::F32, &Device::Cpu).pp("autoencoder");
    let config = MiniConfig::mini().autoencoder;
    let taesd = Taesd::load(&config, &weights)?;
    let recipe = Recipe {
        stage: "autoencoder",
        parameters: &parameters,
        batch: 16,
        learning_rate: 2e-3,
        weight_decay: 1e-4,
        ema_decay: 0.995,
        mirror: None,
        constants: scale(1.0, 0.0)?,
    };
    train(options, &workers, &recipe, |micro| loss(&taesd, &photos, micro))?;

    let file = options.out.join("autoencoder.safetensors");
    let (scaling_factor, shift) = measure(&workers, &taesd, &photos)?;
    let mut tensors = load_tensors(&file)?;
    tensors.extend(scale(scaling_factor, shift)?);
    save_tensors(&file, &tensors)?;
    let taesd = Taesd::load(&Config { scaling_factor, shift, ..config }, &weights)?;
    save_png(&sheet(&taesd, &photos)?, options.out.join("autoencoder.png"))
}

fn scale(scaling_factor: f64, shift: f64) -> Result<HashMap<String, Tensor>> {
    let number = |value: f64| Tensor::new(&[value as f32], &Device::Cpu);
    Ok(HashMap::from([
        ("autoencoder.scaling_factor".to_string(), number(scaling_factor)?),
        ("autoencoder.shift".to_string(), number(shift)?),
    ]))
}

fn loss(taesd: &Taesd, photos: &[Photo], micro: &MicroBatch) -> Result<Losses> {
    let crops = micro.each("autoencoder crop", |address| {
        let mut rng = address.rng();
        let photo = &photos[rng.random_range(0..photos.len())];
        let (width, height) = photo.image.dimensions();
        let (x, y) = (rng.random_range(0..=width - CROP), rng.random_range(0..=height - CROP));
        to_tensor(&image::imageops::crop_imm(&photo.image, x, y, CROP, CROP).to_image(), &Device::Cpu)
    });
    let images = Tensor::stack(&crops.into_iter().collect::<Result<Vec<_>>>()?, 0)?;
    let latents = taesd.encode(&images)?;
    let noise = micro.noise("autoencoder noise", &latents.dims()[1..])?;
    // None at first, when the latents themselves are small.
    let strength = LATENT_NOISE * (4.0 * micro.progress).min(1.0);
    let difference = (taesd.decode(&(&latents + (noise * strength)?)?)? - &images)?;
    let (absolute, squared) = (difference.abs()?.mean_all()?, difference.sqr()?.mean_all()?);
    let edges = (edges(&difference, D::Minus1)? + edges(&difference, D::Minus2)?)?;
    let (count, side) = (micro.size(), CROP as usize / COLOUR_SQUARE);
    let squares = difference.reshape((count * 3, side, COLOUR_SQUARE, side, COLOUR_SQUARE))?;
    let colours = squares.mean(4)?.mean(2)?.sqr()?.mean_all()?;
    let penalty = latents.sqr()?.mean_all()?;
    let parts = vec![
        ("l1", f64::from(absolute.to_scalar::<f32>()?)),
        ("mse", f64::from(squared.to_scalar::<f32>()?)),
        ("colours", f64::from(colours.to_scalar::<f32>()?)),
        ("latents", f64::from(penalty.to_scalar::<f32>()?).sqrt()),
    ];
    let loss = ((absolute + (squared * 0.5)?)? + (edges * 0.5)?)?;
    let loss = ((loss + (colours * COLOUR_WEIGHT)?)? + (penalty * LATENT_PENALTY)?)?;
    Ok(Losses { loss, parts })
}

/// The mean absolute difference of neighbours along a dimension.
fn edges(x: &Tensor, dim: D) -> Result<Tensor> {
    let length = x.dim(dim)? - 1;
    Ok((x.narrow(dim, 1, length)? - x.narrow(dim, 0, length)?)?.abs()?.mean_all()?)
}

/// One over the standard deviation, and the mean, of the latents of some pictures.
fn measure(workers: &Workers, taesd: &Taesd, photos: &[Photo]) -> Result<(f64, f64)> {
    let sums = workers.map(photos.len().min(512), 8, |range| {
        let latents = taesd.encode(&images(&photos[range])?)?.detach().to_dtype(DType::F64)?;
        let sum = |x: &Tensor| -> Result<f64> { Ok(x.sum_all()?.to_scalar::<f64>()?) };
        Ok([latents.elem_count() as f64, sum(&latents)?, sum(&latents.sqr()?)?])
    })?;
    let total = sums.iter().fold([0.0; 3], |total, sum| std::array::from_fn(|i| total[i] + sum[i]));
    let mean = total[1] / total[0];
    let deviation = (total[2] / total[0] - mean * mean).max(0.0).sqrt();
    println!("autoencoder: latents of mean {mean:.4} and standard deviation {deviation:.4}");
    Ok((1.0 / deviation.max(1e-6), mean))
}

/// Pictures above, their reconstructions below.
fn sheet(taesd: &Taesd, photos: &[Photo]) -> Result<image::RgbImage> {
    let size = photos[0].image.width();
    let mut sheet = ContactSheet::new(size, size);
    for row in photos.chunks(8).take(2) {
        let decoded = taesd.decode(&taesd.encode(&images(row)?)?)?.detach();
        sheet.add_row(row.iter().map(|photo| (photo.portrait.prompt(), photo.image.clone())).collect())?;
        let reconstructed = (0..row.len()).map(|i| Ok((String::from("decoded"), from_tensor(&decoded.get(i)?)?)));
        sheet.add_row(reconstructed.collect::<Result<_>>()?)?;
    }
    Ok(sheet.render())
}

//! The autoencoder: pictures of 128 pixels to latents of 32 and back.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor};
use rand::Rng;

use super::files::{load_stages, load_tensors, save_tensors};
use super::pool::Pool;
use super::training::{Losses, MicroBatch, Options, Recipe, STEP, train};
use crate::data::{from_tensor, save_png};
use crate::mini::MiniConfig;
use crate::models::taesd::{Config, Taesd};
use crate::nn::Parameters;
use crate::train::ContactSheet;
use crate::{Result, ops};

/// Side of the squares that are cut out of the pictures: small ones give more different updates in the same time.
const CROP: usize = 64;
/// Noise on the latents while training: the decoder learns to take latents that are a little off, and the encoder to
/// spread its latents out, as far as the penalty lets it.
const LATENT_NOISE: f64 = 0.1;
/// The same where the decoder is trained by itself, on scaled latents.
const DECODER_NOISE: f64 = 0.05;
const LATENT_PENALTY: f64 = 2e-3;
/// Weight and side of the squares whose mean colour counts by itself. The absolute error alone lets a small network
/// settle in a state without one axis of colour, from which it does not come back.
const COLOUR_WEIGHT: f64 = 20.0;
const COLOUR_SQUARE: usize = 8;

/// Trains the autoencoder, then measures the scale and shift that bring its latents to mean 0 and variance 1.
///
/// The loss is the mean absolute error, plus half the squared error, plus the absolute error of the differences of
/// neighbouring pixels, which keeps edges sharp, plus the squared error of the mean colour of small squares.
///
/// # Errors
/// Those of [`train`].
pub fn autoencoder(options: &Options) -> Result<()> {
    let (workers, pool) = (options.workers()?, Pool::of(options)?);
    let parameters = Parameters::new();
    let weights = options.trainable(&parameters).pp("autoencoder");
    let config = MiniConfig::mini().autoencoder;
    let taesd = Taesd::load(&config, &weights)?;
    let recipe = Recipe {
        stage: "autoencoder",
        parameters: &parameters,
        batch: options.batch_or(16, 128),
        learning_rate: 2e-3,
        weight_decay: 1e-4,
        ema_decay: 0.995,
        mirror: None,
        constants: scale(1.0, 0.0)?,
    };
    train(options, &workers, &recipe, |micro| loss(options, &taesd, &pool, micro))?;

    let file = options.out.join("autoencoder.safetensors");
    let held_out = Pool::draw_held_out(options, 512)?;
    let (scaling_factor, shift) = measure(options, &taesd, &held_out)?;
    let mut tensors = load_tensors(&file)?;
    tensors.extend(scale(scaling_factor, shift)?);
    save_tensors(&file, &tensors)?;
    let taesd = Taesd::load(&Config { scaling_factor, shift, ..config }, &weights)?;
    save_png(&sheet(options, &taesd, &held_out)?, options.out.join("autoencoder.png"))
}

/// Trains the decoder further while the encoder stays as it is, so that the latents do, on which other stages are trained
/// by then: `autoencoder.safetensors` in, `decoder.safetensors` out, which holds the whole autoencoder.
///
/// # Errors
/// [`crate::Error::Io`] where the autoencoder's file is missing; those of [`train`].
pub fn decoder(options: &Options) -> Result<()> {
    let (workers, pool) = (options.workers()?, Pool::of(options)?);
    let (source, file) = (options.out.join("autoencoder.safetensors"), options.out.join("decoder.safetensors"));
    let mut tensors = load_tensors(&source)?;
    let constants = tensors.iter().filter(|(_, tensor)| tensor.elem_count() == 1);
    let constants = constants.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    if options.fresh || !file.exists() {
        tensors.remove(STEP);
        save_tensors(&file, &tensors)?;
    }
    let config = MiniConfig::mini();
    let frozen = config.load_autoencoder(&load_stages(options, &["autoencoder"])?)?;
    let parameters = Parameters::new();
    // The encoder's parameters have no gradients, so they keep their values.
    let weights = options.trainable(&parameters).pp("autoencoder");
    let Config { scaling_factor, shift, .. } = *frozen.config();
    let taesd = Taesd::load(&Config { scaling_factor, shift, ..config.autoencoder }, &weights)?;
    let recipe = Recipe {
        stage: "decoder",
        parameters: &parameters,
        batch: options.batch_or(16, 128),
        learning_rate: 1e-3,
        weight_decay: 0.0,
        ema_decay: 0.998,
        mirror: None,
        constants,
    };
    // What was copied is where this run starts, also when it starts again.
    let options = Options { fresh: false, ..options.clone() };
    train(&options, &workers, &recipe, |micro| {
        let images = crops(&pool, micro)?;
        let latents = ops::cast(&frozen.encode(&options.input(&images)?)?.detach(), DType::F32)?;
        let noise = (micro.noise("autoencoder noise", &latents.dims()[1..])? * DECODER_NOISE)?;
        let decoded = taesd.decode(&options.input(&(latents + noise)?)?)?;
        let (loss, parts) = reconstruction(&decoded, &images)?;
        Ok(Losses { loss, parts })
    })?;
    let held_out = Pool::draw_held_out(&options, 512)?;
    measure(&options, &taesd, &held_out)?;
    save_png(&sheet(&options, &taesd, &held_out)?, options.out.join("decoder.png"))
}

fn scale(scaling_factor: f64, shift: f64) -> Result<HashMap<String, Tensor>> {
    let number = |value: f64| Tensor::new(&[value as f32], &Device::Cpu);
    Ok(HashMap::from([
        ("autoencoder.scaling_factor".to_string(), number(scaling_factor)?),
        ("autoencoder.shift".to_string(), number(shift)?),
    ]))
}

/// Squares cut out of random portraits, `(samples, 3, CROP, CROP)`.
fn crops(pool: &Pool, micro: &MicroBatch) -> Result<Tensor> {
    let chosen = micro.each("autoencoder portrait", |address| address.rng().random_range(0..pool.len()));
    let pictures = pool.channels_last(&chosen)?;
    let mut rng = micro.address("autoencoder crop").sample(micro.samples.start).rng();
    let [x, y] = [2, 1].map(|dim| rng.random_range(0..=pictures.dims()[dim] - CROP));
    Ok(pictures.narrow(1, y, CROP)?.narrow(2, x, CROP)?.permute((0, 3, 1, 2))?.contiguous()?)
}

fn loss(options: &Options, taesd: &Taesd, pool: &Pool, micro: &MicroBatch) -> Result<Losses> {
    let images = crops(pool, micro)?;
    let latents = ops::cast(&taesd.encode(&options.input(&images)?)?, DType::F32)?;
    let noise = micro.noise("autoencoder noise", &latents.dims()[1..])?;
    // None at first, when the latents themselves are small.
    let strength = LATENT_NOISE * (4.0 * micro.progress).min(1.0);
    let decoded = taesd.decode(&options.input(&(&latents + (noise * strength)?)?)?)?;
    let penalty = latents.sqr()?.mean_all()?;
    let (loss, mut parts) = reconstruction(&decoded, &images)?;
    parts.push(("latents", penalty.detach().sqrt()?));
    Ok(Losses { loss: (loss + (penalty * LATENT_PENALTY)?)?, parts })
}

/// The loss of decoded pictures, and its parts.
fn reconstruction(decoded: &Tensor, images: &Tensor) -> Result<(Tensor, Vec<(&'static str, Tensor)>)> {
    let difference = (ops::cast(decoded, DType::F32)? - images)?;
    let (absolute, squared) = (difference.abs()?.mean_all()?, difference.sqr()?.mean_all()?);
    let edges = (edges(&difference, D::Minus1)? + edges(&difference, D::Minus2)?)?;
    let (count, side) = (images.dim(0)?, CROP / COLOUR_SQUARE);
    let squares = difference.reshape((count * 3, side, COLOUR_SQUARE, side, COLOUR_SQUARE))?;
    let colours = squares.mean(4)?.mean(2)?.sqr()?.mean_all()?;
    let parts = vec![("l1", absolute.detach()), ("mse", squared.detach()), ("colours", colours.detach())];
    let loss = ((absolute + (squared * 0.5)?)? + (edges * 0.5)?)?;
    Ok(((loss + (colours * COLOUR_WEIGHT)?)?, parts))
}

/// The mean absolute difference of neighbours along a dimension.
fn edges(x: &Tensor, dim: D) -> Result<Tensor> {
    let length = x.dim(dim)? - 1;
    Ok((x.narrow(dim, 1, length)? - x.narrow(dim, 0, length)?)?.abs()?.mean_all()?)
}

/// One over the standard deviation, and the mean, of the latents of some pictures; prints the errors of what is decoded
/// from them.
fn measure(options: &Options, taesd: &Taesd, pool: &Pool) -> Result<(f64, f64)> {
    let (mut total, mut errors, mut pieces) = ([0.0; 3], [0.0; 2], 0);
    for chosen in (0..pool.len()).collect::<Vec<_>>().chunks(32) {
        let images = pool.images(chosen)?;
        let latents = taesd.encode(&options.input(&images)?)?.detach();
        let difference = (taesd.decode(&latents)?.detach().to_dtype(DType::F64)? - images.to_dtype(DType::F64)?)?;
        let latents = latents.to_dtype(DType::F64)?;
        let number = |x: Tensor| -> Result<f64> { Ok(x.to_scalar::<f64>()?) };
        total[0] += latents.elem_count() as f64;
        total[1] += number(latents.sum_all()?)?;
        total[2] += number(latents.sqr()?.sum_all()?)?;
        errors[0] += number(difference.abs()?.mean_all()?)?;
        // Green against red and blue, of the mean colours of squares: the axis a poor autoencoder loses.
        let side = images.dim(2)? / COLOUR_SQUARE;
        let squares = difference.reshape((chosen.len() * 3, side, COLOUR_SQUARE, side, COLOUR_SQUARE))?;
        let squares = squares.mean(4)?.mean(2)?.reshape((chosen.len(), 3, side * side))?;
        let weights = Tensor::new(&[[[-0.5f64], [1.0], [-0.5]]], images.device())?;
        errors[1] += number(squares.broadcast_mul(&weights)?.sum(1)?.abs()?.mean_all()?)?;
        pieces += 1;
    }
    let mean = total[1] / total[0];
    let deviation = (total[2] / total[0] - mean * mean).max(0.0).sqrt();
    let [absolute, green] = errors.map(|error| error / f64::from(pieces.max(1)));
    println!(
        "autoencoder: {} held-out portraits: mean absolute error {absolute:.4}, of green against magenta in squares of \
         {COLOUR_SQUARE} pixels {green:.4}; latents of mean {mean:.4} and standard deviation {deviation:.4}",
        pool.len()
    );
    Ok((1.0 / deviation.max(1e-6), mean))
}

/// Pictures above, their reconstructions below.
fn sheet(options: &Options, taesd: &Taesd, pool: &Pool) -> Result<image::RgbImage> {
    let size = MiniConfig::mini().resolution as u32;
    let mut sheet = ContactSheet::new(size, size);
    for row in (0..pool.len()).collect::<Vec<_>>().chunks(8).take(2) {
        let decoded = taesd.decode(&taesd.encode(&options.input(&pool.images(row)?)?)?)?.detach();
        let decoded = decoded.to_dtype(DType::F32)?;
        let shown = row.iter().map(|i| Ok((pool.portraits[*i].prompt(), pool.picture(*i)?)));
        sheet.add_row(shown.collect::<Result<_>>()?)?;
        let reconstructed = (0..row.len()).map(|i| Ok((String::from("decoded"), from_tensor(&decoded.get(i)?)?)));
        sheet.add_row(reconstructed.collect::<Result<_>>()?)?;
    }
    Ok(sheet.render())
}

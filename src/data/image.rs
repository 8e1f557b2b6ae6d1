//! Pictures: from files to tensors and back.

use std::{
    fs,
    io::{Cursor, Write},
    path::{Path, PathBuf},
};

use ::image::{
    DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, Rgb, RgbImage,
    imageops::{self, FilterType},
    metadata::Orientation,
};
use candle_core::{DType, Device, Tensor};

use crate::random::Address;
use crate::{Error, Result};

/// The most pixels a picture may have: a square of 10,000.
pub const MAX_PIXELS: u64 = 100_000_000;
/// The longest side a picture may have.
const MAX_SIDE: u32 = 65_535;
/// The most bytes a decoded picture may take: 8 for each of [`MAX_PIXELS`], as 16-bit RGBA needs.
const MAX_BYTES: u64 = 8 * MAX_PIXELS;

/// Which square of a resized picture is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Crop {
    /// The middle.
    Center,
    /// A square whose place is drawn at the address.
    Random(Address),
}

fn unusable(path: &Path, reason: impl Into<String>) -> Error {
    Error::Image { path: path.to_path_buf(), reason: reason.into() }
}

/// Loads a PNG or JPEG picture as 8-bit RGB.
///
/// The format is decided by the content, not by the name. EXIF orientation is applied. Grey pictures get three equal
/// channels, 16-bit ones are rounded to 8 bits, and transparent ones are laid over white.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read; [`Error::Image`] if it is not a PNG or JPEG, is cut off or corrupt, or is
/// larger than [`MAX_PIXELS`].
pub fn load_image(path: impl AsRef<Path>) -> Result<RgbImage> {
    let path = path.as_ref();
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    if bytes.is_empty() {
        return Err(unusable(path, "the file is empty"));
    }
    let mut reader = ImageReader::new(Cursor::new(&bytes)).with_guessed_format().map_err(Error::io("read", path))?;
    if !matches!(reader.format(), Some(ImageFormat::Png | ImageFormat::Jpeg)) {
        return Err(unusable(path, "expected a PNG or JPEG picture, found something else"));
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let describe = |error: ImageError| match error {
        ImageError::Limits(limit) => unusable(path, format!("the picture is too large: {limit}")),
        other => unusable(path, format!("cut off or corrupt: {other}")),
    };
    let decoder = reader.into_decoder().map_err(describe)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 || pixels > MAX_PIXELS {
        return Err(unusable(path, format!("expected 1 to {MAX_PIXELS} pixels, found {width} x {height}")));
    }
    // Decoders trust the header when they reserve memory. Deflate packs at most 1,032 bytes into one (eight one-bit
    // pixels each), JPEG about 64 pixels into a bit or two: a header that promises far more than that lies.
    if pixels > bytes.len() as u64 * 10_000 {
        return Err(unusable(path, format!("cut off or corrupt: too short for the {width} x {height} pixels it promises")));
    }
    let picture = DynamicImage::from_decoder(decoder).map_err(describe)?;
    let mut picture = DynamicImage::ImageRgb8(over_white(picture));
    picture.apply_orientation(orientation(&bytes));
    Ok(picture.into_rgb8())
}

fn over_white(picture: DynamicImage) -> RgbImage {
    if !picture.color().has_alpha() {
        return picture.into_rgb8();
    }
    let rgba = picture.into_rgba8();
    RgbImage::from_fn(rgba.width(), rgba.height(), |x, y| {
        let [r, g, b, a] = rgba.get_pixel(x, y).0.map(u32::from);
        Rgb([r, g, b].map(|v| ((v * a + 255 * (255 - a) + 127) / 255) as u8))
    })
}

/// The EXIF orientation; unreadable EXIF data counts as none, for it says nothing about the picture.
fn orientation(bytes: &[u8]) -> Orientation {
    exif::Reader::new()
        .read_from_container(&mut Cursor::new(bytes))
        .ok()
        .and_then(|data| data.get_field(exif::Tag::Orientation, exif::In::PRIMARY)?.value.get_uint(0))
        .and_then(|value| Orientation::from_exif(u8::try_from(value).ok()?))
        .unwrap_or(Orientation::NoTransforms)
}

/// Resizes a picture so that its short side is `size` pixels, the aspect kept, then cuts a square of `size` out of it.
///
/// Only the square that is kept is ever resized, so extreme aspect ratios cost no extra memory.
pub fn resize_and_crop(picture: &RgbImage, size: u32, crop: Crop) -> RgbImage {
    let size = size.max(1);
    let (width, height) = picture.dimensions();
    if width == 0 || height == 0 {
        return RgbImage::new(size, size);
    }
    let side = width.min(height);
    let spare = (width - side).max(height - side);
    let offset = match crop {
        Crop::Center => spare / 2,
        Crop::Random(address) => (address.uniform() * f64::from(spare + 1)) as u32,
    }
    .min(spare);
    let (x, y) = if width > height { (offset, 0) } else { (0, offset) };
    if side == size {
        return imageops::crop_imm(picture, x, y, side, side).to_image();
    }
    // A huge picture is first averaged over whole blocks: the good filter works in f32 and would take 12 bytes a pixel.
    let factor = side / (4 * size);
    let square = if factor >= 2 { block_mean(picture, x, y, side, factor) } else { imageops::crop_imm(picture, x, y, side, side).to_image() };
    imageops::resize(&square, size, size, if side > size { FilterType::Lanczos3 } else { FilterType::CatmullRom })
}

fn block_mean(picture: &RgbImage, x: u32, y: u32, side: u32, factor: u32) -> RgbImage {
    let blocks = side / factor;
    let count = factor * factor;
    RgbImage::from_fn(blocks, blocks, |bx, by| {
        // Blocks are spread over the whole side, so nothing is cut off where it is no multiple of the factor.
        let start = |b: u32| (u64::from(b) * u64::from(side - factor) / u64::from((blocks - 1).max(1))) as u32;
        let mut sum = [0u32; 3];
        for dy in 0..factor {
            for dx in 0..factor {
                let pixel = picture.get_pixel(x + start(bx) + dx, y + start(by) + dy).0;
                for (total, value) in sum.iter_mut().zip(pixel) {
                    *total += u32::from(value);
                }
            }
        }
        Rgb(sum.map(|total| ((total + count / 2) / count) as u8))
    })
}

/// A picture as an f32 tensor of shape `(3, height, width)` with values in `[-1, 1]`.
///
/// # Errors
/// Where the device cannot hold the tensor.
pub fn to_tensor(picture: &RgbImage, device: &Device) -> Result<Tensor> {
    let (width, height) = picture.dimensions();
    let pixels = width as usize * height as usize;
    let mut values = vec![0.0f32; 3 * pixels];
    for (i, pixel) in picture.pixels().enumerate() {
        for (channel, &value) in pixel.0.iter().enumerate() {
            values[channel * pixels + i] = f32::from(value) / 127.5 - 1.0;
        }
    }
    Ok(Tensor::from_vec(values, (3, height as usize, width as usize), device)?)
}

/// The picture of a tensor of shape `(3, height, width)` or `(1, 3, height, width)`, any float dtype, in `[-1, 1]`;
/// values outside are clamped.
///
/// # Errors
/// [`Error::Argument`] for other shapes.
pub fn from_tensor(tensor: &Tensor) -> Result<RgbImage> {
    let wrong = || Error::argument("from_tensor", "tensor", "shape (3, height, width)", format!("{:?}", tensor.dims()));
    let tensor = if tensor.rank() == 4 && tensor.dim(0)? == 1 { tensor.squeeze(0)? } else { tensor.clone() };
    let &[3, height, width] = tensor.dims() else { return Err(wrong()) };
    let values = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let pixels = height * width;
    let mut picture = RgbImage::new(width as u32, height as u32);
    for (i, pixel) in picture.pixels_mut().enumerate() {
        // A cast from a float saturates, and takes NaN to 0.
        pixel.0 = [0, 1, 2].map(|channel| ((values[channel * pixels + i] + 1.0) * 127.5 + 0.5) as u8);
    }
    Ok(picture)
}

/// Writes a file in one go: its folders are created, the bytes go to a temporary file beside it, which then takes its
/// name. Whoever reads it sees the old file or the whole new one.
pub(super) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::io("create the folder", parent))?;
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary: PathBuf = parent.join(format!(".{name}.{}.tmp", std::process::id()));
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // What could not be written whole must not stay; the error that matters is the first one.
        let _ = fs::remove_file(&temporary);
        Error::Io { action: "write", path: path.to_path_buf(), source }
    })
}

/// Writes a picture as PNG, creating folders as needed; the file appears whole or not at all.
///
/// # Errors
/// [`Error::Io`] where the folder or file cannot be written; [`Error::Image`] for a picture without pixels.
pub fn save_png(picture: &RgbImage, path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).map_err(|error| unusable(path, error.to_string()))?;
    write_atomic(path, bytes.get_ref())
}

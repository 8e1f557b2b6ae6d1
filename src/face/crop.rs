//! The aligned crop of a face, differentiable in the pixels.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{Landmarks, Similarity, Template};
use crate::models::{image_dims, to_channels_first, to_channels_last};
use crate::ops;
use crate::{Error, Result};

/// How an aligned crop is made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CropOptions {
    /// Width and height of the crop.
    pub size: usize,
    /// How tightly the face is framed.
    pub template: Template,
    /// Whether a face much larger than the crop is made smaller with a filter before the warp, which reads only four
    /// pixels for each one of the crop. The paper's authors do not filter; then the crop of a large face depends, and
    /// passes a gradient, on few of its pixels.
    pub antialias: bool,
}

impl CropOptions {
    /// ArcFace's template, with antialiasing.
    pub fn new(size: usize) -> Self {
        CropOptions { size, template: Template::ArcFace, antialias: true }
    }
}

/// [`aligned_crop_with`] ArcFace's template and antialiasing.
///
/// # Errors
/// As there.
pub fn aligned_crop(images: &Tensor, landmarks: &[Landmarks], size: usize) -> Result<Tensor> {
    aligned_crop_with(images, landmarks, &CropOptions::new(size))
}

/// Cuts one face out of each of the images `(batch, 3, height, width)`, turned and scaled so that its landmarks, given
/// in pixels, lie on the template in the least-squares sense: `(batch, 3, size, size)`. What lies outside the image is
/// 0, mid grey. Differentiable in the pixels; the landmarks are constants.
///
/// As kornia's `warp_affine(align_corners=True)` with bilinear interpolation, which the paper's authors use, plus the
/// antialiasing.
///
/// # Errors
/// [`Error::Argument`] where there are not as many faces as images, or the landmarks of one are degenerate.
pub fn aligned_crop_with(images: &Tensor, landmarks: &[Landmarks], options: &CropOptions) -> Result<Tensor> {
    let (batch, height, width) = image_dims("aligned_crop", images)?;
    if landmarks.len() != batch {
        let expected = format!("{batch}, one for each image");
        return Err(Error::argument("aligned_crop", "landmarks", expected, format!("{}", landmarks.len())));
    }
    if options.size == 0 {
        return Err(Error::argument("aligned_crop", "size", "at least 1", "0"));
    }
    let template = options.template.landmarks(options.size);
    let mut crops = Vec::with_capacity(batch);
    for face in landmarks {
        // From a pixel of the crop to where it is read in the image.
        let to_image = Similarity::fit(face, &template)?.inverse();
        let factor = if options.antialias { to_image.scale().round().max(1.0) } else { 1.0 };
        let reduced = |side: usize| ((side as f64 / factor).round() as usize).max(1);
        crops.push((to_image, reduced(height), reduced(width)));
    }
    let warp = |x: &Tensor, crops: &[(Similarity, usize, usize)]| -> Result<Tensor> {
        let (_, reduced_height, reduced_width) = crops[0]; // never empty: `image_dims` refuses an empty batch
        let x = match (reduced_height, reduced_width) == (height, width) {
            true => x.clone(),
            false => ops::resize_bilinear(x, reduced_height, reduced_width, true)?,
        };
        let ratios = [reduced_width as f64 / width as f64, reduced_height as f64 / height as f64];
        let matrices: Vec<_> = crops.iter().map(|(to_image, ..)| in_resized(to_image, ratios)).collect();
        ops::warp_affine(&x, &matrices, options.size, options.size)
    };
    let x = to_channels_last(images)?;
    let faces = match crops.iter().all(|crop| (crop.1, crop.2) == (crops[0].1, crops[0].2)) {
        true => warp(&x, &crops)?,
        false => {
            let samples = ops::split_samples(&x)?;
            let each = samples.iter().zip(&crops).map(|(x, crop)| warp(x, std::slice::from_ref(crop)));
            ops::join_samples(&each.collect::<Result<Vec<_>>>()?)?
        }
    };
    to_channels_first(&faces)
}

/// The matrix of a map into an image, for the same image resized by `ratios` (x before y). A pixel's centre lies half
/// a pixel inside its edge, at any size.
fn in_resized(to_image: &Similarity, ratios: [f64; 2]) -> [[f64; 3]; 2] {
    let [x, y] = to_image.matrix();
    let resize = |[a, b, t]: [f64; 3], ratio: f64| [a * ratio, b * ratio, (t + 0.5) * ratio - 0.5];
    [resize(x, ratios[0]), resize(y, ratios[1])]
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::autograd::{check_gradients, tape};
    use crate::face::ARCFACE_TEMPLATE;
    use crate::random::Address;

    /// Landmarks turned by `angle`, `scale` times the size of the template for `size` pixels, around `[x, y]`.
    fn face(size: usize, angle: f64, scale: f64, [x, y]: [f64; 2]) -> Landmarks {
        let middle = size as f64 / 2.0;
        let map = Similarity { a: scale * angle.cos(), b: scale * angle.sin(), tx: x, ty: y };
        Template::ArcFace.landmarks(size).map(|[u, v]| map.apply([u - middle, v - middle]))
    }

    /// An image whose first two channels are each pixel's coordinates, scaled to stay below one.
    fn coordinates(height: usize, width: usize) -> Result<Tensor> {
        let value = |i: usize| {
            let (channel, y, x) = (i / (height * width), i / width % height, i % width);
            [x as f64, y as f64, 1.0][channel] / 1000.0
        };
        let values: Vec<f64> = (0..3 * height * width).map(value).collect();
        Ok(Tensor::from_vec(values, (1, 3, height, width), &Device::Cpu)?)
    }

    #[test]
    fn landmarks_of_the_image_land_on_the_template() -> Result<()> {
        let size = 28;
        // From as large as the crop to four times as large, where the image is reduced first: by 2, 3 and 4, which
        // divide its sides, as only then the filter keeps linear colours exactly.
        for (angle, scale) in [(0.0, 1.0), (0.4, 1.2), (-0.7, 1.7), (0.2, 3.0), (0.3, 4.2)] {
            let points = face(size, angle, scale, [101.0, 95.0]);
            for antialias in [false, true] {
                let options = CropOptions { antialias, ..CropOptions::new(size) };
                let crop = aligned_crop_with(&coordinates(204, 216)?, &[points], &options)?;
                // Colours that are linear in the coordinates survive every interpolation: each pixel of the crop names
                // the point of the image it shows.
                let map = Similarity::fit(&Template::ArcFace.landmarks(size), &points)?;
                let crop = crop.get(0)?.to_vec3::<f64>()?;
                for (y, x) in [(0, 0), (0, 27), (13, 14), (20, 3), (27, 27)] {
                    let [u, v] = map.apply([x as f64, y as f64]);
                    let (found_u, found_v) = (crop[0][y][x] * 1000.0, crop[1][y][x] * 1000.0);
                    assert!((found_u - u).abs() < 1e-6 && (found_v - v).abs() < 1e-6, "{u} {v}: {found_u} {found_v}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_face_that_lies_on_the_template_is_copied() -> Result<()> {
        let image = Address::new(1, "image").normal((1, 3, 112, 112), DType::F32, &Device::Cpu)?;
        let crop = aligned_crop(&image, &[ARCFACE_TEMPLATE], 112)?;
        assert!((crop - image)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-4);
        Ok(())
    }

    #[test]
    fn antialiasing_averages_what_point_sampling_misses() -> Result<()> {
        // A checkerboard of single pixels is grey from afar.
        let values: Vec<f32> = (0..3 * 128 * 128).map(|i| if (i / 128 + i) % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let image = Tensor::from_vec(values, (1, 3, 128, 128), &Device::Cpu)?;
        let points = face(16, 0.0, 4.0, [64.0, 64.0]);
        let largest = |antialias: bool| -> Result<f32> {
            let options = CropOptions { antialias, ..CropOptions::new(16) };
            Ok(aligned_crop_with(&image, &[points], &options)?.abs()?.max_all()?.to_scalar()?)
        };
        assert!(largest(false)? > 0.9 && largest(true)? < 0.1);
        Ok(())
    }

    #[test]
    fn the_gradient_of_the_crop_into_the_pixels_is_exact() -> Result<()> {
        let images = Address::new(1, "image").normal((2, 3, 9, 8), DType::F64, &Device::Cpu)?;
        // One face as large as the crop, one twice as large and partly outside.
        let faces = [face(4, 0.3, 1.1, [4.0, 4.0]), face(4, -0.2, 2.1, [3.0, 6.0])];
        for antialias in [false, true] {
            let options = CropOptions { antialias, ..CropOptions::new(4) };
            let check = check_gradients(std::slice::from_ref(&images), |x| {
                Ok(vec![aligned_crop_with(&x[0], &faces, &options)?])
            })?;
            assert!(check.worst() < 1e-8 && check.norms[0] > 1.0, "{check:?}");
            // Two samples of one size, and of two, stay on a tape.
            tape::record(&[Var::from_tensor(&images)?.into_inner()], |x| {
                Ok(vec![aligned_crop_with(&x[0], &faces, &options)?])
            })?;
        }
        Ok(())
    }

    #[test]
    fn faces_that_do_not_fit_the_batch_and_degenerate_ones_are_refused() -> Result<()> {
        let images = Tensor::zeros((2, 3, 8, 8), DType::F32, &Device::Cpu)?;
        for faces in [vec![ARCFACE_TEMPLATE], vec![ARCFACE_TEMPLATE, [[1.0, 1.0]; 5]]] {
            assert!(matches!(aligned_crop(&images, &faces, 8), Err(Error::Argument { .. })));
        }
        Ok(())
    }
}

//! What a network must do to tell persons apart.

use candle_core::Tensor;

use super::image_dims;
use crate::{Error, Result, ops};

pub(crate) use crate::ops::unit_vectors as normalise;

/// A network that maps a face to a vector of unit length, near those of the same person (ArcFace and its kin).
pub trait IdentityNetwork: Send + Sync {
    /// Embeds aligned crops `(batch, 3, crop_size, crop_size)`, RGB in `[-1, 1]`, as
    /// [`aligned_crop`](crate::face::aligned_crop) makes them, to `(batch, dimension)`, of unit length, in f32 where the
    /// network computes in bf16 or f16. Differentiable in the pixels.
    ///
    /// # Errors
    /// Where the shape is another.
    fn embed(&self, faces: &Tensor) -> Result<Tensor>;

    /// Width and height of the crops.
    fn crop_size(&self) -> usize;

    /// Length of an embedding.
    fn dimension(&self) -> usize;
}

/// `(batch, ...)` as `(batch, numbers)`.
pub(crate) fn flat(x: &Tensor) -> Result<Tensor> {
    let batch = x.dims().first().copied().unwrap_or(1);
    ops::reshape(x, (batch, x.elem_count() / batch.max(1)))
}

/// Refuses crops of another shape than `(batch, 3, size, size)`.
pub(crate) fn check_faces(function: &'static str, faces: &Tensor, size: usize) -> Result<()> {
    let (_, height, width) = image_dims(function, faces)?;
    if (height, width) != (size, size) {
        let expected = format!("(batch, 3, {size}, {size})");
        return Err(Error::argument(function, "faces", expected, format!("{:?}", faces.dims())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::autograd::{tape, taped};
    use crate::models::{ir_resnet, iresnet, mini_identity, mobile_face_net, sface};
    use crate::nn::{Parameters, Weights};
    use crate::random::Address;

    /// Weights at random that are no variables.
    fn load<T>(load: impl Fn(&Weights) -> Result<T>) -> Result<T> {
        let parameters = Parameters::new();
        load(&Weights::trainable(&parameters, 5, DType::F64, &Device::Cpu))?;
        let tensors = parameters.all().into_iter().map(|(name, value)| (name, value.as_detached_tensor())).collect();
        load(&Weights::frozen("random", tensors))
    }

    /// Small ones of every kind.
    fn networks() -> Result<Vec<Box<dyn IdentityNetwork>>> {
        let widths = vec![4, 4, 6];
        let small = ir_resnet::Config {
            crop_size: 16,
            input_width: 4,
            widths,
            blocks: vec![1, 2, 1],
            se_reduction: Some(2),
            dimension: 5,
            affine_output: true,
        };
        let plain = ir_resnet::Config { se_reduction: None, affine_output: false, ..small.clone() };
        let arcface = iresnet::Config { crop_size: 16, widths: [4, 4, 6, 6], layers: [1, 2, 1, 1], dimension: 5 };
        let stage = |blocks, stride| mobile_face_net::Stage { expansion: 6, width: 4, blocks, stride };
        let mobile = mobile_face_net::Config {
            crop_size: 16,
            input_width: 4,
            stages: vec![stage(1, 2), stage(2, 1)],
            dimension: 5,
            ..mobile_face_net::Config::fr_feature()
        };
        let sface =
            sface::Config { crop_size: 16, input_width: 4, widths: vec![4, 6], strides: vec![1, 2], dimension: 5 };
        let mini = mini_identity::Config { crop_size: 16, widths: vec![8, 8], group_width: 4, dimension: 5 };
        Ok(vec![
            Box::new(load(|weights| ir_resnet::IrResnet::load(&small, weights))?),
            Box::new(load(|weights| ir_resnet::IrResnet::load(&plain, weights))?),
            Box::new(load(|weights| iresnet::IResnet::load(&arcface, weights))?),
            Box::new(load(|weights| mobile_face_net::MobileFaceNet::load(&mobile, weights))?),
            Box::new(load(|weights| sface::SFace::load(&sface, weights))?),
            Box::new(load(|weights| mini_identity::MiniIdentity::load(&mini, weights))?),
        ])
    }

    #[test]
    fn every_network_stays_on_a_tape_and_has_the_gradient_it_has_in_candles_graph() -> Result<()> {
        for network in networks()? {
            let network: std::sync::Arc<dyn IdentityNetwork> = network.into();
            let size = network.crop_size();
            let faces = Address::new(5, "faces").normal((2, 3, size, size), DType::F64, &Device::Cpu)?;
            let faces = Var::from_tensor(&(faces * 0.3)?)?;
            tape::record(&[faces.as_tensor().clone()], |faces| Ok(vec![network.embed(&faces[0])?]))?;
            let direction = Address::new(5, "direction").normal((2, 5), DType::F64, &Device::Cpu)?;
            let gradient = |embedded: Tensor| -> Result<Tensor> {
                let store = (embedded * &direction)?.sum_all()?.backward()?;
                Ok(store.get(&faces).cloned().unwrap_or(faces.zeros_like()?))
            };
            let plain = gradient(network.embed(&faces)?)?;
            let inside = network.clone();
            let taped = taped(&[faces.as_tensor()], move |faces| Ok(vec![inside.embed(&faces[0])?]))?;
            let difference = (gradient(taped[0].clone())? - &plain)?.abs()?.max_all()?.to_scalar::<f64>()?;
            let size = plain.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(size > 1e-4 && difference <= 1e-11 * size, "{difference} of {size}");
        }
        Ok(())
    }
}

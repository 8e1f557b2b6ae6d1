//! The identity loss: one minus the cosine between the face embeddings of preview and conditioning image.

use std::sync::Arc;

use candle_core::{D, Tensor};

use super::{ImageLoss, LossValue};
use crate::Result;
use crate::face::{Landmarks, aligned_crop};
use crate::models::face_locator::FaceLocator;
use crate::models::identity::IdentityNetwork;

/// `mean(1 - <f(crop(preview)), f(crop(I_c))>)` over the samples in which both images show a face.
///
/// The face is found without gradient and cut out by a differentiable affine warp onto the template the identity
/// network was trained with. Samples without a face in either image are skipped.
pub struct IdentityLoss {
    network: Arc<dyn IdentityNetwork>,
    locator: Arc<dyn FaceLocator>,
}

impl IdentityLoss {
    /// An identity loss with a recognition network and a detector, both supplied by the caller.
    pub fn new(network: Arc<dyn IdentityNetwork>, locator: Arc<dyn FaceLocator>) -> Self {
        IdentityLoss { network, locator }
    }

    /// The L2-normalised face embeddings, `(faces, dimension)`, of the images in which a face is found, and which
    /// images those are.
    ///
    /// `images`: `(batch, 3, height, width)`, RGB in [-1, 1].
    ///
    /// # Errors
    /// Those of the networks.
    pub fn embed(&self, images: &Tensor) -> Result<(Option<Tensor>, Vec<usize>)> {
        let located = self.locator.locate(&images.detach())?;
        let found: Vec<(usize, Landmarks)> =
            located.into_iter().enumerate().filter_map(|(i, landmarks)| Some((i, landmarks?))).collect();
        let (indices, landmarks): (Vec<usize>, Vec<Landmarks>) = found.into_iter().unzip();
        Ok((self.embed_at(images, &indices, &landmarks)?, indices))
    }

    fn embed_at(&self, images: &Tensor, indices: &[usize], landmarks: &[Landmarks]) -> Result<Option<Tensor>> {
        if indices.is_empty() {
            return Ok(None);
        }
        let faces = aligned_crop(&select(images, indices)?, landmarks, self.network.crop_size())?;
        Ok(Some(self.network.embed(&faces)?))
    }
}

/// The samples at these indices.
fn select(images: &Tensor, indices: &[usize]) -> Result<Tensor> {
    if indices.iter().copied().eq(0..images.dim(0)?) {
        return Ok(images.clone());
    }
    let samples: Vec<Tensor> = indices.iter().map(|i| images.narrow(0, *i, 1)).collect::<candle_core::Result<_>>()?;
    Ok(Tensor::cat(&samples, 0)?)
}

impl ImageLoss for IdentityLoss {
    fn name(&self) -> &str {
        "identity"
    }

    fn loss(&self, previews: &Tensor, conditioning_images: &Tensor) -> Result<LossValue> {
        let conditioning_images = conditioning_images.detach();
        let preview_faces = self.locator.locate(&previews.detach())?;
        let reference_faces = self.locator.locate(&conditioning_images)?;
        let (mut indices, mut in_previews, mut in_references) = (Vec::new(), Vec::new(), Vec::new());
        for (i, pair) in preview_faces.into_iter().zip(reference_faces).enumerate() {
            if let (Some(preview), Some(reference)) = pair {
                indices.push(i);
                in_previews.push(preview);
                in_references.push(reference);
            }
        }
        let embedded = self.embed_at(previews, &indices, &in_previews)?;
        let target = self.embed_at(&conditioning_images, &indices, &in_references)?;
        match (embedded, target) {
            (Some(embedded), Some(target)) => {
                let cosine = (embedded * target.detach())?.sum(D::Minus1)?;
                Ok(LossValue { loss: (1.0 - cosine)?.mean_all()?, counted: indices.len() })
            }
            _ => Ok(LossValue { loss: Tensor::zeros((), previews.dtype(), previews.device())?, counted: 0 }),
        }
    }
}

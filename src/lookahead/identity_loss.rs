//! The identity loss: one minus the cosine between the face embeddings of preview and conditioning image.

use std::sync::Arc;

use candle_core::{D, Tensor};

use super::{ImageLoss, LossValue};
use crate::autograd::taped;
use crate::face::{Landmarks, aligned_crop};
use crate::models::face_locator::FaceLocator;
use crate::models::identity::IdentityNetwork;
use crate::{Result, ops};

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

    /// On a tape, where crop and network are to be differentiated: the network has hundreds of small operations.
    fn embed_at(&self, images: &Tensor, indices: &[usize], landmarks: &[Landmarks]) -> Result<Option<Tensor>> {
        if indices.is_empty() {
            return Ok(None);
        }
        let (network, indices, landmarks) = (self.network.clone(), indices.to_vec(), landmarks.to_vec());
        let mut embedded = taped(&[images], move |images| {
            let images = ops::select_samples(&images[0], &indices)?;
            Ok(vec![network.embed(&aligned_crop(&images, &landmarks, network.crop_size())?)?])
        })?;
        Ok(embedded.pop())
    }
}

impl ImageLoss for IdentityLoss {
    fn name(&self) -> &str {
        "identity"
    }

    fn loss(&self, previews: &Tensor, conditioning_images: &Tensor) -> Result<LossValue> {
        // The target first: it does not have to wait for where faces are in the previews.
        let (target, in_references) = self.embed(&conditioning_images.detach())?;
        let none = || Ok(LossValue { loss: Tensor::zeros((), previews.dtype(), previews.device())?, counted: 0 });
        let Some(target) = target else { return none() };
        let located = self.locator.locate(&previews.detach())?;
        let (mut indices, mut landmarks, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (i, face) in located.into_iter().enumerate() {
            if let (Some(face), Some(place)) = (face, in_references.iter().position(|reference| *reference == i)) {
                indices.push(i);
                landmarks.push(face);
                places.push(place);
            }
        }
        let Some(embedded) = self.embed_at(previews, &indices, &landmarks)? else { return none() };
        let cosine = (embedded * ops::select_samples(&target.detach(), &places)?)?.sum(D::Minus1)?;
        Ok(LossValue { loss: (1.0 - cosine)?.mean_all()?, counted: indices.len() })
    }
}

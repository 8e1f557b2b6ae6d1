//! Face networks beside a base of another type.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::Result;
use crate::face::Landmarks;
use crate::models::face_locator::FaceLocator;
use crate::models::identity::IdentityNetwork;

/// What the face networks of a base of this type compute in: half precision is too coarse to place landmarks and to
/// compare embeddings, and they are small.
pub(super) fn face_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// An identity network that takes pictures of any type. Embeddings are of its own type.
pub(super) struct AnyTypeIdentity {
    pub network: Arc<dyn IdentityNetwork>,
    pub dtype: DType,
}

impl IdentityNetwork for AnyTypeIdentity {
    fn embed(&self, faces: &Tensor) -> Result<Tensor> {
        self.network.embed(&faces.to_dtype(self.dtype)?)
    }

    fn crop_size(&self) -> usize {
        self.network.crop_size()
    }

    fn dimension(&self) -> usize {
        self.network.dimension()
    }
}

/// A face locator that takes pictures of any type.
pub(super) struct AnyTypeLocator<L> {
    pub locator: L,
    pub dtype: DType,
}

impl<L: FaceLocator> FaceLocator for AnyTypeLocator<L> {
    fn locate(&self, images: &Tensor) -> Result<Vec<Option<Landmarks>>> {
        self.locator.locate(&images.detach().to_dtype(self.dtype)?)
    }
}

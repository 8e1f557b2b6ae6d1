//! Networks that take memory only while they work.

use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;

use super::clip_text::TextEmbeddings;
use super::roles::{ImageEncoder, TextEncoder};
use crate::Result;

/// A network that is opened each time it is used, and let go of afterwards.
///
/// While a picture is drawn the encoders of text and images have nothing to do, but of SDXL's 9.5 GB in half precision
/// they are 2.9 GB. From files that the operating system holds in memory they are opened in some tenths of a second.
/// [`Base::sdxl_lean`](crate::Base::sdxl_lean) is made with it.
pub struct OnDemand<N> {
    open: Box<dyn Fn() -> Result<N> + Send + Sync>,
    /// What an image encoder says of no image, once it was asked.
    null_features: Mutex<Option<Tensor>>,
}

impl<N> OnDemand<N> {
    /// A network that `open` opens.
    pub fn new(open: impl Fn() -> Result<N> + Send + Sync + 'static) -> Self {
        OnDemand { open: Box::new(open), null_features: Mutex::new(None) }
    }
}

impl<N: TextEncoder> TextEncoder for OnDemand<N> {
    fn encode(&self, prompts: &[String]) -> Result<TextEmbeddings> {
        (self.open)()?.encode(prompts)
    }

    fn encode_batches(&self, batches: &[&[String]]) -> Result<Vec<TextEmbeddings>> {
        (self.open)()?.encode_batches(batches)
    }
}

impl<N: ImageEncoder> OnDemand<N> {
    /// The null features, kept, of the network where they are not known yet.
    fn kept_null_features(&self, network: impl FnOnce() -> Result<N>) -> Result<Tensor> {
        let mut kept = self.null_features.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(features) => Ok(features.clone()),
            None => Ok(kept.insert(network()?.null_features()?.detach()).clone()),
        }
    }
}

impl<N: ImageEncoder> ImageEncoder for OnDemand<N> {
    fn features(&self, images: &Tensor) -> Result<Tensor> {
        let network = (self.open)()?;
        let features = network.features(images)?;
        // Who asks for one asks for the other: it is opened once for both.
        self.kept_null_features(|| Ok(network))?;
        Ok(features)
    }

    fn null_features(&self) -> Result<Tensor> {
        self.kept_null_features(&self.open)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use candle_core::{DType, Device};

    use super::*;

    /// Counts how many there are.
    struct Counted(Arc<[AtomicUsize; 2]>);

    impl Counted {
        fn open(counts: &Arc<[AtomicUsize; 2]>) -> Self {
            counts.iter().for_each(|count| _ = count.fetch_add(1, Ordering::Relaxed));
            Counted(counts.clone())
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0[0].fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl ImageEncoder for Counted {
        fn features(&self, images: &Tensor) -> Result<Tensor> {
            Ok(images.clone())
        }

        fn null_features(&self) -> Result<Tensor> {
            Ok(Tensor::zeros((1, 2), DType::F32, &Device::Cpu)?)
        }
    }

    impl TextEncoder for Counted {
        fn encode(&self, prompts: &[String]) -> Result<TextEmbeddings> {
            let hidden_states = Tensor::zeros((prompts.len(), 1, 1), DType::F32, &Device::Cpu)?;
            Ok(TextEmbeddings { pooled: hidden_states.squeeze(1)?, hidden_states })
        }
    }

    #[test]
    fn it_is_opened_once_for_an_image_and_no_image_and_let_go_of() -> Result<()> {
        let counts = Arc::new([const { AtomicUsize::new(0) }; 2]);
        let counted = counts.clone();
        let encoder = OnDemand::new(move || Ok(Counted::open(&counted)));
        let now = || [0, 1].map(|i| counts[i].load(Ordering::Relaxed));
        assert_eq!(now(), [0, 0]);
        let image = Tensor::ones((1, 2), DType::F32, &Device::Cpu)?;
        assert_eq!(encoder.features(&image)?.to_vec2::<f32>()?, [[1.0, 1.0]]);
        assert_eq!(encoder.null_features()?.to_vec2::<f32>()?, [[0.0, 0.0]]);
        assert_eq!(now(), [0, 1]);
        let prompts = ["a".to_string(), "b".to_string()];
        let texts = encoder.encode_batches(&[&prompts, &prompts[..1]])?;
        assert_eq!(texts.iter().map(|text| text.pooled.dims()[0]).collect::<Vec<_>>(), [2, 1]);
        assert_eq!(now(), [0, 2]);
        Ok(())
    }
}

//! Dropping of conditions while training: reference tokens, image tokens, text.

use candle_core::Tensor;
use rand::Rng;

use crate::Result;
use crate::models::unet::Conditioning;
use crate::random::Address;

/// Drops each reference token with a probability, independently in every block, the same ones for all samples of the
/// batch and for key and value (official code: `kv_drop_chance`). Probability 1 leaves none: plain self-attention.
#[derive(Clone, Copy, Debug)]
pub struct ReferenceDropout {
    /// Of each token, 0 to 1.
    pub probability: f64,
    /// Where it is drawn.
    pub address: Address,
}

impl ReferenceDropout {
    /// The indices that are kept of so many tokens of a block; `block`: its place among the recorded ones in the order of
    /// their names.
    pub fn kept(&self, block: usize, tokens: usize) -> Vec<u32> {
        let mut rng = self.address.sample(block).rng();
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        (0..tokens).filter(|_| rng.random::<f64>() >= self.probability).collect()
    }
}

/// Replaces the image tokens of each sample by the unconditional ones with a probability (official code:
/// `adapter_drop_chance`).
///
/// `tokens`: `(batch, tokens, width)`; `unconditional`: `(1, tokens, width)` or of the batch.
///
/// # Errors
/// [`crate::Error::Candle`] where the shapes do not fit.
pub fn drop_image_tokens(
    tokens: &Tensor,
    unconditional: &Tensor,
    probability: f64,
    address: Address,
) -> Result<Tensor> {
    let batch = tokens.dim(0)?;
    let dropped = dropped_samples(batch, probability, address);
    if !dropped.contains(&true) {
        return Ok(tokens.clone());
    }
    let samples = (0..batch)
        .map(|i| match dropped[i] {
            true => unconditional.narrow(0, if unconditional.dim(0)? == 1 { 0 } else { i }, 1),
            false => tokens.narrow(0, i, 1),
        })
        .collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&samples, 0)?)
}

/// Replaces the text of each sample by no text (zero embeddings) with a probability. The official code has this option,
/// `text_drop_chance`, but there it cannot work.
///
/// # Errors
/// [`crate::Error::Candle`] where memory is out.
pub fn drop_text(conditioning: &Conditioning, probability: f64, address: Address) -> Result<Conditioning> {
    let dropped = dropped_samples(conditioning.batch(), probability, address);
    if !dropped.contains(&true) {
        return Ok(conditioning.clone());
    }
    let keep: Vec<f64> = dropped.iter().map(|dropped| if *dropped { 0.0 } else { 1.0 }).collect();
    let (dtype, device) = (conditioning.pooled.dtype(), conditioning.pooled.device());
    let keep = Tensor::new(keep, device)?.to_dtype(dtype)?;
    Ok(Conditioning {
        hidden_states: conditioning.hidden_states.broadcast_mul(&keep.reshape(((), 1, 1))?)?,
        pooled: conditioning.pooled.broadcast_mul(&keep.reshape(((), 1))?)?,
        time_ids: conditioning.time_ids.clone(),
    })
}

fn dropped_samples(batch: usize, probability: f64, address: Address) -> Vec<bool> {
    (0..batch).map(|i| address.sample(i).uniform() < probability).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn reference_tokens_are_dropped_at_the_rate_asked_and_differently_in_every_block() {
        let dropout = ReferenceDropout { probability: 0.25, address: Address::new(0, "kv") };
        let kept = dropout.kept(0, 400);
        assert!((kept.len() as f64 / 400.0 - 0.75).abs() < 0.08, "{}", kept.len());
        assert!(kept.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(kept, dropout.kept(0, 400));
        assert_ne!(kept, dropout.kept(1, 400));
        assert!(ReferenceDropout { probability: 1.0, ..dropout }.kept(0, 400).is_empty());
    }

    #[test]
    fn text_and_image_tokens_are_dropped_sample_by_sample() -> Result<()> {
        let ones = Tensor::ones((200, 2, 3), DType::F32, &Device::Cpu)?;
        let conditioning = Conditioning::square(ones.clone(), ones.narrow(1, 0, 1)?.squeeze(1)?, 128);
        let dropped = drop_text(&conditioning, 0.3, Address::new(0, "text"))?;
        let means: Vec<f32> = dropped.hidden_states.mean((1, 2))?.to_vec1()?;
        assert!(means.iter().all(|mean| *mean == 0.0 || *mean == 1.0));
        let share = means.iter().filter(|mean| **mean == 0.0).count() as f64 / 200.0;
        assert!((share - 0.3).abs() < 0.1, "{share}");
        let unconditional = Tensor::zeros((1, 2, 3), DType::F32, &Device::Cpu)?;
        let tokens = drop_image_tokens(&ones, &unconditional, 0.3, Address::new(0, "text"))?;
        assert_eq!(tokens.mean((1, 2))?.to_vec1::<f32>()?, means);
        Ok(())
    }
}

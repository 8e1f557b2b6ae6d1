//! The decoupled cross-attention of IP-Adapter (Ye et al. 2023): keys and values of image tokens, in every block.

use candle_core::Tensor;

use super::unet::{KeyValues, UNet};
use crate::Result;
use crate::nn::{Linear, Weights};

/// The names of a U-Net's transformer blocks in the order in which diffusers registers them, down, up, middle: the n-th,
/// counted from 0, has the number 2n + 1 in IP-Adapter's files.
pub fn block_order(unet: &UNet) -> Vec<String> {
    let (middle, others): (Vec<_>, Vec<_>) =
        unet.block_names().into_iter().partition(|name| name.starts_with("mid_block"));
    others.into_iter().chain(middle).collect()
}

/// The projections `to_k_ip` and `to_v_ip` of every transformer block.
///
/// Tensors are named as IP-Adapter names them, `<n>.to_k_ip.weight` and `<n>.to_v_ip.weight`, with n = 1, 3, 5, ...
/// counting the blocks in the order in which diffusers registers them: down, up, middle.
#[derive(Clone, Debug)]
pub struct IpAdapter {
    projections: Vec<(String, Linear, Linear)>,
}

impl IpAdapter {
    /// Loads the projections for a U-Net.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] for a missing or misshapen tensor.
    pub fn load(unet: &UNet, weights: &Weights) -> Result<Self> {
        let config = unet.config();
        let mut projections = Vec::new();
        for (i, name) in block_order(unet).into_iter().enumerate() {
            let channels = config.block_channels(&name);
            let at = weights.pp(2 * i + 1);
            let load = |which| Linear::load(config.cross_attention_dim, channels, false, &at.pp(which));
            projections.push((name, load("to_k_ip")?, load("to_v_ip")?));
        }
        Ok(IpAdapter { projections })
    }

    /// The keys and values of image tokens in every block.
    ///
    /// `tokens`: `(batch, image tokens, cross_attention_dim)`. They do not depend on latents or timestep, so sampling
    /// needs them once.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] where the tokens have another width.
    pub fn project(&self, tokens: &Tensor) -> Result<KeyValues> {
        let mut key_values = KeyValues::default();
        for (name, to_k, to_v) in &self.projections {
            key_values.insert(name, to_k.forward(tokens)?, to_v.forward(tokens)?);
        }
        Ok(key_values)
    }
}

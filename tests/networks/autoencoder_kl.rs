use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use lcm_lookahead::models::autoencoder_kl::{AutoencoderKl, Config};
use lcm_lookahead::models::roles::LatentDecoder;

use crate::KINDS;
use crate::support::Case;

#[test]
fn values_and_gradients_are_those_of_diffusers() -> Result<()> {
    let case = Case::load("autoencoder_kl", "vae")?;
    let config = Config {
        latent_channels: 2,
        block_out_channels: vec![4, 4, 8],
        layers_per_block: 1,
        norm_num_groups: 2,
        ..Config::sdxl()
    };
    for (dtype, limit) in KINDS {
        let model = AutoencoderKl::load(&config, &case.weights_as(dtype)?)?;
        let images = Var::from_tensor(&case.get_as("images", dtype)?)?;
        let latents = Var::from_tensor(&case.get_as("latents", dtype)?)?;
        let (posterior, decoded) = (model.posterior(&images)?, model.decode(&latents)?);
        case.assert_within(limit, "mean", &posterior.mean)?;
        case.assert_within(limit, "logvar", &posterior.logvar)?;
        case.assert_within(limit, "decoded", &decoded)?;
        let weighted = |x: Tensor, name: &str| -> Result<Tensor> { Ok((x * case.get_as(name, dtype)?)?.sum_all()?) };
        let loss = (weighted(posterior.mean, "mean_weights")? + weighted(posterior.logvar, "logvar_weights")?)?;
        let gradients = (loss + weighted(decoded, "decoded_weights")?)?.backward()?;
        case.assert_within(limit, "images_gradient", gradients.get(&images).context("no gradient")?)?;
        case.assert_within(limit, "latents_gradient", gradients.get(&latents).context("no gradient")?)?;
    }
    Ok(())
}

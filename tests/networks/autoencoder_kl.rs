use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use lcm_lookahead::models::autoencoder_kl::{AutoencoderKl, Config};
use lcm_lookahead::models::roles::LatentDecoder;

use crate::F64;
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
    let model = AutoencoderKl::load(&config, &case.weights())?;
    let images = Var::from_tensor(case.get("images")?)?;
    let latents = Var::from_tensor(case.get("latents")?)?;
    let (posterior, decoded) = (model.posterior(&images)?, model.decode(&latents)?);
    case.assert_within(F64, "mean", &posterior.mean)?;
    case.assert_within(F64, "logvar", &posterior.logvar)?;
    case.assert_within(F64, "decoded", &decoded)?;
    let weighted = |x: Tensor, name: &str| -> Result<Tensor> { Ok((x * case.get(name)?)?.sum_all()?) };
    let loss = (weighted(posterior.mean, "mean_weights")? + weighted(posterior.logvar, "logvar_weights")?)?;
    let gradients = (loss + weighted(decoded, "decoded_weights")?)?.backward()?;
    case.assert_within(F64, "images_gradient", gradients.get(&images).context("no gradient")?)?;
    case.assert_within(F64, "latents_gradient", gradients.get(&latents).context("no gradient")?)
}

//! A LoRA that teaches the denoiser one person, as DreamBooth does (Ruiz et al. 2023): for the second half of figure 2.

use lcm_lookahead::data::to_tensor;
use lcm_lookahead::mini::portrait::{Identity, Portrait, Pose, Scene, Style};
use lcm_lookahead::mini::{MiniConfig, RESOLUTION};
use lcm_lookahead::nn::{LoraSet, Loras, Parameters, Weights};
use lcm_lookahead::random::Address;
use lcm_lookahead::schedule::AnnealedTimestepSampler;
use lcm_lookahead::train::{AdamW, AdamWConfig, Gradients, ParameterGroup};
use lcm_lookahead::{Pass, Result};

use crate::setting::Setting;

const RANK: usize = 8;
const BATCH: usize = 4;
const LEARNING_RATE: f64 = 1e-3;
/// Photographs of the person that the LoRA is trained on.
const PHOTOGRAPHS: [Scene; 8] = [
    Scene::Studio,
    Scene::Beach,
    Scene::Library,
    Scene::Garden,
    Scene::Desert,
    Scene::Rain,
    Scene::Mountains,
    Scene::Forest,
];

/// Trains a LoRA of the attention layers on photographs of a person.
pub fn train(setting: &Setting, identity: &Identity, seed: u64) -> Result<LoraSet> {
    let base = &setting.base;
    let portraits = PHOTOGRAPHS.iter().enumerate().map(|(i, scene)| Portrait {
        identity: identity.clone(),
        style: Style::Photo,
        scene: *scene,
        pose: Pose::from_seed(identity.seed + 7 * i as u64),
    });
    let portraits: Vec<Portrait> = portraits.collect();
    let pictures = portraits.iter().map(|portrait| to_tensor(&portrait.render(RESOLUTION as u32).image, &base.device));
    let pictures = candle_core::Tensor::stack(&pictures.collect::<Result<Vec<_>>>()?, 0)?;
    let latents = base.latents(&pictures, Address::new(seed, "personal posterior"))?;

    let mut layers = MiniConfig::mini().lcm_lora_layers()?;
    layers.retain(|path, _| path.contains(".attn"));
    let parameters = Parameters::new();
    let dtype = if base.dtype == candle_core::DType::F64 { base.dtype } else { candle_core::DType::F32 };
    let lora = LoraSet::load(&layers, RANK, &Weights::trainable(&parameters, seed, dtype, &base.device))?;
    let group = ParameterGroup { parameters: parameters.clone(), learning_rate: LEARNING_RATE, weight_decay: 1e-2 };
    let mut optimizer = AdamW::new(vec![group], AdamWConfig::default())?;
    let sampler = AnnealedTimestepSampler::new(0.0, base.schedule.timestep_count(), base.schedule.timestep_count())?;
    for step in 0..setting.size.lora_steps {
        let places: Vec<u32> = (0..BATCH).map(|i| ((step as usize * BATCH + i) % portraits.len()) as u32).collect();
        let prompts: Vec<String> = places.iter().map(|place| portraits[*place as usize].prompt()).collect();
        let clean = latents.index_select(&candle_core::Tensor::from_vec(places, BATCH, &base.device)?, 0)?;
        let timesteps = sampler.sample_batch(Address::new(seed, "personal timestep").step(step), BATCH);
        let noise = Address::new(seed, "personal noise").step(step);
        let noise = noise.normal(clean.shape(), dtype, &base.device)?;
        let noised = base.schedule.add_noise(&clean, &noise, &timesteps)?;
        let pass = Pass { loras: Loras::one(&lora, 1.0), ..Pass::default() };
        let prediction = base.unet.forward(&noised, &timesteps, &base.conditioning(&prompts)?, &pass)?;
        let loss = (prediction.to_dtype(dtype)? - noise)?.sqr()?.mean_all()?;
        optimizer.clip_and_step(Gradients::extract(&loss.backward()?, &parameters), 1.0, 1.0)?;
    }
    // The same numbers, but no part of any graph.
    let trained = parameters.all().into_iter().map(|(name, variable)| (name, variable.as_detached_tensor()));
    LoraSet::load(&layers, RANK, &Weights::frozen("personal LoRA", trained.collect()))
}

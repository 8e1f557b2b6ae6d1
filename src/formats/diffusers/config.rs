//! The configurations of the crate's networks, from those that diffusers and transformers save.

use serde_json::{Value, json};

use super::JsonConfig;
use crate::Result;
use crate::models::{autoencoder_kl, clip_text, clip_vision, taesd, unet};
use crate::ops::Activation;
use crate::schedule::NoiseSchedule;

/// The U-Net of a `UNet2DConditionModel` of SDXL's kind.
///
/// # Errors
/// [`crate::Error::Config`] naming the field that is missing, absurd, or not SDXL's.
pub fn unet_config(json: &JsonConfig) -> Result<unet::Config> {
    for (field, supported, missing_is_supported) in [
        ("_class_name", json!("UNet2DConditionModel"), true),
        ("act_fn", json!("silu"), true),
        ("addition_embed_type", json!("text_time"), false),
        ("use_linear_projection", json!(true), false),
        ("mid_block_type", json!("UNetMidBlock2DCrossAttn"), true),
        ("flip_sin_to_cos", json!(true), true),
        ("freq_shift", json!(0), true),
        ("downsample_padding", json!(1), true),
        ("conv_in_kernel", json!(3), true),
        ("conv_out_kernel", json!(3), true),
        ("center_input_sample", json!(false), true),
        ("dual_cross_attention", json!(false), true),
        ("only_cross_attention", json!(false), true),
        ("mid_block_only_cross_attention", Value::Null, true),
        ("class_embed_type", Value::Null, true),
        ("num_class_embeds", Value::Null, true),
        ("encoder_hid_dim_type", Value::Null, true),
        ("time_cond_proj_dim", Value::Null, true),
        ("time_embedding_dim", Value::Null, true),
        ("time_embedding_act_fn", Value::Null, true),
        ("timestep_post_act", Value::Null, true),
        ("reverse_transformer_layers_per_block", Value::Null, true),
        ("resnet_time_scale_shift", json!("default"), true),
        ("time_embedding_type", json!("positional"), true),
        ("attention_type", json!("default"), true),
        ("cross_attention_norm", Value::Null, true),
    ] {
        json.only(field, &supported, missing_is_supported)?;
    }
    for field in ["resnet_out_scale_factor", "mid_block_scale_factor"] {
        if json.number_or(field, 1.0)? != 1.0 {
            return Err(json.fault(field, "1, the only value supported"));
        }
    }
    let levels = json.length("block_out_channels")?;
    let mut layers = match json.get("transformer_layers_per_block") {
        Some(_) => json.counts("transformer_layers_per_block", levels)?,
        None => vec![1; levels],
    };
    let down = json.texts("down_block_types")?;
    let up = json.texts("up_block_types")?;
    let attends: Vec<bool> = down.iter().map(|kind| *kind == "CrossAttnDownBlock2D").collect();
    let known = |kind: &&str, names: [&str; 2]| names.contains(kind);
    if down.len() != levels || !down.iter().all(|kind| known(kind, ["DownBlock2D", "CrossAttnDownBlock2D"])) {
        return Err(json.fault("down_block_types", format!("{levels} of DownBlock2D and CrossAttnDownBlock2D")));
    }
    let mirrored = up.iter().rev().map(|kind| *kind == "CrossAttnUpBlock2D").eq(attends.iter().copied());
    if !mirrored || !up.iter().all(|kind| known(kind, ["UpBlock2D", "CrossAttnUpBlock2D"])) {
        return Err(json.fault("up_block_types", "the down blocks' kinds in reverse"));
    }
    if !attends.last().copied().unwrap_or(false) {
        return Err(json.fault("down_block_types", "a last block with attention"));
    }
    for (layers, attends) in layers.iter_mut().zip(attends) {
        *layers *= usize::from(attends);
    }
    // What older versions call the width of a head is the number of heads; the newer name wins where both are there.
    let heads = if json.get("num_attention_heads").is_some() { "num_attention_heads" } else { "attention_head_dim" };
    let time = json.count("addition_time_embed_dim")?;
    let embedded = json.count("projection_class_embeddings_input_dim")?;
    let pooled = embedded.checked_sub(6 * time).filter(|pooled| *pooled > 0);
    let config = unet::Config {
        in_channels: json.count("in_channels")?,
        out_channels: json.count("out_channels")?,
        block_out_channels: json.counts("block_out_channels", levels)?,
        layers_per_block: json.count("layers_per_block")?,
        transformer_layers_per_block: layers,
        attention_heads: json.counts(heads, levels)?,
        cross_attention_dim: json.count("cross_attention_dim")?,
        norm_num_groups: json.count_or("norm_num_groups", 32)?,
        norm_eps: json.number_or("norm_eps", 1e-5)?,
        addition_time_embed_dim: time,
        pooled_dim: pooled.ok_or_else(|| {
            json.fault("projection_class_embeddings_input_dim", format!("more than six time embeddings of {time}"))
        })?,
    };
    config.validate().map_err(|error| match error {
        crate::Error::Config { field, .. } => json.fault(&field, "a value that fits the others"),
        other => other,
    })?;
    Ok(config)
}

fn activation(json: &JsonConfig) -> Result<Activation> {
    match json.text_or("hidden_act", "quick_gelu")? {
        "quick_gelu" => Ok(Activation::QuickGelu),
        "gelu" => Ok(Activation::Gelu),
        _ => Err(json.fault("hidden_act", "\"quick_gelu\" or \"gelu\"")),
    }
}

/// How many layers a transformer may have: bigG has 32.
fn layers(json: &JsonConfig) -> Result<usize> {
    match json.count("num_hidden_layers")? {
        layers @ ..=256 => Ok(layers),
        _ => Err(json.fault("num_hidden_layers", "at most 256")),
    }
}

fn heads(json: &JsonConfig, width: usize) -> Result<usize> {
    match json.count("num_attention_heads")? {
        heads if width.is_multiple_of(heads) => Ok(heads),
        _ => Err(json.fault("num_attention_heads", format!("a divisor of the width {width}"))),
    }
}

fn check_epsilon(json: &JsonConfig) -> Result<()> {
    match json.number_or("layer_norm_eps", 1e-5)? {
        1e-5 => Ok(()),
        _ => Err(json.fault("layer_norm_eps", "1e-5, the only value supported")),
    }
}

/// A text encoder of transformers: `CLIPTextModel`, or `CLIPTextModelWithProjection` with its projection.
///
/// # Errors
/// [`crate::Error::Config`] naming the field that is missing, absurd, or not supported.
pub fn clip_text_config(json: &JsonConfig) -> Result<clip_text::Config> {
    json.only("model_type", &json!("clip_text_model"), true)?;
    check_epsilon(json)?;
    let vocab_size = json.count_or("vocab_size", 49408)?;
    let width = json.count("hidden_size")?;
    let architectures = json.texts("architectures").unwrap_or_default();
    let projects = architectures.contains(&"CLIPTextModelWithProjection");
    // Configurations of before transformers 4.31 say 2 and mean the last token of the vocabulary, which is the largest
    // id of a prompt; transformers itself still reads them so.
    let eos = match json.count_or("eos_token_id", 49407)? {
        2 => vocab_size - 1,
        id if id < vocab_size => id,
        _ => return Err(json.fault("eos_token_id", format!("a token of the {vocab_size}"))),
    };
    Ok(clip_text::Config {
        vocab_size,
        max_position_embeddings: json.count_or("max_position_embeddings", 77)?,
        hidden_size: width,
        intermediate_size: json.count("intermediate_size")?,
        num_hidden_layers: layers(json)?,
        num_attention_heads: heads(json, width)?,
        hidden_act: activation(json)?,
        projection_dim: if projects { Some(json.count_or("projection_dim", 512)?) } else { None },
        eos_token_id: eos as u32,
    })
}

/// An image encoder of transformers, `CLIPVisionModelWithProjection`.
///
/// # Errors
/// [`crate::Error::Config`] naming the field that is missing, absurd, or not supported.
pub fn clip_vision_config(json: &JsonConfig) -> Result<clip_vision::Config> {
    json.only("model_type", &json!("clip_vision_model"), true)?;
    check_epsilon(json)?;
    let (image_size, patch_size) = (json.count_or("image_size", 224)?, json.count_or("patch_size", 32)?);
    if image_size > 4096 || image_size % patch_size != 0 {
        return Err(json.fault("image_size", format!("at most 4096, and a multiple of the patch size {patch_size}")));
    }
    let width = json.count("hidden_size")?;
    Ok(clip_vision::Config {
        image_size,
        patch_size,
        hidden_size: width,
        intermediate_size: json.count("intermediate_size")?,
        num_hidden_layers: layers(json)?,
        num_attention_heads: heads(json, width)?,
        hidden_act: activation(json)?,
        projection_dim: json.count_or("projection_dim", 512)?,
    })
}

/// The autoencoder of an `AutoencoderTiny`.
///
/// # Errors
/// [`crate::Error::Config`] naming the field that is missing, absurd, or not supported.
pub fn tiny_autoencoder_config(json: &JsonConfig) -> Result<taesd::Config> {
    for (field, supported) in
        [("_class_name", json!("AutoencoderTiny")), ("act_fn", json!("relu")), ("upsampling_scaling_factor", json!(2))]
    {
        json.only(field, &supported, true)?;
    }
    let levels = json.length("num_encoder_blocks")?;
    let blocks = |field: &str| -> Result<Vec<usize>> {
        let counts = json.counts(field, levels)?;
        match counts.iter().all(|count| (1..=64).contains(count)) {
            true => Ok(counts),
            false => Err(json.fault(field, "1 to 64 blocks at each resolution")),
        }
    };
    let mut widths = json.counts("encoder_block_out_channels", levels)?;
    widths.extend(json.counts("decoder_block_out_channels", levels)?);
    let width = widths[0];
    if width == 0 || widths.iter().any(|other| *other != width) {
        return Err(json.fault("encoder_block_out_channels", "one width for all blocks"));
    }
    Ok(taesd::Config {
        latent_channels: json.count_or("latent_channels", 4)?,
        width,
        num_encoder_blocks: blocks("num_encoder_blocks")?,
        num_decoder_blocks: blocks("num_decoder_blocks")?,
        scaling_factor: json.number_or("scaling_factor", 1.0)?,
        // The shift of diffusers' configuration belongs to `scale_latents`, which pipelines do not call.
        shift: 0.0,
    })
}

/// The autoencoder of an `AutoencoderKL`.
///
/// # Errors
/// [`crate::Error::Config`] naming the field that is missing, absurd, or not supported.
pub fn autoencoder_kl_config(json: &JsonConfig) -> Result<autoencoder_kl::Config> {
    for (field, supported) in [
        ("_class_name", json!("AutoencoderKL")),
        ("act_fn", json!("silu")),
        ("in_channels", json!(3)),
        ("out_channels", json!(3)),
        ("latents_mean", Value::Null),
        ("latents_std", Value::Null),
    ] {
        json.only(field, &supported, true)?;
    }
    let levels = json.length("block_out_channels")?;
    for (field, kind) in [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")] {
        let kinds = json.texts(field)?;
        if kinds.len() != levels || kinds.iter().any(|other| *other != kind) {
            return Err(json.fault(field, format!("{levels} of {kind}")));
        }
    }
    let flag = |field: &str| match json.get(field) {
        None => Ok(true),
        Some(value) => value.as_bool().ok_or_else(|| json.fault(field, "true or false")),
    };
    let config = autoencoder_kl::Config {
        latent_channels: json.count_or("latent_channels", 4)?,
        block_out_channels: json.counts("block_out_channels", levels)?,
        layers_per_block: json.count_or("layers_per_block", 1)?,
        norm_num_groups: json.count_or("norm_num_groups", 32)?,
        scaling_factor: json.number_or("scaling_factor", 0.18215)?,
        shift_factor: json.number_or("shift_factor", 0.0)?,
        mid_block_add_attention: flag("mid_block_add_attention")?,
        use_quant_conv: flag("use_quant_conv")?,
        use_post_quant_conv: flag("use_post_quant_conv")?,
    };
    config.validate().map_err(|error| match error {
        crate::Error::Config { field, .. } => json.fault(&field, "a value that fits the others"),
        other => other,
    })?;
    Ok(config)
}

/// The noise schedule of a `scheduler_config.json`. Which sampler it names does not matter: samplers are options of a
/// call.
///
/// # Errors
/// [`crate::Error::Config`] for a model of another kind: one that predicts velocities, has trained betas or a schedule
/// that is not `scaled_linear`, or ends in pure noise.
pub fn noise_schedule(json: &JsonConfig) -> Result<NoiseSchedule> {
    for (field, supported, missing_is_supported) in [
        ("beta_schedule", json!("scaled_linear"), false),
        ("prediction_type", json!("epsilon"), true),
        ("trained_betas", Value::Null, true),
        ("rescale_betas_zero_snr", json!(false), true),
    ] {
        json.only(field, &supported, missing_is_supported)?;
    }
    let (start, end) = (json.number_or("beta_start", 0.00085)?, json.number_or("beta_end", 0.012)?);
    NoiseSchedule::scaled_linear(start, end, json.count_or("num_train_timesteps", 1000)?)
        .map_err(|_| json.fault("beta_start", "numbers above 0 and below 1, not above beta_end, and 2 timesteps"))
}

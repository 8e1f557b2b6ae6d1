//! The published configurations, abridged to what the networks need.

use super::*;
use crate::Error;
use crate::models::{autoencoder_kl, clip_text, clip_vision, taesd, unet};
use crate::schedule::NoiseSchedule;

const UNET: &str = r#"{
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "center_input_sample": false,
    "class_embed_type": null, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 2048,
    "cross_attention_norm": null, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1, "dual_cross_attention": false, "encoder_hid_dim": null, "encoder_hid_dim_type": null,
    "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
    "num_attention_heads": null, "num_class_embeds": null, "only_cross_attention": false, "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816, "resnet_time_scale_shift": "default", "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": null,
    "use_linear_projection": true
}"#;

fn with(text: &str, from: &str, to: &str) -> JsonConfig {
    assert!(text.contains(from), "{from}");
    JsonConfig::parse("config.json", &text.replace(from, to)).unwrap()
}

#[test]
fn the_published_configurations_are_the_presets() -> Result<()> {
    assert_eq!(unet_config(&JsonConfig::parse("unet", UNET)?)?, unet::Config::sdxl());
    let text = r#"{"architectures": ["CLIPTextModel"], "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "quick_gelu",
        "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768,
        "vocab_size": 49408}"#;
    assert_eq!(clip_text_config(&JsonConfig::parse("text_encoder", text)?)?, clip_text::Config::clip_l());
    let text_2 = r#"{"architectures": ["CLIPTextModelWithProjection"], "eos_token_id": 2, "hidden_act": "gelu",
        "hidden_size": 1280, "intermediate_size": 5120, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
        "vocab_size": 49408}"#;
    assert_eq!(clip_text_config(&JsonConfig::parse("text_encoder_2", text_2)?)?, clip_text::Config::open_clip_big_g());
    let vision = r#"{"architectures": ["CLIPVisionModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
        "image_size": 224, "intermediate_size": 5120, "layer_norm_eps": 1e-05, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 32, "patch_size": 14, "projection_dim": 1024}"#;
    assert_eq!(clip_vision_config(&JsonConfig::parse("image_encoder", vision)?)?, clip_vision::Config::vit_h_14());
    let tiny = r#"{"_class_name": "AutoencoderTiny", "act_fn": "relu", "decoder_block_out_channels": [64, 64, 64, 64],
        "encoder_block_out_channels": [64, 64, 64, 64], "latent_channels": 4, "num_decoder_blocks": [3, 3, 3, 1],
        "num_encoder_blocks": [1, 3, 3, 3], "scaling_factor": 1.0, "upsampling_scaling_factor": 2}"#;
    assert_eq!(tiny_autoencoder_config(&JsonConfig::parse("vae", tiny)?)?, taesd::Config::taesdxl());
    let vae = r#"{"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "force_upcast": false, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
        "out_channels": 3, "sample_size": 512, "scaling_factor": 0.13025,
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;
    assert_eq!(autoencoder_kl_config(&JsonConfig::parse("vae", vae)?)?, autoencoder_kl::Config::sdxl());
    let scheduler = r#"{"_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": false, "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": null, "use_karras_sigmas": false}"#;
    let (read, sdxl) = (noise_schedule(&JsonConfig::parse("scheduler", scheduler)?)?, NoiseSchedule::sdxl());
    assert_eq!(read.timestep_count(), 1000);
    for t in [0, 500, 999] {
        assert_eq!(read.alpha_cumprod(t)?, sdxl.alpha_cumprod(t)?);
    }
    Ok(())
}

#[test]
fn schedules_of_other_kinds_of_models_are_refused_by_field() -> Result<()> {
    for (text, field) in [
        (r#"{"beta_schedule": "linear"}"#, "beta_schedule"),
        (r#"{"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}"#, "prediction_type"),
        (r#"{"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": true}"#, "rescale_betas_zero_snr"),
        (r#"{"beta_schedule": "scaled_linear", "beta_start": 0.5, "beta_end": 0.1}"#, "beta_start"),
        (r#"{"beta_schedule": "scaled_linear", "num_train_timesteps": 1e12}"#, "num_train_timesteps"),
    ] {
        let error = noise_schedule(&JsonConfig::parse("scheduler", text)?).unwrap_err();
        let Error::Config { field: named, .. } = &error else { panic!("{error}") };
        assert_eq!(named, field, "{error}");
    }
    Ok(())
}

#[test]
fn absurd_sizes_and_other_architectures_are_refused_by_field() {
    for (from, to, field) in [
        ("[320, 640, 1280]", "[320, 640, 1e18]", "block_out_channels"),
        ("[320, 640, 1280]", "[320, 640, 99999999999]", "block_out_channels"),
        ("[320, 640, 1280]", "[320, 640, -1]", "block_out_channels"),
        ("[320, 640, 1280]", "[]", "block_out_channels"),
        ("\"layers_per_block\": 2", "\"layers_per_block\": 100000", "layers_per_block"),
        ("[1, 2, 10]", "[1, 2, 100000]", "transformer_layers_per_block"),
        ("\"cross_attention_dim\": 2048", "\"cross_attention_dim\": null", "cross_attention_dim"),
        ("\"text_time\"", "null", "addition_embed_type"),
        ("2816", "1536", "projection_class_embeddings_input_dim"),
        ("\"use_linear_projection\": true", "\"use_linear_projection\": false", "use_linear_projection"),
        ("\"encoder_hid_dim_type\": null", "\"encoder_hid_dim_type\": \"text_proj\"", "encoder_hid_dim_type"),
        ("\"UpBlock2D\"]", "\"CrossAttnUpBlock2D\"]", "up_block_types"),
        ("[5, 10, 20]", "[5, 10, 21]", "attention_heads"),
    ] {
        let error = unet_config(&with(UNET, from, to)).unwrap_err();
        let Error::Config { source_name, field: named, .. } = &error else { panic!("{error}") };
        assert_eq!((source_name.as_str(), named.as_str()), ("config.json", field), "{error}");
    }
}

#[test]
fn a_cut_off_configuration_is_named() {
    let error = JsonConfig::parse("unet/config.json", &UNET[..200]).unwrap_err().to_string();
    assert!(error.starts_with("unet/config.json: not a JSON object (is it cut off?)"), "{error}");
}

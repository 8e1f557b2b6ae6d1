//! The presets.

use super::*;
use crate::lookahead::{LoraScale, PreviewForm, PreviewPath};
use crate::train::LrSchedule;

impl TrainConfig {
    /// The names [`preset`](Self::preset) knows.
    pub const PRESETS: [&'static str; 3] = ["paper", "official", "mini"];

    /// The preset of this name, if there is one.
    pub fn preset(name: &str) -> Option<TrainConfig> {
        match name {
            "paper" => Some(Self::paper()),
            "official" => Some(Self::official()),
            "mini" => Some(Self::mini()),
            _ => None,
        }
    }

    /// What the paper's text says (sections 4.2, 4.3 and 4.5), and what the authors' recipe says where the paper is
    /// silent: dropout, weight decay, clipping, the weight of the loss.
    pub fn paper() -> TrainConfig {
        TrainConfig {
            seed: 0,
            max_train_steps: 5000,
            train_batch_size: 8,
            gradient_accumulation_steps: 1,
            recompute: true,
            keep_attention: false,
            update_mode: UpdateMode::Joint,
            data: DataConfig {
                resolution: 1024,
                center_crop: false,
                crops_coords_top_left_h: 0,
                crops_coords_top_left_w: 0,
                instance_prompt: "a photo of a face".into(),
            },
            optimizer: OptimizerConfig {
                learning_rate: 5e-6,
                adapter_lr: 1e-5,
                adam_beta1: 0.9,
                adam_beta2: 0.999,
                adam_epsilon: 1e-8,
                adam_weight_decay: 0.01,
                max_grad_norm: 1.0,
                lr_scheduler: LrSchedule::Constant,
                lr_warmup_steps: 500,
            },
            ema: EmaConfig { enabled: false, decay: 0.999, warmup: true },
            adapter: AdapterConfig {
                kv_branch: true,
                encoder_lora_rank: 4,
                kv_lora_rank: 0,
                optimize_adapter: true,
                adapter_attention_scale: 1.0,
                noisy_encoder_input: true,
                extended_layers: Vec::new(),
            },
            dropout: DropoutConfig { adapter_drop_chance: 0.1, kv_drop_chance: 0.05, text_drop_chance: 0.0 },
            timesteps: TimestepsConfig { diffusion_annealing: 0.2, lookahead_annealing: 0.2, lcm_max_timestep: 1000 },
            lookahead: LookaheadConfig {
                every_k_steps: 1,
                batch_size: 8,
                identity_weight: 1e-3,
                perceptual_weight: 0.0,
                scale_loss_by_lora_scale: false,
                through: PreviewPath::Lcm,
                preview_form: PreviewForm::Equation3,
                lora_scale: LoraScale { full_probability: 0.5, min_scale: 0.1, hold_iterations: 1 },
                alignment: AlignmentConfig::default(),
            },
            checkpointing: CheckpointingConfig { every_n_steps: 500, keep_last: 2 },
            validation: ValidationConfig {
                every_n_steps: 500,
                prompts: [
                    "a painting of a face in the style of monet",
                    "a photo of a face in the forest",
                    "a photo of a face as a knight in plate",
                    "fauvism painting of a face",
                ]
                .map(String::from)
                .to_vec(),
                images: Vec::new(),
                num_images: 2,
                num_inference_steps: 50,
            },
            logging: LoggingConfig { every_n_steps: 1, tensorboard: true },
        }
    }

    /// What the authors' published trainer does with the recipe it documents. It differs from the paper's text in: two
    /// updates per iteration, the timestep annealing of the diffusion loss, a LoRA on the exported keys and values, the
    /// boundary terms of the preview, a perceptual loss beside the identity loss, the loss scaled by the LoRA scale, and
    /// LoRA scales kept for five iterations.
    pub fn official() -> TrainConfig {
        let mut config = Self::paper();
        config.update_mode = UpdateMode::Alternating;
        config.timesteps.diffusion_annealing = 0.5;
        config.adapter.kv_lora_rank = 4;
        config.lookahead.preview_form = PreviewForm::Boundary;
        config.lookahead.perceptual_weight = 1e-3;
        config.lookahead.scale_loss_by_lora_scale = true;
        config.lookahead.lora_scale.hold_iterations = 5;
        config
    }

    /// For the miniature, 128 px on a CPU: the paper's method in small batches and short runs, with learning rates and an
    /// identity weight large enough to show within a few hundred iterations.
    pub fn mini() -> TrainConfig {
        let mut config = Self::paper();
        config.max_train_steps = 300;
        config.train_batch_size = 4;
        config.recompute = false;
        config.data.resolution = 128;
        config.optimizer.learning_rate = 1e-4;
        config.optimizer.adapter_lr = 2e-4;
        config.optimizer.lr_warmup_steps = 20;
        config.ema.decay = 0.99;
        config.adapter.kv_lora_rank = 4;
        config.lookahead.batch_size = 4;
        config.lookahead.identity_weight = 0.1;
        config.checkpointing.every_n_steps = 10;
        config.validation.every_n_steps = 100;
        config.validation.prompts =
            ["an oil painting of a face", "a photo of a face in a forest"].map(String::from).to_vec();
        config.validation.num_inference_steps = 12;
        config
    }
}

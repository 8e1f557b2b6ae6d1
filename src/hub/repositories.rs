//! Every repository this crate knows what to do with.

/// A repository of published weights.
#[derive(Clone, Copy, Debug)]
pub struct Repository {
    /// Owner and name on the hub.
    pub id: &'static str,
    /// What its files are used for.
    pub purpose: &'static str,
    /// The licence of the weights, by the name that the hub gives it.
    pub licence: &'static str,
    /// The files that are used.
    pub files: &'static [WeightFile],
}

/// A file of a repository.
#[derive(Clone, Copy, Debug)]
pub struct WeightFile {
    /// Its path in the repository.
    pub path: &'static str,
    /// About how large it is, in bytes: what to expect of a download. What arrives is checked against the exact size
    /// that the hub announces.
    pub bytes: u64,
}

const fn file(path: &'static str, bytes: u64) -> WeightFile {
    WeightFile { path, bytes }
}

/// Every repository this crate knows what to do with.
pub const REPOSITORIES: &[Repository] = &[
    Repository {
        id: "stabilityai/stable-diffusion-xl-base-1.0",
        purpose: "the base: U-Net and both text encoders, in half precision, with tokenizers and configurations",
        licence: "openrail++",
        files: &[
            file("unet/config.json", 2_000),
            file("unet/diffusion_pytorch_model.fp16.safetensors", 5_135_000_000),
            file("text_encoder/config.json", 600),
            file("text_encoder/model.fp16.safetensors", 246_000_000),
            file("text_encoder_2/config.json", 600),
            file("text_encoder_2/model.fp16.safetensors", 1_389_000_000),
            file("tokenizer/vocab.json", 1_060_000),
            file("tokenizer/merges.txt", 525_000),
            file("tokenizer_2/vocab.json", 1_060_000),
            file("tokenizer_2/merges.txt", 525_000),
            file("scheduler/scheduler_config.json", 500),
        ],
    },
    Repository {
        id: "stabilityai/sdxl-turbo",
        purpose: "one-step pictures, from which consistent training data is generated",
        licence: "sai-nc-community",
        files: &[file("unet/config.json", 2_000), file("unet/diffusion_pytorch_model.fp16.safetensors", 5_135_000_000)],
    },
    Repository {
        id: "madebyollin/sdxl-vae-fp16-fix",
        purpose: "the autoencoder that half precision does not break",
        licence: "mit",
        files: &[file("config.json", 700), file("diffusion_pytorch_model.safetensors", 335_000_000)],
    },
    Repository {
        id: "madebyollin/taesdxl",
        purpose: "the tiny autoencoder that decodes previews",
        licence: "mit",
        files: &[file("config.json", 1_000), file("diffusion_pytorch_model.safetensors", 9_800_000)],
    },
    Repository {
        id: "latent-consistency/lcm-lora-sdxl",
        purpose: "the LoRA that makes one-step previews (rank 64, alpha for each of 788 modules)",
        licence: "openrail++",
        files: &[file("pytorch_lora_weights.safetensors", 394_000_000)],
    },
    Repository {
        id: "h94/IP-Adapter",
        purpose: "the adapter that training starts from, and its image encoder (CLIP ViT-H/14)",
        licence: "apache-2.0",
        files: &[
            file("sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors", 848_000_000),
            file("models/image_encoder/config.json", 600),
            file("models/image_encoder/model.safetensors", 2_528_000_000),
        ],
    },
    Repository {
        id: "opencv/face_detection_yunet",
        purpose: "YuNet, which finds faces",
        licence: "mit",
        files: &[file("face_detection_yunet_2023mar.onnx", 232_589)],
    },
    Repository {
        id: "opencv/face_recognition_sface",
        purpose: "SFace, the identity network where none is given",
        licence: "apache-2.0",
        files: &[file("face_recognition_sface_2021dec.onnx", 38_696_353)],
    },
    Repository {
        id: "rinong/lcm_lookahead",
        purpose: "the encoders that the authors of the paper released",
        licence: "apache-2.0",
        files: &[
            file("encoder_plus_adapter_ckpt.bin", 14_080_000_000),
            file("encoder_plus_adapter_no_kv.bin", 14_080_000_000),
        ],
    },
];

/// The repository of this name.
pub fn repository(id: &str) -> Option<&'static Repository> {
    REPOSITORIES.iter().find(|repository| repository.id == id)
}

//! CLIP's image encoder, with the tensor names of transformers' `CLIPVisionModelWithProjection`.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::clip_image_processor::clip_pixel_values;
use super::clip_layers::{Encoder, Shape, layer_norm};
use super::{image_dims, to_channels_first, to_channels_last};
use crate::data::from_tensor;
use crate::nn::{Conv2d, Embedding, Init, LayerNorm, Linear, Weights};
use crate::ops::{self, Activation, Mask};
use crate::{Error, Result};

/// Mean of the colours CLIP was trained on, of images in `[0, 1]`, RGB.
pub const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
/// Their standard deviation.
pub const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

/// The architecture, with the field names of transformers' `CLIPVisionConfig`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Width and height of the images the encoder takes.
    pub image_size: usize,
    /// Width and height of a patch.
    pub patch_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the MLPs.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads.
    pub num_attention_heads: usize,
    /// Activation of the MLPs.
    pub hidden_act: Activation,
    /// Width of the pooled embedding.
    pub projection_dim: usize,
}

impl Config {
    /// OpenCLIP ViT-H/14, the image encoder of IP-Adapter Plus.
    pub fn vit_h_14() -> Self {
        Config {
            image_size: 224,
            patch_size: 14,
            hidden_size: 1280,
            intermediate_size: 5120,
            num_hidden_layers: 32,
            num_attention_heads: 16,
            hidden_act: Activation::Gelu,
            projection_dim: 1024,
        }
    }

    /// OpenAI's CLIP ViT-B/16, for the alignment of pictures with texts.
    pub fn vit_b_16() -> Self {
        Config {
            image_size: 224,
            patch_size: 16,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            hidden_act: Activation::QuickGelu,
            projection_dim: 512,
        }
    }

    /// The miniature, for images of 128 pixels.
    pub fn mini() -> Self {
        Config {
            image_size: 128,
            patch_size: 16,
            hidden_size: 96,
            intermediate_size: 384,
            num_hidden_layers: 3,
            num_attention_heads: 3,
            hidden_act: Activation::Gelu,
            projection_dim: 64,
        }
    }

    /// Tokens of an image: one a patch and the class token.
    pub fn token_count(&self) -> usize {
        (self.image_size / self.patch_size.max(1)).pow(2) + 1
    }
}

/// What the encoder tells of an image.
#[derive(Clone, Debug)]
pub struct ImageEmbeddings {
    /// States before the last layer (transformers: `hidden_states[-2]`), class token first:
    /// `(batch, tokens, hidden_size)`.
    pub hidden_states: Tensor,
    /// The projected state of the class token: `(batch, projection_dim)`.
    pub pooled: Tensor,
}

/// The image encoder.
#[derive(Clone, Debug)]
pub struct ClipVision {
    config: Config,
    class_embedding: Tensor,
    patch_embedding: Conv2d,
    position_embedding: Embedding,
    pre_layer_norm: LayerNorm,
    encoder: Encoder,
    post_layer_norm: LayerNorm,
    visual_projection: Linear,
    /// What a frozen encoder says of no image, once it was asked.
    null_features: Arc<OnceLock<Tensor>>,
}

impl ClipVision {
    /// Loads `vision_model.*` and `visual_projection.weight`.
    ///
    /// # Errors
    /// [`Error::Config`] where the configuration contradicts itself, [`Error::Tensor`] where a tensor is missing or
    /// misshapen.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (patch, width) = (config.patch_size, config.hidden_size);
        let shape = Shape {
            width,
            heads: config.num_attention_heads,
            mlp_width: config.intermediate_size,
            layers: config.num_hidden_layers,
            activation: config.hidden_act,
        };
        shape.check("clip_vision")?;
        if patch == 0 || config.image_size < patch {
            return Err(Error::Config {
                source_name: "clip_vision".into(),
                field: "patch_size".into(),
                reason: format!("must lie between 1 and image_size ({}), but is {patch}", config.image_size),
            });
        }
        let model = weights.pp("vision_model");
        let embeddings = model.pp("embeddings");
        Ok(ClipVision {
            config: config.clone(),
            class_embedding: embeddings.get(width, "class_embedding", Init::Normal((width as f64).powf(-0.5)))?,
            patch_embedding: Conv2d::load(3, width, patch, patch, 0, false, &embeddings.pp("patch_embedding"))?,
            position_embedding: Embedding::load(config.token_count(), width, &embeddings.pp("position_embedding"))?,
            // The published name has this spelling.
            pre_layer_norm: layer_norm(width, &model.pp("pre_layrnorm"))?,
            encoder: Encoder::load(&shape, &model)?,
            post_layer_norm: layer_norm(width, &model.pp("post_layernorm"))?,
            visual_projection: Linear::load(width, config.projection_dim, false, &weights.pp("visual_projection"))?,
            null_features: Arc::default(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The type of the weights, and where they lie.
    pub fn kind(&self) -> (DType, Device) {
        let table = self.position_embedding.table();
        (table.dtype(), table.device().clone())
    }

    /// Images `(batch, 3, height, width)` in `[-1, 1]` to the encoder's input `(batch, 3, image_size, image_size)`:
    /// clamped, the shorter side resized to `image_size`, the middle cut out, colours normalised.
    ///
    /// As transformers' `CLIPImageProcessor`, but without rounding to bytes, so it is differentiable;
    /// [`ClipVision::pixel_values`] rounds as the original. IP-Adapter's
    /// picture for "no image" is zeros *after* this.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another.
    pub fn preprocess(&self, images: &Tensor) -> Result<Tensor> {
        let (_, height, width) = image_dims("clip_vision preprocess", images)?;
        let size = self.config.image_size;
        let scaled = |side: usize| (side * size) / height.min(width);
        let (new_height, new_width) = (scaled(height), scaled(width));
        let mut x = to_channels_last(&clamped(images)?)?;
        if (new_height, new_width) != (height, width) {
            x = ops::resize_bicubic(&x, new_height, new_width)?.clamp(-1.0, 1.0)?;
        }
        if (new_height, new_width) != (size, size) {
            x = x.narrow(1, (new_height - size) / 2, size)?.narrow(2, (new_width - size) / 2, size)?.contiguous()?;
        }
        // ((x + 1) / 2 - mean) / std
        let row = |f: fn(f64, f64) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = CLIP_MEAN.iter().zip(CLIP_STD).map(|(&mean, std)| f(mean, std)).collect();
            Ok(Tensor::from_vec(values, 3, x.device())?.to_dtype(x.dtype())?)
        };
        let x = x.broadcast_mul(&row(|_, std| 0.5 / std)?)?.broadcast_add(&row(|mean, std| (0.5 - mean) / std)?)?;
        to_channels_first(&x)
    }

    /// The same as the original rounds it, byte for byte
    /// ([`clip_pixel_values`]); what IP-Adapter and the paper's authors
    /// feed the encoder. No gradient passes.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another.
    pub fn pixel_values(&self, images: &Tensor) -> Result<Tensor> {
        let (batch, _, _) = image_dims("clip_vision pixel_values", images)?;
        let (dtype, device) = self.kind();
        let values = |i: usize| clip_pixel_values(&from_tensor(&images.get(i)?)?, self.config.image_size, &Device::Cpu);
        let values = (0..batch).map(values).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&values, 0)?.to_dtype(dtype)?.to_device(&device)?)
    }

    /// Embeds images as [`ClipVision::preprocess`] or [`ClipVision::pixel_values`] returns them, `(batch, 3, image_size, image_size)`.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<ImageEmbeddings> {
        let (hidden_states, last) = self.encoder.forward(&self.embed(pixel_values)?, Mask::None)?;
        let class = last.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        let pooled = self.visual_projection.forward(&self.post_layer_norm.forward(&class)?)?;
        Ok(ImageEmbeddings { hidden_states, pooled })
    }

    /// Only the [`ImageEmbeddings::hidden_states`], without running the last layer.
    ///
    /// # Errors
    /// [`Error::Argument`] where the shape is another.
    pub fn penultimate_hidden_states(&self, pixel_values: &Tensor) -> Result<Tensor> {
        self.encoder.penultimate(&self.embed(pixel_values)?, Mask::None)
    }

    /// The penultimate hidden states of a picture that is zero after normalisation, `(1, patches + 1, width)`; computed
    /// once where the weights are frozen.
    ///
    /// # Errors
    /// Those of [`ClipVision::penultimate_hidden_states`].
    pub fn null_features(&self) -> Result<Tensor> {
        if let Some(features) = self.null_features.get() {
            return Ok(features.clone());
        }
        let (size, (dtype, device)) = (self.config.image_size, self.kind());
        let features = self.penultimate_hidden_states(&Tensor::zeros((1, 3, size, size), dtype, &device)?)?;
        if !features.track_op() {
            // Who came first has found the same.
            let _ = self.null_features.set(features.clone());
        }
        Ok(features)
    }

    fn embed(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let (batch, height, width) = image_dims("clip_vision", pixel_values)?;
        let size = self.config.image_size;
        if (height, width) != (size, size) {
            let expected = format!("(batch, 3, {size}, {size})");
            let found = format!("{:?}", pixel_values.dims());
            return Err(Error::argument("clip_vision", "pixel_values", expected, found));
        }
        let channels = self.config.hidden_size;
        let patches = self.patch_embedding.forward(&to_channels_last(pixel_values)?)?;
        let patches = patches.reshape((batch, self.config.token_count() - 1, channels))?;
        let class = self.class_embedding.reshape((1, 1, channels))?.broadcast_as((batch, 1, channels))?;
        let x = Tensor::cat(&[&class.contiguous()?, &patches], 1)?;
        self.pre_layer_norm.forward(&x.broadcast_add(self.position_embedding.table())?)
    }
}

/// Clamps images to [-1, 1]: against whole tensors, as candle broadcasts a single number at a tenth of a GPU's speed.
fn clamped(images: &Tensor) -> Result<Tensor> {
    let one = images.ones_like()?;
    Ok(images.maximum(&one.neg()?)?.minimum(&one)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::autograd::check_gradients;
    use crate::nn::Parameters;
    use crate::random::Address;

    fn tiny() -> Config {
        Config {
            image_size: 4,
            patch_size: 2,
            hidden_size: 4,
            intermediate_size: 6,
            num_attention_heads: 2,
            projection_dim: 3,
            ..Config::mini()
        }
    }

    fn load(config: &Config, dtype: DType) -> Result<(ClipVision, Parameters)> {
        let parameters = Parameters::new();
        let model = ClipVision::load(config, &Weights::trainable(&parameters, 1, dtype, &Device::Cpu))?;
        Ok((model, parameters))
    }

    #[test]
    fn vit_h_has_its_published_tensors() -> Result<()> {
        let weights = Weights::shapes_only();
        ClipVision::load(&Config::vit_h_14(), &weights)?;
        let shapes = weights.shapes();
        assert_eq!(shapes.len(), 520);
        assert_eq!(shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>(), 632_076_800);
        for (name, shape) in [
            ("vision_model.embeddings.class_embedding", vec![1280]),
            ("vision_model.embeddings.patch_embedding.weight", vec![1280, 3, 14, 14]),
            ("vision_model.embeddings.position_embedding.weight", vec![257, 1280]),
            ("vision_model.pre_layrnorm.weight", vec![1280]),
            ("vision_model.encoder.layers.31.self_attn.q_proj.weight", vec![1280, 1280]),
            ("vision_model.post_layernorm.bias", vec![1280]),
            ("visual_projection.weight", vec![1024, 1280]),
        ] {
            assert_eq!(shapes.get(name), Some(&shape), "{name}");
        }
        Ok(())
    }

    #[test]
    fn the_mini_sees_65_tokens_in_128_pixels() -> Result<()> {
        let (model, _) = load(&Config::mini(), DType::F32)?;
        let images = Address::new(0, "images").normal((2, 3, 128, 128), DType::F32, &Device::Cpu)?;
        let pixels = model.preprocess(&images)?;
        let embeddings = model.forward(&pixels)?;
        assert_eq!(embeddings.hidden_states.dims(), [2, 65, 96]);
        assert_eq!(embeddings.pooled.dims(), [2, 64]);
        let alone = model.penultimate_hidden_states(&pixels)?;
        assert_eq!(alone.to_vec3::<f32>()?, embeddings.hidden_states.to_vec3::<f32>()?);
        Ok(())
    }

    #[test]
    fn preprocessing_cuts_out_the_middle_and_normalises() -> Result<()> {
        let (model, _) = load(&tiny(), DType::F32)?;
        // Columns of a wide image: black borders, white middle.
        let row: Vec<f32> = [vec![-1.0; 4], vec![1.0; 8], vec![-1.0; 4]].concat();
        let images = Tensor::new(row, &Device::Cpu)?.broadcast_as((1, 3, 8, 16))?;
        let pixels = model.preprocess(&images)?;
        assert_eq!(pixels.dims(), [1, 3, 4, 4]);
        let (mean, std) = (CLIP_MEAN[1] as f32, CLIP_STD[1] as f32);
        let inner = pixels.to_vec3_at(1, 2, 1)?;
        assert!((inner - (1.0 - mean) / std).abs() < 1e-5, "{inner}");
        Ok(())
    }

    trait At {
        fn to_vec3_at(&self, channel: usize, row: usize, column: usize) -> Result<f32>;
    }
    impl At for Tensor {
        fn to_vec3_at(&self, channel: usize, row: usize, column: usize) -> Result<f32> {
            Ok(self.get(0)?.to_vec3::<f32>()?[channel][row][column])
        }
    }

    #[test]
    fn gradients_reach_the_images_exactly() -> Result<()> {
        let (model, _) = load(&tiny(), DType::F64)?;
        let images = Address::new(2, "images").uniform_tensor((1, 3, 6, 6), DType::F64, &Device::Cpu)?;
        let check = check_gradients(&[images.affine(1.6, -0.8)?], |x| {
            let embeddings = model.forward(&model.preprocess(&x[0])?)?;
            Ok(vec![embeddings.hidden_states, embeddings.pooled])
        })?;
        assert!(check.worst() < 1e-6 && check.norms[0] > 1e-3, "{check:?}");
        Ok(())
    }

    #[test]
    fn the_features_of_no_image_are_those_of_the_weights_as_they_are() -> Result<()> {
        let (trainable, parameters) = load(&tiny(), DType::F64)?;
        let tensors = parameters.all().into_iter().map(|(name, variable)| (name, variable.as_detached_tensor()));
        let copies = tensors.map(|(name, tensor)| Ok((name, tensor.copy()?))).collect::<Result<_>>()?;
        let frozen = ClipVision::load(&tiny(), &Weights::frozen("copies", copies))?;
        let numbers = |tensor: Tensor| -> Result<Vec<f64>> { Ok(tensor.flatten_all()?.to_vec1()?) };
        let zeros = Tensor::zeros((1, 3, 4, 4), DType::F64, &Device::Cpu)?;
        let before = numbers(trainable.null_features()?)?;
        assert_eq!(before, numbers(frozen.penultimate_hidden_states(&zeros)?)?);
        assert_eq!(
            [before.clone(), before.clone()],
            [numbers(frozen.null_features()?)?, numbers(frozen.null_features()?)?]
        );
        // Kept for frozen weights only.
        for (_, variable) in parameters.all() {
            variable.set(&variable.affine(0.5, 0.1)?)?;
        }
        assert_ne!(before, numbers(trainable.null_features()?)?);
        Ok(())
    }

    #[test]
    fn every_weight_gets_a_gradient() -> Result<()> {
        let (model, parameters) = load(&tiny(), DType::F32)?;
        let images = Address::new(2, "images").normal((2, 3, 4, 4), DType::F32, &Device::Cpu)?;
        let gradients = model.forward(&images)?.pooled.sqr()?.sum_all()?.backward()?;
        for (name, variable) in parameters.all() {
            assert!(gradients.get(&variable).is_some(), "{name}");
        }
        Ok(())
    }
}

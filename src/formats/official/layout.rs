//! Every name of the official layout, and where its tensor comes from.

use std::collections::BTreeMap;

use crate::Result;
use crate::formats::{Expected, TensorFile};
use crate::lookahead::{FaceEncoder, FaceEncoderConfig};
use crate::models::ip_adapter::block_order;
use crate::models::unet::UNet;
use crate::nn::Weights;

/// Where the encoder's U-Net lies in the file.
pub(super) const ENCODER: &str = "encoder_unet.";
const RESAMPLER: &str = "image_proj_model.";
const IMAGE_ENCODER: &str = "image_encoder.";

/// Where a tensor of the layout comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The base U-Net's tensor of this name.
    Base(String),
    /// A frozen copy of the tensor of this name of the layout.
    CopyOf(String),
    /// The tensor of this name of the layout, registered twice.
    Alias(String),
    /// Our encoder's tensor of this name.
    New(String),
}

#[derive(Clone, Debug)]
pub(super) struct Place {
    pub shape: Vec<usize>,
    pub origin: Origin,
}

/// All names but the image encoder's, whose shape is another file's matter.
pub(super) struct Layout {
    tensors: BTreeMap<String, Place>,
}

impl Layout {
    /// The layout of an encoder; `unet` may be one without weights.
    pub fn of(config: &FaceEncoderConfig, unet: &UNet) -> Result<Self> {
        let weights = Weights::shapes_only();
        FaceEncoder::load(config, unet, &weights, &weights)?;
        let own = weights.shapes();
        let base = UNet::shapes(unet.config())?;
        let mut tensors = BTreeMap::new();
        let mut put =
            |name: String, shape: &[usize], origin| tensors.insert(name, Place { shape: shape.to_vec(), origin });
        for (name, shape) in &base {
            put(format!("{ENCODER}{name}"), shape, Origin::Base(name.clone()));
        }
        for (name, shape) in &own {
            let origin = || Origin::New(name.clone());
            if let Some(rest) = name.strip_prefix("image_proj.") {
                put(format!("{RESAMPLER}{rest}"), shape, origin());
            } else if let Some(rest) = name.strip_prefix("kv_encoder.encoder.") {
                put(format!("{ENCODER}{}", legacy_lora(rest)), shape, origin());
            } else if let Some(rest) = name.strip_prefix("kv_encoder.export.") {
                let rest = legacy_lora(rest).replace(".attn1.", ".extract_kv1.");
                put(format!("{ENCODER}{rest}"), shape, origin());
            }
        }
        for (i, block) in block_order(unet).iter().enumerate() {
            for projection in ["to_k", "to_v"] {
                let copied = format!("{block}.attn1.{projection}.weight");
                let name = format!("{ENCODER}{block}.extract_kv1.{projection}.weight");
                put(name, &base[&copied], Origin::CopyOf(format!("{ENCODER}{copied}")));
                let adapter = format!("ip_adapter.{}.{projection}_ip.weight", 2 * i + 1);
                let name = format!("{ENCODER}{block}.extract_kv2.{projection}.weight");
                put(name, &own[&adapter], Origin::New(adapter.clone()));
            }
        }
        // Both extractors hold the attention layer they copy as a module of their own, so all of its tensors, LoRA
        // included, appear once more.
        let mut aliases = Vec::new();
        for (name, place) in &tensors {
            for (attention, extractor) in [(".attn1.", "extract_kv1"), (".attn2.", "extract_kv2")] {
                if let Some((block, rest)) = name.split_once(attention) {
                    let alias = format!("{block}.{extractor}.source_attention_block.{rest}");
                    aliases.push((alias, Place { shape: place.shape.clone(), origin: Origin::Alias(name.clone()) }));
                }
            }
        }
        tensors.extend(aliases);
        Ok(Layout { tensors })
    }

    pub fn tensors(&self) -> impl Iterator<Item = (&String, &Place)> {
        self.tensors.iter()
    }

    pub fn origin(&self, name: &str) -> Option<&Origin> {
        self.tensors.get(name).map(|place| &place.origin)
    }

    /// Checks that a file has these names and shapes and no others; the image encoder's are not looked at.
    pub fn check(&self, file: &TensorFile) -> Result<()> {
        let shapes: BTreeMap<String, Vec<usize>> =
            self.tensors.iter().map(|(name, place)| (name.clone(), place.shape.clone())).collect();
        for prefix in [ENCODER, RESAMPLER] {
            let of_part: BTreeMap<String, Vec<usize>> = shapes
                .iter()
                .filter_map(|(name, shape)| Some((name.strip_prefix(prefix)?.to_string(), shape.clone())))
                .collect();
            file.expect(&Expected { prefix, shapes: &of_part, ignored: &[] })?;
        }
        let known = |name: &&str| [ENCODER, RESAMPLER, IMAGE_ENCODER].iter().any(|prefix| name.starts_with(prefix));
        match file.names().find(|name| !known(name)) {
            Some(other) => Err(file.fault(
                other,
                "only `encoder_unet.*`, `image_proj_model.*` and `image_encoder.*`",
                "a tensor of another part",
            )),
            None => Ok(()),
        }
    }
}

/// peft's name of a LoRA tensor as diffusers called it before peft.
fn legacy_lora(name: &str) -> String {
    name.replace(".lora_A.weight", ".lora_layer.down.weight").replace(".lora_B.weight", ".lora_layer.up.weight")
}

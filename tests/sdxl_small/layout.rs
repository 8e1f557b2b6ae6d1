//! A tiny SDXL with every file in the layout in which it is published: what diffusers wrote (`tests/fixtures/formats`,
//! `tests/fixtures/sdxl_small`), and face networks that are written here.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use lcm_lookahead::formats::pytorch::{self, Node};
use lcm_lookahead::formats::{StoredDtype, TensorInfo};
use lcm_lookahead::hub::{Hub, REPOSITORIES};
use lcm_lookahead::models::ir_resnet::{self, IrResnet};
use lcm_lookahead::models::yunet::{self, YuNet};
use lcm_lookahead::nn::{Parameters, Weights};
use lcm_lookahead::sdxl::SdxlChoice;

/// Landmarks of the face that the detector finds in every picture of 32 pixels.
const FACE: [[f32; 2]; 5] = [[10.4, 12.2], [20.6, 12.8], [15.8, 17.6], [11.8, 22.4], [19.6, 22.6]];

pub struct Layout {
    folder: tempfile::TempDir,
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures")).join(name)
}

impl Layout {
    pub fn new() -> Result<Self> {
        let layout = Layout { folder: tempfile::tempdir()? };
        let weights = layout.weights();
        copy(&fixture("sdxl_small"), &weights)?;
        let sdxl = weights.join("stable-diffusion-xl-base-1.0");
        copy(&fixture("formats/base/unet"), &sdxl.join("unet"))?;
        for tokenizer in ["tokenizer", "tokenizer_2"] {
            copy(&fixture("clip_vocab.json"), &sdxl.join(tokenizer).join("vocab.json"))?;
            copy(&fixture("clip_merges.txt"), &sdxl.join(tokenizer).join("merges.txt"))?;
        }
        let adapter = weights.join("IP-Adapter");
        copy(&fixture("formats/base/image_encoder"), &adapter.join("models/image_encoder"))?;
        let name = "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors";
        copy(&fixture("formats/ip_adapter.safetensors"), &adapter.join(name))?;
        copy(
            &fixture("formats/lora_kohya.safetensors"),
            &weights.join("lcm-lora-sdxl/pytorch_lora_weights.safetensors"),
        )?;
        write_yunet(&weights.join("face_detection_yunet/face_detection_yunet_2023mar.onnx"))?;
        write_ir_se(&layout.choice().identity_network.context("given")?)?;
        Ok(layout)
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// What is given as `--weights`.
    pub fn weights(&self) -> PathBuf {
        self.folder.path().join("weights")
    }

    /// The identity network, which no hub has.
    pub fn choice(&self) -> SdxlChoice {
        SdxlChoice { identity_network: Some(self.folder.path().join("model_ir_se50.pth")), ..SdxlChoice::default() }
    }

    /// A hub without network that finds everything in the folder.
    pub fn hub(&self) -> Result<Hub> {
        Ok(hub(&self.folder.path().join("no-cache"), &[("HF_HUB_OFFLINE", "1")])?
            .with_weights_folder(Some(self.weights())))
    }

    /// Every file as a hub has it, by `owner/name/path`.
    pub fn published(&self) -> Result<HashMap<String, Vec<u8>>> {
        let mut files = HashMap::new();
        for repository in REPOSITORIES {
            let (_, name) = repository.id.split_once('/').context("owner and name")?;
            for file in repository.files {
                if let Ok(content) = std::fs::read(self.weights().join(name).join(file.path)) {
                    files.insert(format!("{}/{}", repository.id, file.path), content);
                }
            }
        }
        Ok(files)
    }
}

pub fn hub(home: &Path, variables: &[(&str, &str)]) -> Result<Hub> {
    let lookup = |name: &str| match name {
        "HF_HOME" => Some(home.display().to_string()),
        name => variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| value.to_string()),
    };
    Ok(Hub::from_variables(lookup)?.with_attempts(2, std::time::Duration::from_millis(1)))
}

/// Copies a file, or a folder with all that is in it.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        for entry in std::fs::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    std::fs::create_dir_all(to.parent().context("a folder")?)?;
    std::fs::copy(from, to).with_context(|| from.display().to_string())?;
    Ok(())
}

/// Tensors with the names and shapes that a network asks for, at random.
fn random(load: impl Fn(&Weights) -> lcm_lookahead::Result<()>) -> Result<Vec<(String, Tensor)>> {
    let parameters = Parameters::new();
    load(&Weights::trainable(&parameters, 5, DType::F32, &Device::Cpu))?;
    Ok(parameters.all().into_iter().map(|(name, variable)| (name, variable.as_detached_tensor())).collect())
}

/// IR-SE50's names in a PyTorch file, with the counters that batch norms leave in one.
fn write_ir_se(path: &Path) -> Result<()> {
    let config = ir_resnet::Config {
        crop_size: 112,
        input_width: 4,
        widths: vec![4, 6, 8, 10],
        blocks: vec![1, 1, 2, 1],
        se_reduction: Some(2),
        dimension: 8,
        affine_output: true,
    };
    let mut tensors = random(|weights| IrResnet::load(&config, weights).map(drop))?;
    tensors.push(("input_layer.1.num_batches_tracked".into(), Tensor::new(7i64, &Device::Cpu)?));
    let node = |(name, tensor): &(String, Tensor)| {
        let dtype = StoredDtype::of(tensor.dtype()).context("a type that files have")?;
        Ok((name.clone(), Node::Tensor(TensorInfo { shape: tensor.dims().to_vec(), dtype }, name.clone())))
    };
    let nodes = tensors.iter().map(node).collect::<Result<_>>()?;
    let tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
    Ok(pytorch::write(path, &Node::Dict(nodes), |name| Ok(tensors[name].clone()))?)
}

/// YuNet's initialisers in an ONNX file. Its heads see nothing: at the coarsest stride they always say the same face.
fn write_yunet(path: &Path) -> Result<()> {
    let mut graph = Vec::new();
    for (name, tensor) in random(|weights| YuNet::load(&yunet::Config::yunet(), weights).map(drop))? {
        let mut numbers = tensor.flatten_all()?.to_vec1::<f32>()?;
        if let Some(head) = name.strip_prefix("bbox_head.multi_level_") {
            numbers.fill(0.0);
            match head {
                "cls.0.conv2.bias" | "cls.1.conv2.bias" => numbers.fill(-20.0),
                "cls.2.conv2.bias" | "obj.2.conv2.bias" => numbers.fill(20.0),
                "kps.2.conv2.bias" => {
                    numbers = FACE.iter().flatten().map(|place| place / 32.0).collect();
                }
                _ => {}
            }
        }
        let mut initializer = Vec::new();
        for size in tensor.dims() {
            number_field(&mut initializer, 1, *size as u64);
        }
        number_field(&mut initializer, 2, 1); // FLOAT
        bytes_field(&mut initializer, 8, name.as_bytes());
        bytes_field(&mut initializer, 9, &numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        bytes_field(&mut graph, 5, &initializer);
    }
    let mut model = Vec::new();
    number_field(&mut model, 1, 8);
    bytes_field(&mut model, 7, &graph);
    std::fs::create_dir_all(path.parent().context("a folder")?)?;
    Ok(std::fs::write(path, model)?)
}

fn varint(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

fn number_field(to: &mut Vec<u8>, field: u64, number: u64) {
    varint(to, field << 3);
    varint(to, number);
}

fn bytes_field(to: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    varint(to, field << 3 | 2);
    varint(to, bytes.len() as u64);
    to.extend(bytes);
}

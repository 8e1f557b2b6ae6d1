//! Where the files of an SDXL are.

use std::path::{Path, PathBuf};

use crate::formats::diffusers::Folder;
use crate::formats::{Content, EncoderFile, TensorFile};
use crate::hub::{Hub, REPOSITORIES, repository};
use crate::models::unet;
use crate::train::AdapterInit;
use crate::{Error, Result};

const SDXL: &str = "stabilityai/stable-diffusion-xl-base-1.0";
const AUTOENCODER: &str = "madebyollin/sdxl-vae-fp16-fix";
const PREVIEW: &str = "madebyollin/taesdxl";
const ADAPTER: &str = "h94/IP-Adapter";
const LCM_LORA: &str = "latent-consistency/lcm-lora-sdxl";
const SFACE: &str = "opencv/face_recognition_sface";
const YUNET: &str = "opencv/face_detection_yunet";

/// What is to be used instead of the published files; each where it is given.
#[derive(Clone, Debug, Default)]
pub struct SdxlChoice {
    /// A pipeline as diffusers saves it: U-Net, scheduler, text encoders and tokenizers are taken from it, as far as it
    /// has them. (The autoencoder is not: SDXL's own is broken by half precision.)
    pub pipeline: Option<PathBuf>,
    /// A U-Net alone: any fine-tune, a folder with `config.json` and weights; or the name of a repository that the
    /// [hub's table](crate::hub::REPOSITORIES) has a U-Net of (`sdxl-turbo`, `stabilityai/sdxl-turbo`), where there is no
    /// such folder.
    pub unet: Option<PathBuf>,
    /// An autoencoder of the kind `AutoencoderKL`, a folder.
    pub autoencoder: Option<PathBuf>,
    /// A LCM-LoRA in any form that [`LoraFile`](crate::formats::lora::LoraFile) reads.
    pub lcm_lora: Option<PathBuf>,
    /// The adapter to start from, in any form that [`EncoderFile`] reads.
    pub adapter: Option<PathBuf>,
    /// An identity network in any form that [`faces::identity_network`](crate::formats::faces::identity_network) reads;
    /// the paper's authors use IR-SE50. SFace where none is given.
    pub identity_network: Option<PathBuf>,
    /// YuNet.
    pub face_locator: Option<PathBuf>,
    /// Height and width of the pictures; those the U-Net was made for where none is given.
    pub resolution: Option<usize>,
}

/// Where the files are that [`Base::sdxl`](crate::Base::sdxl) assembles a base from.
#[derive(Clone, Debug)]
pub struct SdxlFiles {
    /// `UNet2DConditionModel`: a folder with `config.json` and weights, as the others that are called folders.
    pub unet: PathBuf,
    /// Folder with `scheduler_config.json`; SDXL's schedule where there is none.
    pub scheduler: Option<PathBuf>,
    /// `AutoencoderKL`: folder.
    pub autoencoder: PathBuf,
    /// `AutoencoderTiny`: folder.
    pub preview_decoder: PathBuf,
    /// `CLIPTextModel` and `CLIPTextModelWithProjection`: folders.
    pub text_encoders: [PathBuf; 2],
    /// Folders with `vocab.json` and `merges.txt`, or `tokenizer.json`.
    pub tokenizers: [PathBuf; 2],
    /// `CLIPVisionModelWithProjection`: folder.
    pub image_encoder: PathBuf,
    /// IP-Adapter Plus, or another form of a face encoder: file or folder.
    pub adapter: PathBuf,
    /// LCM-LoRA: file or folder.
    pub lcm_lora: PathBuf,
    /// Identity network: file.
    pub identity_network: PathBuf,
    /// YuNet: file.
    pub face_locator: PathBuf,
    /// Height and width of the pictures, where it is not what the U-Net's configuration says.
    pub resolution: Option<usize>,
    /// Whether the U-Net is the one that the paper's authors trained on, SDXL's own: then the base weights in a checkpoint
    /// of theirs are compared with it, else dropped.
    pub own_base: bool,
}

impl SdxlFiles {
    /// Finds the files, and gets what is not on this machine from the hub. Everything that is missing is known before
    /// the first download, so that without network the error names all of it.
    ///
    /// # Errors
    /// [`Error::Format`] where a file of the choice does not exist; those of [`Hub::file`].
    pub fn find(hub: &Hub, choice: &SdxlChoice) -> Result<Self> {
        let mut finder = Finder { hub, missing: Vec::new() };
        // The first round looks on this machine only.
        let looked = Self::look(&mut finder, choice)?;
        if finder.missing.is_empty() {
            return Ok(looked);
        }
        for (i, (repository, file)) in finder.missing.iter().enumerate() {
            hub.file(repository, file).map_err(|error| match error {
                Error::Hub { repository, file, reason } => {
                    let rest = &finder.missing[i + 1..];
                    let more: Vec<String> =
                        rest.iter().map(|(repository, file)| format!("{repository}/{file}")).collect();
                    let more =
                        if more.is_empty() { String::new() } else { format!("; also missing: {}", more.join(", ")) };
                    Error::Hub { repository, file, reason: reason + &more }
                }
                other => other,
            })?;
        }
        Self::look(&mut Finder { hub, missing: Vec::new() }, choice)
    }

    fn look(finder: &mut Finder<'_>, choice: &SdxlChoice) -> Result<Self> {
        let named = choice.unet.as_deref().and_then(published_unet);
        for path in [
            &choice.pipeline,
            if named.is_some() { &None } else { &choice.unet },
            &choice.autoencoder,
            &choice.lcm_lora,
            &choice.adapter,
            &choice.identity_network,
            &choice.face_locator,
        ] {
            if let Some(path) = path.as_ref().filter(|path| !path.exists()) {
                return Err(Error::Format { path: path.clone(), reason: "there is no such file or folder".into() });
            }
        }
        let own = |component: &str| -> Option<PathBuf> {
            let folder = choice.pipeline.as_ref()?.join(component);
            folder.is_dir().then_some(folder)
        };
        let named_unet = named.map(|id| finder.component(id, "unet")).transpose()?;
        let mut sdxl = |component: &str| own(component).map_or_else(|| finder.component(SDXL, component), Ok);
        let own_base = named.map_or(choice.unet.is_none() && own("unet").is_none(), |id| id == SDXL);
        let unet = match (&choice.unet, named_unet) {
            (_, Some(named)) => named,
            // A pipeline's folder may be given too.
            (Some(folder), None) if folder.join("unet").is_dir() => folder.join("unet"),
            (Some(folder), None) => folder.clone(),
            (None, None) => sdxl("unet")?,
        };
        let scheduler = match (&choice.unet, own("scheduler")) {
            // Turbo's noise schedule is SDXL's.
            (Some(_), _) if named.is_some() => None,
            (Some(folder), _) => {
                let beside = [folder.join("scheduler"), folder.join("../scheduler")];
                beside.into_iter().find(|path| path.is_dir())
            }
            (None, Some(folder)) => Some(folder),
            (None, None) => Some(sdxl("scheduler")?),
        };
        let text_encoders = [sdxl("text_encoder")?, sdxl("text_encoder_2")?];
        let tokenizers = [sdxl("tokenizer")?, sdxl("tokenizer_2")?];
        let mut or = |given: &Option<PathBuf>, repository: &str, component: &str| match given {
            Some(path) => Ok(path.clone()),
            None => finder.component(repository, component),
        };
        Ok(SdxlFiles {
            unet,
            scheduler,
            autoencoder: or(&choice.autoencoder, AUTOENCODER, "")?,
            preview_decoder: or(&None, PREVIEW, "")?,
            text_encoders,
            tokenizers,
            image_encoder: or(&None, ADAPTER, "models/image_encoder")?,
            adapter: or(&choice.adapter, ADAPTER, "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors")?,
            lcm_lora: or(&choice.lcm_lora, LCM_LORA, "pytorch_lora_weights.safetensors")?,
            identity_network: or(&choice.identity_network, SFACE, "face_recognition_sface_2021dec.onnx")?,
            face_locator: or(&choice.face_locator, YUNET, "face_detection_yunet_2023mar.onnx")?,
            resolution: choice.resolution,
            own_base,
        })
    }

    /// The adapter, or whatever form of a face encoder is in its place, for a U-Net of this shape.
    ///
    /// # Errors
    /// Those of [`SdxlFiles::encoder`].
    pub fn adapter(&self, unet: &unet::Config) -> Result<AdapterInit> {
        Ok(self.encoder(&self.adapter, unet)?.into())
    }

    /// A face encoder in any form, for a U-Net of this shape. The authors' checkpoint is compared with the base it will
    /// be used with, tensor by tensor, where that is the one it was trained on ([`SdxlFiles::own_base`]).
    ///
    /// # Errors
    /// Those of [`EncoderFile::open`] and of opening the U-Net's file.
    pub fn encoder(&self, path: impl AsRef<Path>, unet: &unet::Config) -> Result<EncoderFile> {
        let path = path.as_ref();
        if self.own_base && path.is_file() && Content::of(&TensorFile::open(path)?) == Content::Official {
            return EncoderFile::open(path, unet, Some(&Folder::open(&self.unet, None)?.tensors()?));
        }
        EncoderFile::open(path, unet, None)
    }
}

/// The repository of this name, or of this owner and name, that has a U-Net, where no folder is called so.
fn published_unet(name: &Path) -> Option<&'static str> {
    let known = REPOSITORIES.iter().filter(|known| known.files.iter().any(|file| file.path.starts_with("unet/")));
    let text = name.to_str().filter(|_| !name.exists())?;
    known.map(|known| known.id).find(|id| *id == text || id.split_once('/').is_some_and(|(_, short)| short == text))
}

/// Finds files of the hub on this machine, and notes those that are not there.
struct Finder<'a> {
    hub: &'a Hub,
    missing: Vec<(&'static str, &'static str)>,
}

impl Finder<'_> {
    /// A file, a component's folder, or (for an empty name) the folder of a whole repository. In the folder that the
    /// user named, a component may have other weights than the published ones (in full precision, or sharded).
    fn component(&mut self, id: &str, component: &str) -> Result<PathBuf> {
        if let Some(path) =
            self.hub.in_weights_folder(id, component).filter(|path| path.is_file() || holds_weights(path))
        {
            return Ok(path);
        }
        let known = repository(id).ok_or_else(|| Error::argument("SdxlFiles", "repository", "a known one", id))?;
        let belongs = |path: &str| {
            let rest = path.strip_prefix(component);
            rest.is_some_and(|rest| component.is_empty() || rest.is_empty() || rest.starts_with('/'))
        };
        let mut found = None;
        for file in known.files.iter().filter(|file| belongs(file.path)) {
            match self.hub.find(id, file.path) {
                None => self.missing.push((known.id, file.path)),
                Some(path) => {
                    let depth = file.path[component.len()..].split('/').filter(|part| !part.is_empty()).count();
                    found = path.ancestors().nth(depth).map(Path::to_path_buf);
                }
            }
        }
        // Where something is missing, the place is not used.
        Ok(found.unwrap_or_default())
    }
}

/// Whether a folder is more than the beginning of a component.
fn holds_weights(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    entries.flatten().any(|entry| {
        let path = entry.path();
        path.is_file()
            && path
                .extension()
                .is_some_and(|extension| ["safetensors", "bin", "json", "txt"].iter().any(|known| extension == *known))
    })
}

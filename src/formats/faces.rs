//! Face networks from their files. Which network a file holds, and of which size, is told by its tensors.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};

use super::tensor_file::{TensorFile, format_error};
use crate::Result;
use crate::models::identity::IdentityNetwork;
use crate::models::ir_resnet::{self, IrResnet};
use crate::models::iresnet::{self, IResnet};
use crate::models::mobile_face_net::{self, MobileFaceNet};
use crate::models::sface::{self, SFace};
use crate::models::yunet::{self, YuNet};
use crate::nn::Weights;

/// The first tensors of IR networks and of ArcFace's, by which the place of a network in a file is found too.
const IR: &str = "input_layer.0.weight";
const ARC: &str = "layer1.0.bn1.weight";

/// An identity network from a file in any format that [`TensorFile::open`] reads: IR-SE50 and its kin
/// (`model_ir_se50.pth`, `CurricularFace_Backbone.pth`), ArcFace's residual networks as InsightFace's PyTorch code
/// saves them (`backbone.pth`), SFace and the MobileFaceNet of docs/networks.md (ONNX).
///
/// # Errors
/// Those of [`TensorFile::open`]; [`crate::Error::Format`] where it is none of these; [`crate::Error::Tensor`] where a
/// tensor is missing or misshapen.
pub fn identity_network(path: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Arc<dyn IdentityNetwork>> {
    let file = TensorFile::open(path)?;
    let root = |first: &str| {
        let mut places = file.names().filter_map(|name| name.strip_suffix(first));
        places.find(|place| place.is_empty() || place.ends_with('.')).map(str::to_string)
    };
    let weights = |root: &str| Weights::from_file(file.clone(), dtype, device).pp(root.trim_end_matches('.'));
    if let Some(root) = root(IR)
        && let Some(config) = ir_config(&file, &root)
    {
        return Ok(Arc::new(IrResnet::load(&config, &weights(&root))?));
    }
    if let Some(root) = root(ARC)
        && let Some(config) = iresnet_config(&file, &root)
    {
        return Ok(Arc::new(IResnet::load(&config, &weights(&root))?));
    }
    if file.info("conv_1_conv2d_weight").is_some() {
        return Ok(Arc::new(SFace::load(&sface::Config::sface(), &weights(""))?));
    }
    if file.info("519").is_some() && file.info("668").is_some() {
        return Ok(Arc::new(MobileFaceNet::load(&mobile_face_net::Config::fr_feature(), &weights(""))?));
    }
    let names: Vec<&str> = file.names().take(3).collect();
    Err(format_error(
        file.path(),
        format!(
            "no identity network this crate knows: expected IR-SE50 (`{IR}`), InsightFace's PyTorch iresnet (`{ARC}`), \
             SFace's or fr_feature's ONNX file, found `{}`, ...",
            names.join("`, `")
        ),
    ))
}

/// YuNet from `face_detection_yunet_2023mar.onnx`, or from its initialisers in another format.
///
/// # Errors
/// Those of [`TensorFile::open`]; [`crate::Error::Tensor`] where a tensor is missing or misshapen.
pub fn yunet(path: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<YuNet> {
    YuNet::load(&yunet::Config::yunet(), &Weights::from_file(TensorFile::open(path)?, dtype, device))
}

/// Shapes of tensors behind a place.
fn shapes<'a>(file: &'a TensorFile, root: &'a str) -> impl Fn(&str) -> Option<&'a [usize]> {
    move |name| file.info(&format!("{root}{name}")).map(|info| info.shape.as_slice())
}

/// The side of a square of so many numbers for each channel; what does not fit is found when the layers load.
fn side(flat: usize, channels: usize) -> usize {
    (flat / channels.max(1)).isqrt()
}

fn ir_config(file: &TensorFile, root: &str) -> Option<ir_resnet::Config> {
    let shape = shapes(file, root);
    let (mut widths, mut blocks) = (Vec::new(), Vec::<usize>::new());
    while let Some(conv) = shape(&format!("body.{}.res_layer.1.weight", blocks.iter().sum::<usize>())) {
        let index: usize = blocks.iter().sum();
        // The first block of every later stage changes the width, and so has weights in its shortcut.
        if index == 0 || shape(&format!("body.{index}.shortcut_layer.0.weight")).is_some() {
            widths.push(*conv.first()?);
            blocks.push(0);
        }
        *blocks.last_mut()? += 1;
    }
    let (output, last) = (shape("output_layer.3.weight")?, *widths.last()?);
    let (&[dimension, flat], stages) = (output, widths.len() as u32) else { return None };
    let reduced = shape("body.0.res_layer.5.fc1.weight").and_then(|fc1| fc1.first());
    Some(ir_resnet::Config {
        crop_size: side(flat, last).checked_shl(stages)?,
        input_width: *shape("input_layer.0.weight")?.first()?,
        se_reduction: reduced.map(|reduced| widths[0] / (*reduced).max(1)),
        widths,
        blocks,
        dimension,
        affine_output: shape("output_layer.4.weight").is_some(),
    })
}

fn iresnet_config(file: &TensorFile, root: &str) -> Option<iresnet::Config> {
    let shape = shapes(file, root);
    let (mut widths, mut layers) = ([0; 4], [0; 4]);
    for (i, (width, count)) in widths.iter_mut().zip(&mut layers).enumerate() {
        let conv = |block: usize| shape(&format!("layer{}.{block}.conv2.weight", i + 1));
        *width = *conv(0)?.first()?;
        *count = (0..=256).find(|block| conv(*block).is_none())?;
    }
    let &[dimension, flat] = shape("fc.weight")? else { return None };
    Some(iresnet::Config { crop_size: 16 * side(flat, widths[3]), widths, layers, dimension })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn saved(folder: &Path, load: impl Fn(&Weights) -> Result<()>) -> Result<std::path::PathBuf> {
        let weights = Weights::shapes_only();
        load(&weights)?;
        let zeros =
            |(name, shape)| Ok((name, candle_core::Tensor::zeros::<Vec<usize>>(shape, DType::F32, &Device::Cpu)?));
        let path = folder.join("network.safetensors");
        let tensors = weights.shapes().into_iter().map(zeros).collect::<Result<_>>()?;
        super::super::write_safetensors(&path, &tensors, &Default::default())?;
        Ok(path)
    }

    #[test]
    fn the_size_of_a_network_is_read_off_its_tensors() -> Result<()> {
        let folder = tempfile::tempdir().map_err(Error::io("create", "a folder"))?;
        for config in [
            ir_resnet::Config {
                crop_size: 112,
                input_width: 4,
                widths: vec![4, 6, 8, 10],
                blocks: vec![1, 2, 3, 1],
                se_reduction: Some(2),
                dimension: 5,
                affine_output: true,
            },
            ir_resnet::Config {
                crop_size: 32,
                input_width: 4,
                widths: vec![6, 8],
                blocks: vec![2, 1],
                se_reduction: None,
                dimension: 5,
                affine_output: false,
            },
        ] {
            let path = saved(folder.path(), |weights| IrResnet::load(&config, &weights.pp("module")).map(drop))?;
            assert_eq!(ir_config(&TensorFile::open(&path)?, "module."), Some(config.clone()));
            let network = identity_network(&path, DType::F32, &Device::Cpu)?;
            assert_eq!((network.crop_size(), network.dimension()), (config.crop_size, 5));
        }
        let config = iresnet::Config { crop_size: 32, widths: [4, 4, 6, 8], layers: [1, 2, 1, 3], dimension: 7 };
        let path = saved(folder.path(), |weights| IResnet::load(&config, weights).map(drop))?;
        assert_eq!(iresnet_config(&TensorFile::open(&path)?, ""), Some(config));
        assert_eq!(identity_network(&path, DType::F32, &Device::Cpu)?.dimension(), 7);
        Ok(())
    }

    #[test]
    fn published_sizes_are_recognised_by_names_and_shapes_alone() -> Result<()> {
        let folder = tempfile::tempdir().map_err(Error::io("create", "a folder"))?;
        let path = saved(folder.path(), |weights| SFace::load(&sface::Config::sface(), weights).map(drop))?;
        assert_eq!(identity_network(&path, DType::F32, &Device::Cpu)?.dimension(), 128);
        let config = mobile_face_net::Config::fr_feature();
        let path = saved(folder.path(), |weights| MobileFaceNet::load(&config, weights).map(drop))?;
        assert_eq!(identity_network(&path, DType::F32, &Device::Cpu)?.dimension(), 512);
        Ok(())
    }

    #[test]
    fn a_file_of_something_else_is_refused_with_what_was_expected() -> Result<()> {
        let folder = tempfile::tempdir().map_err(Error::io("create", "a folder"))?;
        let path = saved(folder.path(), |weights| YuNet::load(&yunet::Config::yunet(), weights).map(drop))?;
        let Err(error) = identity_network(&path, DType::F32, &Device::Cpu) else { panic!("read") };
        assert!(matches!(error, Error::Format { .. }), "{error}");
        assert!(error.to_string().contains("IR-SE50") && error.to_string().contains("`420`"), "{error}");
        Ok(())
    }
}

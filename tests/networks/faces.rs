use anyhow::{Context, Result};
use candle_core::{DType, Device, Var};
use lcm_lookahead::models::identity::IdentityNetwork;
use lcm_lookahead::models::ir_resnet::{self, IrResnet};
use lcm_lookahead::models::iresnet::{self, IResnet};
use lcm_lookahead::models::mobile_face_net::{self, MobileFaceNet, Stage};
use lcm_lookahead::models::sface::{self, SFace};
use lcm_lookahead::nn::Weights;

use crate::KINDS;
use crate::support::Case;

/// Embeddings, and, where the fixture has it, the gradient of a weighted sum of them into the pixels.
fn compare<N: IdentityNetwork>(case: &str, load: impl Fn(&Weights) -> lcm_lookahead::Result<N>) -> Result<()> {
    let case = Case::load("faces", case)?;
    for (dtype, limit) in KINDS {
        let network = load(&case.weights_as(dtype)?)?;
        let faces = Var::from_tensor(&case.get_as("faces", dtype)?)?;
        let embeddings = network.embed(&faces)?;
        assert_eq!(embeddings.dims(), [2, network.dimension()]);
        case.assert_within(limit, "embeddings", &embeddings)?;
        if let Ok(weights) = case.get_as("embeddings_weights", dtype) {
            let gradients = (embeddings * weights)?.sum_all()?.backward()?;
            case.assert_within(limit, "gradient", gradients.get(&faces).context("no gradient")?)?;
        }
    }
    Ok(())
}

#[test]
fn ir_networks_with_and_without_squeeze_and_excitation() -> Result<()> {
    let with = ir_resnet::Config {
        crop_size: 16,
        input_width: 4,
        widths: vec![4, 6],
        blocks: vec![2, 2],
        se_reduction: Some(2),
        dimension: 5,
        affine_output: true,
    };
    let without = ir_resnet::Config { blocks: vec![1, 2], se_reduction: None, affine_output: false, ..with.clone() };
    for (name, config) in [("ir_se", with), ("ir", without)] {
        compare(name, |weights| IrResnet::load(&config, weights))?;
    }
    Ok(())
}

#[test]
fn arcfaces_residual_network() -> Result<()> {
    let config = iresnet::Config { crop_size: 16, widths: [4, 4, 5, 6], layers: [1, 2, 1, 1], dimension: 5 };
    compare("iresnet", |weights| IResnet::load(&config, weights))
}

#[test]
fn sface_by_the_names_of_its_onnx_file() -> Result<()> {
    let config = sface::Config { crop_size: 8, input_width: 4, widths: vec![5, 6], strides: vec![1, 2], dimension: 7 };
    compare("sface", |weights| SFace::load(&config, weights))
}

#[test]
fn mobile_face_net_by_the_names_of_its_onnx_file() -> Result<()> {
    let stage = |expansion, width, stride| Stage { expansion, width, blocks: 1, stride };
    let config = mobile_face_net::Config {
        crop_size: 16,
        input_width: 4,
        stages: vec![stage(6, 5, 2), stage(6, 5, 1), stage(8, 6, 2)],
        dimension: 9,
        ..mobile_face_net::Config::fr_feature()
    };
    compare("mobile_face_net", |weights| MobileFaceNet::load(&config, weights))
}

#[test]
fn the_published_networks_have_their_published_tensors() -> Result<()> {
    let load_ir = |config: ir_resnet::Config| move |w: &Weights| IrResnet::load(&config, w).map(drop);
    let load_arc = |config: iresnet::Config| move |w: &Weights| IResnet::load(&config, w).map(drop);
    type Load = Box<dyn Fn(&Weights) -> lcm_lookahead::Result<()>>;
    let networks: [(Load, usize, usize, &str, &[usize]); 6] = [
        (
            Box::new(load_ir(ir_resnet::Config::ir_se_50())),
            343,
            43_824_064,
            "body.7.shortcut_layer.0.weight",
            &[256, 128, 1, 1],
        ),
        (
            Box::new(load_ir(ir_resnet::Config::curricular_face())),
            568,
            65_176_128,
            "output_layer.3.weight",
            &[512, 25088],
        ),
        (Box::new(load_arc(iresnet::Config::iresnet_50())), 396, 43_628_992, "layer3.13.prelu.weight", &[256]),
        (
            Box::new(load_arc(iresnet::Config::iresnet_100())),
            771,
            65_225_792,
            "layer1.0.downsample.1.running_var",
            &[64],
        ),
        (
            Box::new(|w: &Weights| SFace::load(&sface::Config::sface(), w).map(drop)),
            174,
            9_667_074,
            "pre_fc1_weight",
            &[128, 50176],
        ),
        (
            Box::new(|w: &Weights| MobileFaceNet::load(&mobile_face_net::Config::fr_feature(), w).map(drop)),
            133,
            1_190_336,
            "663",
            &[512, 1, 7, 7],
        ),
    ];
    for (load, tensors, numbers, name, shape) in networks {
        let weights = Weights::shapes_only();
        load(&weights)?;
        let shapes = weights.shapes();
        assert_eq!(shapes.get(name).map(Vec::as_slice), Some(shape), "{name}");
        let sum = shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>();
        assert_eq!((shapes.len(), sum), (tensors, numbers), "{name}");
    }
    Ok(())
}

#[test]
fn crops_of_another_size_are_refused() -> Result<()> {
    let network = IrResnet::load(&ir_resnet::Config::ir_se_50(), &Weights::shapes_only())?;
    let faces = candle_core::Tensor::zeros((1, 3, 96, 96), DType::F32, &Device::Cpu)?;
    let error = network.embed(&faces).unwrap_err().to_string();
    assert!(error.contains("112") && error.contains("96"), "{error}");
    Ok(())
}

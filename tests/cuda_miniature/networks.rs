//! Every network at a tiny random configuration: what it computes, and the gradient into its input.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use lcm_lookahead::Result;
use lcm_lookahead::mini::MiniConfig;
use lcm_lookahead::models::identity::IdentityNetwork;
use lcm_lookahead::models::roles::{ImageEncoder, LatentDecoder, LatentEncoder};
use lcm_lookahead::models::unet::{Conditioning, FreeU, Pass, UNet};
use lcm_lookahead::models::{
    autoencoder_kl, clip_text, clip_vision, ir_resnet, iresnet, lpips, mini_face_locator, mini_identity,
    mobile_face_net, resampler, sface, taesd, yunet,
};
use lcm_lookahead::nn::{Parameters, Weights};
use lcm_lookahead::random::Address;

use crate::sensitivity::{BEYOND, SAYS_NOTHING, moved, root_mean_square};
use crate::{error, gpu, numbers, random};

type Run = Box<dyn Fn(&Tensor) -> Result<Vec<Tensor>>>;

/// Largest relative error in f32 and bf16, of values and of gradients of smooth networks.
const LIMITS: [(DType, f64); 2] = [(DType::F32, 1e-4), (DType::BF16, 2e-2)];
/// Draws of the sensitivity.
const DRAWS: u64 = 32;

/// Whether a gradient into the input is compared, and how near it can lie in bf16.
#[derive(Clone, Copy, PartialEq)]
enum Gradient {
    /// The network passes none.
    None,
    /// The derivative is continuous: its error is of the size of the values' error.
    Smooth,
    /// ReLU, PReLU, maximum pooling or a clamp. Rounding lets a fraction of the signs (or of the largest values of
    /// windows) change, each of which switches a path of the gradient on or off: of a fraction `p` of switched paths
    /// the relative error is about `sqrt(p)`, so much larger than that of the values. PyTorch's bf16 shows the same
    /// (docs/networks.md). The limit is therefore measured: see [`sensitivity`].
    Kinked,
}

/// The outputs, and the gradient of a random weighting of them into the input.
fn run(network: &Run, input: &Tensor, gradient: Gradient) -> Result<Vec<Tensor>> {
    if gradient == Gradient::None {
        return network(input);
    }
    let input = Var::from_tensor(input)?;
    let mut outputs = network(&input)?;
    let mut loss = Tensor::zeros((), DType::F32, input.device())?;
    for output in &outputs {
        let weights = random("gradient of the output", output.dims()).to_device(output.device())?;
        loss = (loss + (output.to_dtype(DType::F32)? * weights)?.sum_all()?)?;
    }
    let gradients = loss.backward()?;
    outputs.push(gradients.get(&input).expect("the input has a gradient").clone());
    Ok(outputs)
}

/// Collects what lies too far apart, so that one run tells all.
#[derive(Default)]
struct Report {
    failures: Vec<String>,
}

impl Report {
    /// Compares a network on the GPU, in f32 and bf16, with the CPU in f32, on weights and inputs exact in both.
    fn compare(
        &mut self,
        name: &str,
        input: &Tensor,
        gradient: Gradient,
        load: impl Fn(&Weights, DType, &Device) -> Result<Run>,
    ) {
        if let Some(device) = gpu()
            && let Err(error) = compare(&device, name, (input, gradient), load, &mut self.failures)
        {
            self.failures.push(format!("{name}: {error}"));
        }
    }

    fn finish(self) {
        assert!(self.failures.is_empty(), "{:#?}", self.failures);
    }
}

/// How far the f32 gradient on the CPU moves, as root mean square over draws, when every weight and every number of the
/// input moves by bf16's rounding. That a layer rounds its output is the same as exact arithmetic on weights so moved,
/// thus every layer's activations move by about as much as in bf16, and as many signs change.
///
/// What the limit that follows finds is a fault of the bf16 code alone: a gradient of zero has an error of 1, YuNet's last
/// maximum pooling with its gradient spread evenly one of 0.89, a stage of it without its mask 0.49 (limit 0.43), SFace with
/// one mask that takes the slope for 0 of 0.25 (limit 0.23). A path of little weight that is lost is found in f32, in which
/// the same code is held to 1e-4.
fn sensitivity(
    load: &impl Fn(&Weights, DType, &Device) -> Result<Run>,
    weights: &BTreeMap<String, Tensor>,
    (input, gradient): (&Tensor, Gradient),
    expected: &Tensor,
) -> Result<f64> {
    root_mean_square(DRAWS, |draw| {
        let at = |place: usize| Address::new(12, "rounding").step(draw).sample(place);
        let moved = |x: &Tensor, place: usize| moved(x, DType::BF16, at(place));
        let weights = weights.iter().enumerate().map(|(i, (name, x))| Ok((name.clone(), moved(x, i + 1)?)));
        let weights = Weights::frozen("moved weights", weights.collect::<Result<_>>()?);
        let network = load(&weights, DType::F32, &Device::Cpu)?;
        let found = run(&network, &moved(input, 0)?, gradient)?;
        Ok(error(found.last().expect("a gradient"), expected))
    })
}

/// Writes what `tests/fixtures/bf16_gradients.py` asks for, to compute the same in PyTorch.
fn write_case(
    folder: &Path,
    name: &str,
    weights: &BTreeMap<String, Tensor>,
    input: &Tensor,
    expected: &[Tensor],
) -> Result<()> {
    let mut all: HashMap<String, Tensor> =
        weights.iter().map(|(name, tensor)| (format!("weights.{name}"), tensor.clone())).collect();
    all.insert("input".into(), input.clone());
    all.insert("other".into(), other_images()?);
    for (i, tensor) in expected.iter().enumerate() {
        all.insert(format!("expected.{i}"), tensor.contiguous()?);
        all.insert(format!("ow.{i}"), random("gradient of the output", tensor.dims()));
    }
    let size = input.dims().last().copied().unwrap_or(0);
    candle_core::safetensors::save(&all, folder.join(format!("{}_{size}.safetensors", name.replace(' ', "_"))))?;
    Ok(())
}

fn compare(
    device: &Device,
    name: &str,
    (input, gradient): (&Tensor, Gradient),
    load: impl Fn(&Weights, DType, &Device) -> Result<Run>,
    failures: &mut Vec<String>,
) -> Result<()> {
    let parameters = Parameters::new();
    let _ = load(&Weights::trainable(&parameters, 5, DType::F32, &Device::Cpu), DType::F32, &Device::Cpu)?;
    for (dtype, limit) in LIMITS {
        let place = |(name, variable): (String, Var)| -> Result<(String, Tensor)> {
            Ok((name, variable.as_detached_tensor().to_dtype(dtype)?.to_dtype(DType::F32)?))
        };
        let weights = parameters.all().into_iter().map(place).collect::<Result<BTreeMap<_, _>>>()?;
        let placed = |(name, tensor): (&String, &Tensor)| -> Result<(String, Tensor)> {
            Ok((name.clone(), tensor.to_dtype(dtype)?.to_device(device)?))
        };
        let on_device = weights.iter().map(placed).collect::<Result<HashMap<_, _>>>()?;
        let rounded = if input.dtype().is_float() { input.to_dtype(dtype)? } else { input.clone() };
        let exact = if input.dtype().is_float() { rounded.to_dtype(DType::F32)? } else { input.clone() };
        let on_cpu =
            load(&Weights::frozen("random weights", weights.clone().into_iter().collect()), DType::F32, &Device::Cpu)?;
        let on_gpu = load(&Weights::frozen("random weights", on_device), dtype, device)?;
        let expected = run(&on_cpu, &exact, gradient)?;
        if let Some(folder) = std::env::var_os("WRITE_NETWORKS").filter(|_| dtype == DType::BF16) {
            write_case(Path::new(&folder), name, &weights, &exact, &expected)?;
        }
        let found = run(&on_gpu, &rounded.to_device(device)?, gradient)?;
        let count = expected.len();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let (mut limit, mut what) = (limit, format!("output {i}"));
            if gradient != Gradient::None && i + 1 == count {
                what = "gradient of the input".to_string();
                if gradient == Gradient::Kinked && dtype == DType::BF16 {
                    let moves = sensitivity(&load, &weights, (&exact, gradient), expected)?;
                    limit = limit.max(BEYOND * moves);
                    what += &format!(" (moves by {moves:.2e})");
                    if !limit.lt(&SAYS_NOTHING) {
                        failures.push(format!("{name} {dtype:?}, {what}: too sensitive to be compared"));
                    }
                }
            }
            let error = error(found, expected);
            println!("{name} {dtype:?} {what}: {error:.2e}");
            if numbers(expected).iter().all(|number| *number == 0.0) {
                failures.push(format!("{name} {dtype:?}, {what}: zero, which says nothing"));
            }
            // NaN is too far apart as well.
            if !error.lt(&limit) {
                failures.push(format!("{name} {dtype:?}, {what}: error {error:.2e}, limit {limit:.1e}"));
            }
        }
    }
    Ok(())
}

/// What LPIPS compares images with; bf16 holds it exactly.
fn other_images() -> Result<Tensor> {
    Ok(random("other images", &[2, 3, 35, 35]).to_dtype(DType::BF16)?.to_dtype(DType::F32)?)
}

fn images(size: usize) -> Tensor {
    (random("images", &[2, 3, size, size]) * 0.5).unwrap()
}

#[test]
fn the_unet_equals_the_cpu() -> Result<()> {
    let mut report = Report::default();
    let config = MiniConfig::tiny().unet;
    for freeu in [None, Some(FreeU::sdxl())] {
        report.compare("unet", &random("latents", &[2, 4, 8, 8]), Gradient::Smooth, |weights, dtype, device| {
            let unet = UNet::load(&config, weights)?;
            let place = |tensor: Tensor| -> Result<Tensor> { Ok(tensor.to_dtype(dtype)?.to_device(device)?) };
            let rounded = |tensor: Tensor| -> Result<Tensor> { place(tensor.to_dtype(DType::BF16)?) };
            let text = rounded(random("text", &[2, 7, config.cross_attention_dim]))?;
            let conditioning = Conditioning::square(text, rounded(random("pooled", &[2, config.pooled_dim]))?, 32);
            let pass = Pass { freeu, ..Pass::default() };
            Ok(Box::new(move |x| Ok(vec![unet.forward(x, &[20, 700], &conditioning, &pass)?])))
        });
    }
    report.finish();
    Ok(())
}

#[test]
fn autoencoders_equal_the_cpu() -> Result<()> {
    let mut report = Report::default();
    let taesd = taesd::Config { width: 16, ..MiniConfig::tiny().autoencoder };
    let config = taesd.clone();
    report.compare("taesd encode", &images(16), Gradient::Kinked, move |weights, _, _| {
        let network = taesd::Taesd::load(&config, weights)?;
        Ok(Box::new(move |x| Ok(vec![network.encode(x)?])))
    });
    report.compare("taesd decode", &random("latents", &[2, 4, 4, 4]), Gradient::Kinked, move |weights, _, _| {
        let network = taesd::Taesd::load(&taesd, weights)?;
        Ok(Box::new(move |x| Ok(vec![network.decode(x)?])))
    });
    // The second has a head too wide for one kernel, as the published autoencoder has.
    for (widths, groups) in [(vec![8, 16], 4), (vec![16, 272], 16)] {
        let config = autoencoder_kl::Config {
            block_out_channels: widths.clone(),
            layers_per_block: 1,
            norm_num_groups: groups,
            ..autoencoder_kl::Config::sdxl()
        };
        let decoder = config.clone();
        report.compare(
            &format!("autoencoder_kl encode {widths:?}"),
            &images(16),
            Gradient::Smooth,
            move |weights, _, _| {
                let network = autoencoder_kl::AutoencoderKl::load(&config, weights)?;
                Ok(Box::new(move |x| Ok(vec![LatentEncoder::encode(&network, x, Address::new(3, "posterior"))?])))
            },
        );
        let latents = random("latents", &[2, 4, 6, 5]);
        report.compare(
            &format!("autoencoder_kl decode {widths:?}"),
            &latents,
            Gradient::Smooth,
            move |weights, _, _| {
                let network = autoencoder_kl::AutoencoderKl::load(&decoder, weights)?;
                Ok(Box::new(move |x| Ok(vec![LatentDecoder::decode(&network, x)?])))
            },
        );
    }
    report.finish();
    Ok(())
}

#[test]
fn clip_and_the_resampler_equal_the_cpu() -> Result<()> {
    let mut report = Report::default();
    let tiny = MiniConfig::tiny();
    let end = tiny.text_encoder.eos_token_id;
    let ids = Tensor::new(&[[1u32, 2, 3, end], [4, 5, end, end]], &Device::Cpu)?;
    report.compare("clip_text", &ids, Gradient::None, |weights, _, _| {
        let network = clip_text::ClipText::load(&tiny.text_encoder, weights)?;
        Ok(Box::new(move |x| {
            let text = network.forward(x)?;
            Ok(vec![text.hidden_states, text.pooled])
        }))
    });
    // On a GPU pictures are not rounded to bytes before and after they are made smaller, as they are on the CPU; they are
    // clamped in both places.
    for size in [32, 48] {
        report.compare("clip_vision features", &images(size), Gradient::Kinked, |weights, _, device| {
            let network = clip_vision::ClipVision::load(&tiny.image_encoder, weights)?;
            let on_cpu = device.is_cpu();
            Ok(Box::new(move |x| {
                Ok(vec![match on_cpu {
                    true => network.penultimate_hidden_states(&network.preprocess(x)?)?,
                    false => network.features(x)?,
                }])
            }))
        });
    }
    report.compare("clip_vision", &images(32), Gradient::Smooth, |weights, _, _| {
        let network = clip_vision::ClipVision::load(&tiny.image_encoder, weights)?;
        Ok(Box::new(move |x| {
            let image = network.forward(x)?;
            Ok(vec![image.hidden_states, image.pooled])
        }))
    });
    report.compare(
        "resampler",
        &random("features", &[2, 17, tiny.resampler.embedding_dim]),
        Gradient::Smooth,
        |weights, _, _| {
            let network = resampler::Resampler::load(&tiny.resampler, weights)?;
            Ok(Box::new(move |x| Ok(vec![network.forward(x)?])))
        },
    );
    report.finish();
    Ok(())
}

#[test]
fn identity_networks_equal_the_cpu() -> Result<()> {
    let mut report = Report::default();
    fn embed(network: impl IdentityNetwork + 'static) -> Result<Run> {
        Ok(Box::new(move |x| Ok(vec![network.embed(x)?])))
    }
    let tiny = MiniConfig::tiny().identity_network;
    report.compare("mini_identity", &images(tiny.crop_size), Gradient::Kinked, |weights, _, _| {
        embed(mini_identity::MiniIdentity::load(&tiny, weights)?)
    });
    for se_reduction in [Some(2), None] {
        let config = ir_resnet::Config {
            crop_size: 16,
            input_width: 8,
            widths: vec![8, 12],
            blocks: vec![2, 1],
            se_reduction,
            dimension: 16,
            affine_output: true,
        };
        report.compare("ir_resnet", &images(16), Gradient::Kinked, |weights, _, _| {
            embed(ir_resnet::IrResnet::load(&config, weights)?)
        });
    }
    let config = iresnet::Config { crop_size: 16, widths: [8, 8, 8, 8], layers: [1, 1, 1, 1], dimension: 16 };
    report.compare("iresnet", &images(16), Gradient::Kinked, |weights, _, _| {
        embed(iresnet::IResnet::load(&config, weights)?)
    });
    let config =
        sface::Config { crop_size: 8, input_width: 8, widths: vec![8, 16], strides: vec![1, 2], dimension: 16 };
    report.compare("sface", &images(8), Gradient::Kinked, |weights, _, _| embed(sface::SFace::load(&config, weights)?));
    let stage = |expansion, width, stride| mobile_face_net::Stage { expansion, width, blocks: 1, stride };
    let config = mobile_face_net::Config {
        crop_size: 16,
        input_width: 8,
        stages: vec![stage(8, 8, 2), stage(16, 8, 1)],
        dimension: 16,
        ..mobile_face_net::Config::fr_feature()
    };
    report.compare("mobile_face_net", &images(16), Gradient::Kinked, |weights, _, _| {
        embed(mobile_face_net::MobileFaceNet::load(&config, weights)?)
    });
    report.finish();
    Ok(())
}

#[test]
fn face_locators_and_lpips_equal_the_cpu() -> Result<()> {
    let mut report = Report::default();
    let tiny = MiniConfig::tiny().face_locator;
    for size in [16, 24] {
        report.compare("mini_face_locator", &images(size), Gradient::Kinked, |weights, _, _| {
            let network = mini_face_locator::MiniFaceLocator::load(&tiny, weights)?;
            Ok(Box::new(move |x| {
                let prediction = network.forward(x)?;
                Ok(vec![prediction.landmarks, prediction.presence])
            }))
        });
    }
    let config = yunet::Config { widths: [8, 8, 8, 8, 8, 8], ..yunet::Config::yunet() };
    report.compare("yunet", &images(40), Gradient::Kinked, |weights, _, _| {
        let network = yunet::YuNet::load(&config, weights)?;
        Ok(Box::new(move |x| {
            let levels = network.levels(x)?;
            Ok(levels.into_iter().flat_map(|l| [l.scores, l.objectness, l.boxes, l.landmarks]).collect())
        }))
    });
    for config in [lpips::Config::alex(), lpips::Config::vgg()] {
        let config = lpips::Config { widths: [8, 8, 16, 16, 16], ..config };
        report.compare(
            &format!("lpips {:?}", config.backbone),
            &images(35),
            Gradient::Kinked,
            |weights, dtype, device| {
                let network = lpips::Lpips::load(&config, weights, weights)?;
                let other = other_images()?.to_dtype(dtype)?.to_device(device)?;
                Ok(Box::new(move |x| Ok(vec![network.forward(x, &other)?])))
            },
        );
    }
    report.finish();
    Ok(())
}

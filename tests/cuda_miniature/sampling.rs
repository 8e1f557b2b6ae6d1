//! Pictures of the miniature.

use candle_core::{DType, Device, Tensor};
use lcm_lookahead::lookahead::FaceEncoder;
use lcm_lookahead::mini::portrait::Portrait;
use lcm_lookahead::nn::{Parameters, Weights};
use lcm_lookahead::personalize::Options;
use lcm_lookahead::random::Address;
use lcm_lookahead::train::TrainConfig;
use lcm_lookahead::{Guidance, Personalizer, Result, SamplerKind, mini};

use crate::{gpu, numbers};

/// The mean of the absolute difference of two pictures in [-1, 1].
fn mean_difference(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (numbers(a), numbers(b));
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| (a.clamp(-1.0, 1.0) - b.clamp(-1.0, 1.0)).abs()).sum::<f64>() / a.len() as f64
}

/// A picture drawn by the pretrained adapter, or by an encoder with a KV branch that is a little off zero.
fn picture(dtype: DType, device: &Device, options: &Options, kv: bool) -> Result<Tensor> {
    let base = mini::base(dtype, device)?;
    let resampler = mini::face_encoder_config().resampler;
    let mut tensors = mini::adapter_tensors()?;
    let personalizer = match kv {
        false => Personalizer::from_adapter(base, &resampler, tensors)?,
        true => {
            let parameters = Parameters::new();
            let weights = Weights::trainable(&parameters, 7, DType::F32, &Device::Cpu);
            let on_cpu = mini::base(DType::F32, &Device::Cpu)?;
            FaceEncoder::load(&mini::face_encoder_config(), &on_cpu.unet, &weights, &weights)?;
            for (i, (name, variable)) in parameters.all().into_iter().enumerate() {
                if !FaceEncoder::is_adapter_parameter(&name) {
                    let noise =
                        Address::new(9, "value").sample(i).normal(variable.shape(), DType::F32, &Device::Cpu)?;
                    tensors.insert(name, (variable.as_detached_tensor() + (noise * 0.02)?)?);
                }
            }
            Personalizer::from_tensors(base, &resampler, &TrainConfig::mini(), "test", &tensors)?
        }
    };
    let reference = personalizer.reference(&Portrait::shipped().render(mini::RESOLUTION as u32).image)?;
    personalizer.generate_tensor(
        &reference,
        &["an oil painting of a face".into(), "a face in a forest".into()],
        options,
    )
}

#[test]
fn pictures_equal_those_of_the_cpu() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let options = |sampler, steps, guidance| Options { sampler, steps, guidance, ..Options::default() };
    let cases = [
        (options(SamplerKind::DpmSolverPlusPlus, 8, Guidance::Plain { scale: 5.0 }), false),
        (options(SamplerKind::DpmSolverPlusPlus, 8, Guidance::official()), true),
        (options(SamplerKind::Euler, 6, Guidance::Plain { scale: 3.0 }), true),
        (options(SamplerKind::Ddim, 6, Guidance::None), true),
        (options(SamplerKind::Lcm, 4, Guidance::None), true),
        (Options { reference_interval: 3, ..options(SamplerKind::Ddim, 7, Guidance::None) }, true),
    ];
    let mut failures = Vec::new();
    for (options, kv) in cases {
        // The KV encoder's passes are for two steps each on the GPU.
        let one_by_one = Options { reference_steps: 1, ..options.clone() };
        let expected = picture(DType::F32, &Device::Cpu, &one_by_one, kv)?;
        for (dtype, limit) in [(DType::F32, 1e-3), (DType::BF16, 1e-1)] {
            let difference = mean_difference(&picture(dtype, &device, &options, kv)?, &expected);
            println!("{} {:?} kv {kv} {dtype:?}: mean difference {difference:.2e}", options.sampler, options.guidance);
            if !difference.lt(&limit) {
                failures.push(format!("{} kv {kv} {dtype:?}: {difference:.2e}, limit {limit:.0e}", options.sampler));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    Ok(())
}

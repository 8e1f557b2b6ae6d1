use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use lcm_lookahead::data::load_image;
use lcm_lookahead::formats::TensorFile;
use lcm_lookahead::personalize::Options;
use lcm_lookahead::random::Address;
use lcm_lookahead::sdxl::SdxlFiles;
use lcm_lookahead::{Base, Guidance, Personalizer, SamplerKind};

use crate::layout::{Layout, fixture};
use crate::{base, relative_error};

const PROMPTS: [&str; 2] = ["a photo of a face in the forest", "an oil painting of a face"];

fn draw(layout: &Layout, dtype: DType, options: &Options) -> Result<Tensor> {
    let (base, files) = base(layout, dtype)?;
    draw_with(base, &files, dtype, options)
}

fn draw_with(base: Base, files: &SdxlFiles, dtype: DType, options: &Options) -> Result<Tensor> {
    let adapter = files.adapter(base.unet.config())?;
    let tensors = adapter.tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?)));
    let personalizer = Personalizer::from_adapter(base, &adapter.resampler, tensors.collect::<Result<_>>()?)?;
    let reference = personalizer.reference(&load_image(fixture("sdxl_small/reference.png"))?)?;
    Ok(personalizer.generate_tensor(&reference, &PROMPTS.map(String::from), options)?)
}

/// diffusers' pipeline of the same files: 10 DDIM steps, guidance 5, the IP-Adapter at 0.8.
fn options() -> Options {
    Options {
        steps: 10,
        sampler: SamplerKind::Ddim,
        guidance: Guidance::Plain { scale: 5.0 },
        adapter_scale: 0.8,
        ..Options::default()
    }
}

#[test]
fn text_and_a_reference_picture_become_the_pictures_that_diffusers_draws() -> Result<()> {
    // The fixture's script started from the noise that the crate draws.
    let noise = TensorFile::open(fixture("sdxl_small/noise.safetensors"))?.load("noise", &Device::Cpu)?;
    let own = Address::new(0, "initial noise").normal_batch(2, (4, 8, 8), DType::F32, &Device::Cpu)?;
    assert_eq!(noise.flatten_all()?.to_vec1::<f32>()?, own.flatten_all()?.to_vec1::<f32>()?);

    let layout = Layout::new()?;
    let expected = TensorFile::open(fixture("sdxl_small/result.safetensors"))?.load("images", &Device::Cpu)?;
    for dtype in [DType::F32, DType::F64] {
        let images = draw(&layout, dtype, &options())?.affine(0.5, 0.5)?.clamp(0.0, 1.0)?;
        let error = relative_error(&images, &expected)?;
        println!("sdxl_small, text and reference to picture ({dtype:?}): relative error {error:.1e}");
        ensure!(error < 1e-3, "{dtype:?}: relative error {error:e}");
    }
    Ok(())
}

#[test]
fn encoders_that_are_opened_on_demand_draw_the_same_pictures() -> Result<()> {
    let layout = Layout::new()?;
    let (_, files) = base(&layout, DType::F32)?;
    let lean = Base::sdxl_lean(&files, DType::F32, &Device::Cpu)?;
    let pictures = draw_with(lean, &files, DType::F32, &Options::lcm())?;
    let expected = draw(&layout, DType::F32, &Options::lcm())?;
    assert_eq!(pictures.flatten_all()?.to_vec1::<f32>()?, expected.flatten_all()?.to_vec1::<f32>()?);
    // What does not fit is found when the base is assembled, not when it first draws.
    let wrong = SdxlFiles { image_encoder: files.autoencoder.clone(), ..files };
    ensure!(Base::sdxl_lean(&wrong, DType::F32, &Device::Cpu).is_err());
    Ok(())
}

#[test]
fn the_reference_the_text_and_the_lcm_lora_all_show_in_the_picture() -> Result<()> {
    let layout = Layout::new()?;
    let plain = draw(&layout, DType::F32, &options())?;
    let other_text = (plain.get(0)? - plain.get(1)?)?.abs()?.mean_all()?.to_scalar::<f32>()?;
    ensure!(other_text > 1e-3, "{other_text}");
    let without = draw(&layout, DType::F32, &Options { adapter_scale: 0.0, ..options() })?;
    ensure!(relative_error(&without, &plain)? > 1e-3);
    let lcm = draw(&layout, DType::F32, &Options::lcm())?;
    ensure!(lcm.dims() == [2, 3, 32, 32] && relative_error(&lcm, &plain)? > 1e-3);
    Ok(())
}

#[test]
#[ignore = "writes the noise that tests/fixtures/sdxl_small.py starts from"]
fn write_the_noise() -> Result<()> {
    let noise = Address::new(0, "initial noise").normal_batch(2, (4, 8, 8), DType::F32, &Device::Cpu)?;
    let tensors = [("noise".to_string(), noise)].into();
    Ok(lcm_lookahead::formats::write_safetensors(
        fixture("sdxl_small/noise.safetensors"),
        &tensors,
        &Default::default(),
    )?)
}

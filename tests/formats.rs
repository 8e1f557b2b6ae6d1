//! Files that Python wrote (`tests/fixtures/formats.py`), read, computed with, and written back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use lcm_lookahead::formats::diffusers::{Folder, clip_vision_config, unet_config};
use lcm_lookahead::formats::lora::{Layout, LoraFile};
use lcm_lookahead::formats::{self, EncoderFile, TensorFile, ip_adapter, official};
use lcm_lookahead::lookahead::FaceEncoder;
use lcm_lookahead::models::clip_vision::ClipVision;
use lcm_lookahead::models::ip_adapter::IpAdapter;
use lcm_lookahead::models::resampler::Resampler;
use lcm_lookahead::models::unet::{self, Conditioning, ImageTokens, Pass, UNet};
use lcm_lookahead::nn::{Loras, Weights};
use lcm_lookahead::{Error, formats::StoredDtype};

/// Both sides compute in f64, with the weights of the files.
const RELATIVE: f64 = 1e-10;
/// We compute in f32, diffusers in f64.
const RELATIVE_F32: f64 = 1e-4;

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/formats")).join(name)
}

fn all(file: &TensorFile) -> Result<BTreeMap<String, Tensor>> {
    file.names().map(|name| Ok((name.to_string(), file.load(name, &Device::Cpu)?))).collect()
}

fn assert_same(found: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) -> Result<()> {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, tensor) in found {
        let expected = &expected[name];
        ensure!(tensor.dims() == expected.dims(), "{name}: {:?}, expected {:?}", tensor.dims(), expected.dims());
        ensure!(tensor.dtype() == expected.dtype(), "{name}: {:?}, not {:?}", tensor.dtype(), expected.dtype());
        let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        assert_eq!(numbers(tensor)?, numbers(expected)?, "{name}");
    }
    Ok(())
}

fn assert_close(name: &str, found: &Tensor, expected: &Tensor, relative: f64) -> Result<()> {
    let norm = |x: &Tensor| -> Result<f64> { Ok(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    let error = norm(&(found - expected)?)? / norm(expected)?;
    println!("{name}: relative error {error:.1e}");
    ensure!(error < relative, "{name}: relative error {error:e}");
    Ok(())
}

fn outputs() -> Result<BTreeMap<String, Tensor>> {
    all(&TensorFile::open(fixture("outputs.safetensors"))?)
}

fn config(base: &str) -> Result<unet::Config> {
    Ok(unet_config(&Folder::open(fixture(base), None)?.component("unet")?.config()?)?)
}

fn unet_of(folder: &str, variant: Option<&str>) -> Result<UNet> {
    unet_as(folder, variant, DType::F64)
}

fn unet_as(folder: &str, variant: Option<&str>, dtype: DType) -> Result<UNet> {
    let folder = Folder::open(fixture(folder), variant)?.component("unet")?;
    let config = unet_config(&folder.config()?)?;
    Ok(UNet::load(&config, &folder.weights(&UNet::shapes(&config)?, dtype, &Device::Cpu)?)?)
}

fn run(unet: &UNet, pass: &Pass) -> Result<Tensor> {
    let given = outputs()?;
    let conditioning = Conditioning::square(given["text"].clone(), given["pooled"].clone(), 8);
    Ok(unet.forward(&given["latents"], &[3, 801], &conditioning, pass)?)
}

#[test]
fn pytorch_files_hold_what_torch_saved_views_and_all_types_included() -> Result<()> {
    let expected = all(&TensorFile::open(fixture("tensors.safetensors"))?)?;
    // The second in the format of before version 1.6.
    for name in ["tensors.pth", "legacy.pth"] {
        let file = TensorFile::open(fixture(name))?;
        assert_same(&all(&file)?, &expected)?;
        assert_eq!(file.info("state.bool").map(|info| info.dtype), Some(StoredDtype::Bool));
    }
    Ok(())
}

#[test]
fn onnx_initialisers_are_read_in_every_form() -> Result<()> {
    let expected = all(&TensorFile::open(fixture("onnx.safetensors"))?)?;
    assert_same(&all(&TensorFile::open(fixture("model.onnx"))?)?, &expected)
}

#[test]
fn a_unet_in_one_file_and_in_shards_computes_what_diffusers_does() -> Result<()> {
    let expected = &outputs()?["plain"];
    for (folder, variant) in [("base", None), ("base", Some("fp16")), ("sharded", Some("fp16")), ("sharded", None)] {
        assert_close(folder, &run(&unet_of(folder, variant)?, &Pass::default())?, expected, RELATIVE)?;
    }
    // In f32, with a LoRA, an adapter's image tokens and nothing but text.
    let (unet, given) = (unet_as("base", None, DType::F32)?, outputs()?);
    let f32 = |name: &str| given[name].to_dtype(DType::F32);
    let conditioning = Conditioning::square(f32("text")?, f32("pooled")?, 8);
    let lora = LoraFile::open(fixture("lora_peft"), unet.config())?.to_set(DType::F32, &Device::Cpu)?;
    let adapter = ip_adapter::read(fixture("ip_adapter.bin"), unet.config())?;
    let weights = Weights::frozen("ip_adapter.bin", adapter.tensors.into_iter().collect());
    let tokens = Resampler::load(&adapter.resampler, &weights.pp("image_proj"))?.forward(&f32("features")?)?;
    let key_values = IpAdapter::load(&unet, &weights.pp("ip_adapter"))?.project(&tokens)?;
    let image_tokens = Some(ImageTokens { key_values, scale: 0.6 });
    for (name, pass) in [
        ("plain", Pass::default()),
        ("lora", Pass { loras: Loras::one(&lora, 1.0), ..Pass::default() }),
        ("ip_adapter", Pass { image_tokens, ..Pass::default() }),
    ] {
        let found = unet.forward(&f32("latents")?, &[3, 801], &conditioning, &pass)?;
        assert_close(&format!("{name} (F32)"), &found.to_dtype(DType::F64)?, &given[name], RELATIVE_F32)?;
    }
    let missing = unet_of("base", Some("bf16")).unwrap_err().to_string();
    ensure!(missing.contains("diffusion_pytorch_model.bf16.safetensors"), "{missing}");
    Ok(())
}

#[test]
fn an_image_encoders_folder_has_exactly_what_the_network_asks_for() -> Result<()> {
    let folder = Folder::open(fixture("base"), None)?.component("image_encoder")?;
    let (config, asked) = (clip_vision_config(&folder.config()?)?, Weights::shapes_only());
    ClipVision::load(&config, &asked)?;
    ClipVision::load(&config, &folder.weights(&asked.shapes(), DType::F32, &Device::Cpu)?)?;
    Ok(())
}

#[test]
fn missing_extra_and_misshapen_tensors_of_a_component_are_named_before_any_is_read() -> Result<()> {
    let original = all(&Folder::open(fixture("small"), None)?.component("unet")?.tensors()?)?;
    let shapes = UNet::shapes(&config("small")?)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("diffusion_pytorch_model.safetensors");
    let fault = |name: &str, tensor: Option<Tensor>| -> Result<String> {
        let mut tensors = original.clone();
        match tensor {
            Some(tensor) => tensors.insert(name.to_string(), tensor),
            None => tensors.remove(name),
        };
        formats::write_safetensors(&path, &tensors, &BTreeMap::new())?;
        let error = Folder::open(folder.path(), None)?.weights(&shapes, DType::F32, &Device::Cpu).unwrap_err();
        let Error::Tensor { file, tensor, found, .. } = error else { anyhow::bail!("{error}") };
        assert_eq!((file, tensor.as_str()), (path.display().to_string(), name));
        Ok(found)
    };
    let zeros = |size: usize| Tensor::zeros(size, DType::F16, &Device::Cpu);
    assert_eq!(fault("conv_in.bias", None)?, "nothing");
    assert_eq!(fault("conv_in.bias", Some(zeros(5)?))?, "shape [5]");
    assert_eq!(fault("other.bias", Some(zeros(5)?))?, "one of shape [5]");
    Ok(())
}

#[test]
fn a_lora_in_any_form_computes_what_peft_does() -> Result<()> {
    let unet = unet_of("base", None)?;
    let expected = &outputs()?["lora"];
    for name in [
        "lora_peft",
        "lora_diffusers",
        "lora_old.safetensors",
        "lora_kohya.safetensors",
        "lora_kohya_stability.safetensors",
    ] {
        let lora = LoraFile::open(fixture(name), unet.config()).context(name)?;
        let set = lora.to_set(DType::F64, &Device::Cpu)?;
        let pass = Pass { loras: Loras::one(&set, 1.0), ..Pass::default() };
        assert_close(name, &run(&unet, &pass)?, expected, RELATIVE)?;
        assert_eq!(lora.text_encoder_layers, usize::from(name == "lora_kohya.safetensors"), "{name}");
        let ranks: std::collections::BTreeSet<usize> = lora.layers.values().map(|layer| layer.rank()).collect();
        assert_eq!(ranks.into_iter().collect::<Vec<_>>(), [1, 2, 3], "{name}");
    }
    Ok(())
}

#[test]
fn a_lora_written_in_any_form_is_read_back_the_same() -> Result<()> {
    let unet = unet_of("base", None)?;
    let lora = LoraFile::open(fixture("lora_peft"), unet.config())?;
    let expected = &outputs()?["lora"];
    let folder = tempfile::tempdir()?;
    for layout in [Layout::Peft, Layout::Diffusers, Layout::DiffusersOld, Layout::Kohya, Layout::KohyaStability] {
        let place = folder.path().join(format!("{layout:?}"));
        let place = if layout == Layout::Peft { place } else { place.with_extension("safetensors") };
        lora.save(&place, layout, unet.config())?;
        let again = LoraFile::open(&place, unet.config()).with_context(|| format!("{layout:?}"))?;
        let set = again.to_set(DType::F64, &Device::Cpu)?;
        let pass = Pass { loras: Loras::one(&set, 1.0), ..Pass::default() };
        assert_close(&format!("{layout:?}"), &run(&unet, &pass)?, expected, RELATIVE)?;
    }
    Ok(())
}

#[test]
fn a_lora_for_another_architecture_is_refused_with_names() -> Result<()> {
    // The smaller U-Net lacks the third level; the full-size one has other widths.
    let small = LoraFile::open(fixture("lora_peft"), &config("small")?).unwrap_err();
    ensure!(matches!(small, Error::Format { .. }), "{small}");
    let text = small.to_string();
    ensure!(text.contains("another architecture") && text.contains("`down_blocks."), "{text}");
    ensure!(text.contains("lora_peft/adapter_model.safetensors"), "{text}");
    let sdxl = LoraFile::open(fixture("lora_kohya.safetensors"), &unet::Config::sdxl()).unwrap_err();
    ensure!(matches!(sdxl, Error::Tensor { .. }), "{sdxl}");
    Ok(())
}

#[test]
fn an_ip_adapter_in_both_forms_computes_what_diffusers_does() -> Result<()> {
    let unet = unet_of("base", None)?;
    let given = outputs()?;
    let folder = tempfile::tempdir()?;
    let mut files: Vec<PathBuf> = ["ip_adapter.bin", "ip_adapter.safetensors"].map(fixture).to_vec();
    for name in ["again.bin", "again.safetensors"] {
        let adapter = ip_adapter::read(&files[0], unet.config())?;
        ip_adapter::write(folder.path().join(name), &adapter.tensors)?;
        files.push(folder.path().join(name));
    }
    for path in files {
        let adapter = ip_adapter::read(&path, unet.config())?;
        let tensors = adapter.tensors.iter().map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(DType::F64)?)));
        let weights = Weights::frozen(path.display().to_string(), tensors.collect::<Result<_>>()?);
        let resampler = Resampler::load(&adapter.resampler, &weights.pp("image_proj"))?;
        let projections = IpAdapter::load(&unet, &weights.pp("ip_adapter"))?;
        let tokens = resampler.forward(&given["features"])?;
        let image_tokens = Some(ImageTokens { key_values: projections.project(&tokens)?, scale: 0.6 });
        let found = run(&unet, &Pass { image_tokens, ..Pass::default() })?;
        assert_close(&path.display().to_string(), &found, &given["ip_adapter"], RELATIVE)?;
    }
    Ok(())
}

#[test]
fn an_ip_adapter_of_another_kind_or_unet_is_refused() -> Result<()> {
    let error = ip_adapter::read(fixture("tensors.safetensors"), &config("base")?).unwrap_err().to_string();
    ensure!(error.contains("not an IP-Adapter Plus"), "{error}");
    let error = ip_adapter::read(fixture("ip_adapter.bin"), &config("small")?).unwrap_err();
    ensure!(matches!(error, Error::Tensor { .. }), "{error}");
    Ok(())
}

#[test]
fn the_official_checkpoint_is_reduced_to_what_is_new_and_rebuilt_name_by_name() -> Result<()> {
    let small = config("small")?;
    let base = Folder::open(fixture("small"), None)?.component("unet")?.tensors()?;
    let read = official::read(fixture("official.bin"), &small, Some(&base))?;
    assert_eq!(read.compared, base.len());
    let kv = read.config.kv_encoder.clone().context("a KV branch")?;
    assert_eq!((kv.encoder_lora_rank, kv.kv_lora_rank), (3, 2));
    assert_eq!(official::read(fixture("official.bin"), &small, None)?.compared, 0);

    // The parameters load as a face encoder.
    let weights = Weights::frozen("official.bin", read.tensors.clone().into_iter().collect());
    let unet = UNet::load(&small, &Weights::shapes_only())?;
    FaceEncoder::load(&read.config, &unet, &weights, &weights)?;

    let folder = tempfile::tempdir()?;
    let place = folder.path().join("export.bin");
    let image_encoder = Folder::open(fixture("base"), None)?.component("image_encoder")?.tensors()?;
    official::write(
        &place,
        &official::Sources {
            config: &read.config,
            tensors: &read.tensors,
            unet: &small,
            base: &base,
            image_encoder: &image_encoder,
        },
    )?;
    let (written, original) = (TensorFile::open(&place)?, TensorFile::open(fixture("official.bin"))?);
    assert_same(&all(&written)?, &all(&original)?)
}

#[test]
fn an_official_checkpoint_of_another_base_is_refused_by_tensor() -> Result<()> {
    let small = config("small")?;
    let base = Folder::open(fixture("small"), None)?.component("unet")?.tensors()?;
    let folder = tempfile::tempdir()?;
    let mut tensors = all(&base)?;
    let changed = (&tensors["conv_out.weight"] * 1.5)?;
    tensors.insert("conv_out.weight".into(), changed);
    let path = folder.path().join("other.safetensors");
    formats::write_safetensors(&path, &tensors, &BTreeMap::new())?;
    let error = official::read(fixture("official.bin"), &small, Some(&TensorFile::open(&path)?)).unwrap_err();
    let Error::Tensor { file, tensor, .. } = &error else { anyhow::bail!("{error}") };
    ensure!(file.ends_with("official.bin") && tensor == "encoder_unet.conv_out.weight", "{error}");
    Ok(())
}

#[test]
fn a_face_encoder_is_the_same_in_every_form() -> Result<()> {
    let small = config("small")?;
    let read = EncoderFile::open(fixture("official.bin"), &small, None)?;
    let folder = tempfile::tempdir()?;
    let published = folder.path().join("encoder");
    let files = read.save(&published, &small)?;
    let names = ["ip_adapter.safetensors", "kv_encoder/encoder", "kv_encoder/export"];
    ensure!(files.len() == 3 && names.iter().all(|name| published.join(name).exists()), "{files:?}");
    let own = folder.path().join("parameters.safetensors");
    formats::write_safetensors(&own, &read.tensors, &BTreeMap::new())?;
    for path in [&published, &own] {
        let again = EncoderFile::open(path, &small, None)?;
        assert_same(&again.tensors, &read.tensors)?;
        assert_eq!(again.config.kv_encoder, read.config.kv_encoder);
    }
    let adapter = EncoderFile::open(fixture("ip_adapter.bin"), &config("base")?, None)?;
    ensure!(adapter.config.kv_encoder.is_none());

    let mut extra = read.tensors.clone();
    extra.insert("kv_encoder.other".into(), Tensor::zeros(1, DType::F32, &Device::Cpu)?);
    formats::write_safetensors(&own, &extra, &BTreeMap::new())?;
    let error = EncoderFile::open(&own, &small, None).unwrap_err().to_string();
    ensure!(error.contains("parameters.safetensors: tensor `kv_encoder.other`"), "{error}");
    Ok(())
}

#[test]
fn official_checkpoints_with_missing_extra_or_other_copies_are_refused_by_tensor() -> Result<()> {
    let small = config("small")?;
    let original = all(&TensorFile::open(fixture("official.bin"))?)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("changed.safetensors");
    let block = "encoder_unet.mid_block.attentions.0.transformer_blocks.0";
    let refused = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| -> Result<String> {
        let mut tensors = original.clone();
        change(&mut tensors);
        formats::write_safetensors(&path, &tensors, &BTreeMap::new())?;
        let error = official::read(&path, &small, None).unwrap_err();
        let Error::Tensor { tensor, .. } = error else { anyhow::bail!("{error}") };
        Ok(tensor)
    };
    for name in [
        format!("{block}.extract_kv2.to_k.weight"),
        format!("{block}.extract_kv1.source_attention_block.to_q.weight"),
        "image_proj_model.norm_out.bias".to_string(),
    ] {
        assert_eq!(refused(&|tensors| drop(tensors.remove(&name)))?, name);
    }
    let zeros = || Tensor::zeros((8, 8), DType::F32, &Device::Cpu).expect("memory");
    for name in ["encoder_unet.other.weight", "decoder_unet.conv_in.weight"] {
        assert_eq!(refused(&|tensors| drop(tensors.insert(name.to_string(), zeros())))?, name);
    }
    // Trained in full instead of by LoRA: nothing this crate could keep.
    let copy = format!("{block}.extract_kv1.to_v.weight");
    assert_eq!(refused(&|tensors| drop(tensors.insert(copy.clone(), zeros())))?, copy);
    Ok(())
}

#[test]
fn a_file_with_all_788_modules_of_lcm_lora_sdxl_is_read_for_sdxl() -> Result<()> {
    const TARGETS: [&str; 14] = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv2",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "time_emb_proj",
    ];
    let sdxl = unet::Config::sdxl();
    let mut tensors = BTreeMap::new();
    for (name, shape) in UNet::shapes(&sdxl)? {
        let Some(path) = name.strip_suffix(".weight") else { continue };
        if !TARGETS.iter().any(|target| path.ends_with(&format!(".{target}"))) {
            continue;
        }
        let ones = |shape: Vec<usize>| Tensor::ones(shape, DType::F16, &Device::Cpu);
        let (down, up) = match shape[..] {
            [output, input] => (vec![1, input], vec![output, 1]),
            _ => (vec![1, shape[1], shape[2], shape[3]], vec![shape[0], 1, 1, 1]),
        };
        let name = format!("lora_unet_{}", path.replace('.', "_"));
        tensors.insert(format!("{name}.lora_down.weight"), ones(down)?);
        tensors.insert(format!("{name}.lora_up.weight"), ones(up)?);
        tensors.insert(format!("{name}.alpha"), Tensor::new(8f32, &Device::Cpu)?);
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("pytorch_lora_weights.safetensors");
    formats::write_safetensors(&path, &tensors, &BTreeMap::new())?;
    let lora = LoraFile::open(folder.path(), &sdxl)?;
    assert_eq!(lora.layers.len(), 788);
    ensure!(lora.layers.values().all(|layer| layer.rank() == 1 && layer.alpha == 8.0));
    assert_eq!(lora.to_set(DType::F16, &Device::Cpu)?.len(), 788);
    Ok(())
}

/// A U-Net's file of some MB, opened in the file's type, in a process of its own: `VmHWM` is a process's highest.
#[test]
#[cfg(target_os = "linux")]
fn opening_a_unet_takes_no_more_memory_than_its_file_and_a_tenth() -> Result<()> {
    let config = unet::Config {
        block_out_channels: vec![64, 128, 256],
        transformer_layers_per_block: vec![0, 1, 2],
        attention_heads: vec![1, 2, 4],
        ..unet::Config::sdxl()
    };
    measure_opening("opening_a_unet_takes_no_more_memory_than_its_file_and_a_tenth", config)
}

#[test]
#[cfg(target_os = "linux")]
#[ignore = "takes 5.1 GB of memory"]
fn opening_the_unet_of_sdxl_takes_no_more_memory_than_its_file_and_a_tenth() -> Result<()> {
    measure_opening("opening_the_unet_of_sdxl_takes_no_more_memory_than_its_file_and_a_tenth", unet::Config::sdxl())
}

#[cfg(target_os = "linux")]
fn measure_opening(test: &str, config: unet::Config) -> Result<()> {
    const CHILD: &str = "LCM_LOOKAHEAD_MEMORY_TEST";
    if let Ok(path) = std::env::var(CHILD) {
        let status = |field: &str| -> Result<usize> {
            let status = std::fs::read_to_string("/proc/self/status")?;
            let line = status.lines().find(|line| line.starts_with(field)).context("no such field")?;
            Ok(line.split_whitespace().nth(1).context("no number")?.parse::<usize>()? * 1024)
        };
        // The program's own pages, which it touches with the first network it loads, are no memory of the weights.
        unet_of("base", None)?;
        let (before, length) = (status("VmHWM")?, std::fs::metadata(&path)?.len() as usize);
        let unet = UNet::load(&config, &Weights::from_safetensors(&path, DType::F16, &Device::Cpu)?)?;
        let taken = status("VmHWM")? - before;
        ensure!(taken < length + length / 10, "{taken} bytes for a file of {length}");
        ensure!(taken > length / 2 && unet.config() == &config, "the weights were not loaded: {taken} bytes");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("unet.safetensors");
    // A header, and zeros that take no room on the disk.
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in UNet::shapes(&config)? {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, serde_json::json!({"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}));
    }
    let header = serde_json::Value::Object(header).to_string();
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat())?;
    std::fs::OpenOptions::new().write(true).open(&path)?.set_len((8 + header.len() + end) as u64)?;
    let mut child = std::process::Command::new(std::env::current_exe()?);
    let child = child.args([test, "--exact", "--include-ignored"]).env(CHILD, &path).output()?;
    ensure!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    Ok(())
}

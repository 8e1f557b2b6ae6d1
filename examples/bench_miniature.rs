//! The miniature's work on the CPU, timed, and written down with its inputs and results, so that
//! `benches/peer/torch_miniature.py` can do the same work in PyTorch, compare the results, and be timed beside it.
//!
//! `cargo run --release --example bench_miniature`, then `python benches/peer/torch_miniature.py`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::bail;
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use lcm_lookahead::autograd::with_large_stack;
use lcm_lookahead::data::{Batch, DatasetConfig, GenerateConfig, generate_dataset, to_tensor};
use lcm_lookahead::mini::portrait::{HELD_OUT_COMBINATIONS, Identity, Portrait, Pose, Scene, Style};
use lcm_lookahead::mini::pretrain::HELD_OUT_FROM;
use lcm_lookahead::models::tokenizer::PromptTokenizer;
use lcm_lookahead::nn::{Parameters, Weights};
use lcm_lookahead::personalize::Options;
use lcm_lookahead::random::Address;
use lcm_lookahead::train::{AdamW, AdamWConfig, Gradients, LossReport, ParameterGroup, PendingReport, StepLosses};
use lcm_lookahead::{
    AnnealedTimestepSampler, Base, FaceDataset, FaceEncoder, ImageLoss, Pass, Personalizer, Result, TrainConfig, mini,
};

/// Times the miniature's forward pass, training iteration and sampled picture on the CPU.
#[derive(Parser)]
struct Arguments {
    /// What to measure: unet, training, picture; all three where none is named. References, with --encoder: what
    /// passes of the KV encoder for several steps, or for fewer steps, save and change
    parts: Vec<String>,
    /// The parameters.safetensors of a checkpoint, whose encoder `references` draws with
    #[arg(long, value_name = "FILE")]
    encoder: Option<PathBuf>,
    /// People whom `references` draws, in ten prompts each
    #[arg(long, default_value_t = 6)]
    people: usize,
    /// Folder for the inputs and results that the PyTorch script compares with
    #[arg(long, default_value = "out/bench_miniature")]
    out: PathBuf,
    /// Samples of a training iteration
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Times that each work is measured; the forward pass ten times as often
    #[arg(long, default_value_t = 5)]
    repeats: usize,
}

/// Inputs and results, by name.
type Tensors = HashMap<String, Tensor>;

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let base = mini::base(DType::F32, &Device::Cpu)?;
    if arguments.parts.iter().any(|part| part == "references") {
        let Some(encoder) = &arguments.encoder else { bail!("references: --encoder names an encoder's file") };
        references(&base, encoder, arguments.people, arguments.repeats.max(1))?;
    }
    if arguments.parts.iter().all(|part| part == "references") && !arguments.parts.is_empty() {
        return Ok(());
    }
    std::fs::create_dir_all(&arguments.out)?;
    for part in ["unet", "training", "picture"] {
        if !arguments.parts.is_empty() && !arguments.parts.iter().any(|asked| asked == part) {
            continue;
        }
        let (mut tensors, repeats) = (Tensors::new(), arguments.repeats.max(1));
        match part {
            "unet" => [1, 8].into_iter().try_for_each(|batch| forward(&base, batch, 10 * repeats, &mut tensors))?,
            "training" => with_large_stack(|| training(&base, arguments.batch, repeats, &mut tensors))?,
            _ => picture(&base, repeats, &mut tensors)?,
        }
        let path = arguments.out.join(format!("{part}.safetensors"));
        candle_core::safetensors::save(&tensors, &path)?;
    }
    println!("inputs and results: {}", arguments.out.display());
    Ok(())
}

/// Median and least milliseconds of a function, after one run to warm up, and the CPU time of a run.
fn report<T>(what: &str, repeats: usize, mut run: impl FnMut() -> Result<T>) -> Result<()> {
    run()?;
    let (mut times, before) = (Vec::with_capacity(repeats), cpu_seconds());
    for _ in 0..repeats {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let busy = (cpu_seconds() - before) * 1e3 / repeats as f64;
    times.sort_by(f64::total_cmp);
    println!("{what}: median {:.1} ms, least {:.1} ms, CPU time {busy:.1} ms", times[repeats / 2], times[0]);
    Ok(())
}

/// Seconds that all threads of this process have computed, where the system tells (Linux: in hundredths).
fn cpu_seconds() -> f64 {
    let read = || -> Option<f64> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
    };
    read().unwrap_or(f64::NAN)
}

fn forward(base: &Base, batch: usize, repeats: usize, tensors: &mut Tensors) -> Result<()> {
    let latents = Address::new(0, "latents").normal((batch, 4, 32, 32), base.dtype, &base.device)?;
    let text = base.conditioning(&vec!["an oil painting of a face".to_string(); batch])?;
    let timesteps: Vec<usize> = (0..batch).map(|i| 500 + 20 * i).collect();
    let run = || base.unet.forward(&latents, &timesteps, &text, &Pass::default());
    let mut put = |name: &str, tensor: &Tensor| tensors.insert(format!("unet.{batch}.{name}"), tensor.clone());
    put("prediction", &run()?);
    put("latents", &latents);
    put("hidden_states", &text.hidden_states);
    put("pooled", &text.pooled);
    put("timesteps", &integers(&timesteps)?);
    report(&format!("U-Net forward B{batch}"), repeats, run)
}

fn integers(values: &[usize]) -> Result<Tensor> {
    let values: Vec<i64> = values.iter().map(|value| *value as i64).collect();
    Ok(Tensor::new(values, &Device::Cpu)?)
}

/// Portraits of two people and their prompts.
fn pictures(batch: usize) -> Result<Batch> {
    let folder = tempfile::tempdir().map_err(lcm_lookahead::Error::io("create a folder", "(temporary)"))?;
    let out = folder.path().to_path_buf();
    let generate =
        GenerateConfig { out: out.clone(), identities: 2, images_per_identity: 4, ..GenerateConfig::default() };
    generate_dataset(&generate, |_, _| {})?;
    let dataset = FaceDataset::open(&DatasetConfig::new(out, mini::RESOLUTION as u32))?;
    dataset.batch(0, 0, 0, 1, batch, &Device::Cpu)
}

/// A joint iteration: frozen encoders, KV encoder, denoiser, preview, both losses, backward pass, clipping, AdamW.
fn training(base: &Base, batch: usize, repeats: usize, tensors: &mut Tensors) -> Result<()> {
    let (draw, step) = (0, 1);
    let mut config = TrainConfig::mini();
    (config.train_batch_size, config.lookahead.batch_size) = (batch, batch);
    // Random dropping aside, which another program cannot repeat.
    (config.dropout.adapter_drop_chance, config.dropout.kv_drop_chance) = (0.0, 0.0);
    let parameters = Parameters::new();
    for (name, tensor) in mini::adapter_tensors()? {
        parameters.insert(name, candle_core::Var::from_tensor(&tensor)?);
    }
    let weights = Weights::trainable(&parameters, 0, base.dtype, &base.device);
    let encoder = FaceEncoder::load(&mini::face_encoder_config(), &base.unet, &weights, &weights)?;
    for (index, (name, variable)) in parameters.all().into_iter().enumerate() {
        if name.ends_with("lora_B.weight") {
            // A fresh LoRA is zero, and then half of its gradients are.
            let value = Address::new(0, "lora").sample(index).normal(variable.shape(), base.dtype, &base.device)?;
            variable.set(&(value * 0.02)?)?;
        }
        tensors.insert(format!("parameters.{name}"), variable.as_detached_tensor().copy()?);
    }
    let image_losses: Vec<(Box<dyn ImageLoss>, f64)> =
        vec![(Box::new(base.identity_loss()), config.lookahead.identity_weight)];
    let timesteps = AnnealedTimestepSampler::new(0.2, 1000, 1000)?;
    let losses = StepLosses {
        base,
        encoder: &encoder,
        config: &config,
        image_losses: &image_losses,
        diffusion_timesteps: &timesteps,
        lookahead_timesteps: &timesteps,
    };
    let group = |adapter, learning_rate| ParameterGroup {
        parameters: parameters.filter(|name| FaceEncoder::is_adapter_parameter(name) == adapter),
        learning_rate,
        weight_decay: config.optimizer.adam_weight_decay,
    };
    let groups = vec![group(false, config.optimizer.learning_rate), group(true, config.optimizer.adapter_lr)];
    let mut optimizer = AdamW::new(groups, AdamWConfig::default())?;
    let batch = pictures(batch)?;

    let mut iteration = || -> Result<(LossReport, f64)> {
        let mut report = PendingReport::default();
        let prepared = losses.prepare(&batch, draw)?;
        let loss = losses.joint(&prepared, step, draw, true, &mut report)?;
        let gradients = Gradients::extract(&loss.backward()?, &parameters);
        let norm = optimizer.clip_and_step(gradients, 1.0, config.optimizer.max_grad_norm)?;
        Ok((report.read()?, norm))
    };
    let (values, norm) = iteration()?;
    println!("losses {values:?}, norm of the gradient {norm:.6}");

    let size = batch.prompts.len();
    let address = |purpose| Address::new(config.seed, purpose).step(draw);
    let tokenizer = PromptTokenizer::mini()?;
    let mut put = |name: &str, tensor: Tensor| tensors.insert(format!("training.{name}"), tensor);
    put("pixel_values", batch.pixel_values.clone());
    put("encoder_pixel_values", batch.encoder_pixel_values.clone());
    put("input_ids", tokenizer.encode(&batch.prompts, &base.device)?);
    put("encoder_input_ids", tokenizer.encode(&batch.encoder_prompts, &base.device)?);
    put("noise", address("noise").normal_batch(size, (4, 32, 32), base.dtype, &base.device)?);
    put("timesteps", integers(&timesteps.sample_batch(address("timestep"), size))?);
    let numbers = [
        values.lora_scale.unwrap_or(1.0),
        config.lookahead.identity_weight,
        values.diffusion.unwrap_or(f64::NAN),
        values.lookahead[0].1,
        values.lookahead[0].2 as f64,
        norm,
    ];
    put("numbers", Tensor::new(&numbers, &Device::Cpu)?);
    for (name, variable) in parameters.all() {
        tensors.insert(format!("updated.{name}"), variable.as_detached_tensor().copy()?);
    }
    report(&format!("training iteration B{size}"), repeats, iteration)
}

/// One picture as the `personalize` example draws it.
fn picture(base: &Base, repeats: usize, tensors: &mut Tensors) -> Result<()> {
    let resampler = mini::face_encoder_config().resampler;
    let personalizer = Personalizer::from_adapter(base.clone(), &resampler, mini::adapter_tensors()?)?;
    let portrait = Portrait::shipped().render(mini::RESOLUTION as u32).image;
    let options = Options { steps: 30, ..personalizer.default_options() };
    let reference = personalizer.reference(&portrait)?;
    let prompts = ["an oil painting of a face".to_string()];
    let run = || personalizer.generate_tensor(&reference, &prompts, &options);
    let mut put = |name: &str, tensor: Tensor| tensors.insert(format!("picture.{name}"), tensor);
    put("image", run()?);
    put("portrait", to_tensor(&portrait, &base.device)?.unsqueeze(0)?);
    put("input_ids", PromptTokenizer::mini()?.encode(&prompts, &base.device)?);
    let noise = Address::new(options.seed, "initial noise");
    put("noise", noise.normal_batch(1, (4, 32, 32), base.dtype, &base.device)?);
    report("one picture, 30 steps", repeats, run)
}

/// Pictures of an encoder with a KV branch, 50 steps with its guidance: the time of one, and of several people in all the
/// prompts that training left out, how far they are from those whose every step has a pass of the KV encoder for itself,
/// and how much the faces resemble the photographs.
fn references(base: &Base, encoder: &Path, people: usize, repeats: usize) -> anyhow::Result<()> {
    let resampler = mini::face_encoder_config().resampler;
    let tensors = candle_core::safetensors::load(encoder, &base.device)?;
    let (config, source) = (TrainConfig::mini(), encoder.display().to_string());
    let personalizer = Personalizer::from_tensors(base.clone(), &resampler, &config, &source, &tensors)?;
    let portrait = |person: u64, style, scene, pose| Portrait {
        identity: Identity::from_seed(HELD_OUT_FROM + 200_000 + person),
        style,
        scene,
        pose,
    };
    let photographs = (0..people as u64).map(|person| {
        let seed = HELD_OUT_FROM + 200_000 + person;
        let shown = portrait(person, Style::Photo, Scene::Studio, Pose::from_seed(seed));
        to_tensor(&shown.render(mini::RESOLUTION as u32).image, &base.device)
    });
    let photographs = Tensor::stack(&photographs.collect::<Result<Vec<_>>>()?, 0)?;
    let reference = personalizer.reference_from_tensor(&photographs)?;
    let prompts: Vec<String> = HELD_OUT_COMBINATIONS
        .iter()
        .map(|(style, scene)| portrait(0, *style, *scene, Pose::from_seed(0)).prompt())
        .collect();
    let judge = base.identity_loss();
    let embedded = |pictures: &Tensor| -> Result<Vec<Option<Vec<f32>>>> {
        let (faces, places) = judge.embed(&pictures.clamp(-1.0, 1.0)?)?;
        let mut all = vec![None; pictures.dim(0)?];
        for (i, place) in places.into_iter().enumerate() {
            all[place] = faces.as_ref().map(|faces| faces.get(i)?.to_vec1()).transpose()?;
        }
        Ok(all)
    };
    let people_embedded = embedded(&photographs)?;
    let mut own: Vec<Tensor> = Vec::new();
    for (reference_steps, reference_interval) in [(1, 1), (2, 1), (3, 1), (1, 2), (1, 5)] {
        let options = |seed| Options { seed, reference_steps, reference_interval, ..personalizer.default_options() };
        let what = format!("reference steps {reference_steps}, interval {reference_interval}");
        let one = reference.select(&[0])?;
        report(&format!("{what}: one picture, 50 steps"), repeats, || {
            personalizer.generate_tensor(&one, &prompts[..1], &options(0))
        })?;
        if reference_steps > 1 {
            continue; // the same pictures but for rounding
        }
        let (mut pictures, mut cosine, mut faces, mut difference) = (Vec::new(), 0.0, 0usize, 0.0);
        for (person, embedding) in people_embedded.iter().enumerate() {
            let one = reference.select(&[person])?;
            let drawn = personalizer.generate_tensor(&one, &prompts, &options(person as u64))?.clamp(-1.0, 1.0)?;
            for face in embedded(&drawn)?.into_iter().flatten() {
                let Some(photograph) = embedding else { continue };
                cosine += f64::from(face.iter().zip(photograph).map(|(a, b)| a * b).sum::<f32>());
                faces += 1;
            }
            if let Some(own) = own.get(person) {
                difference += f64::from((&drawn - own)?.abs()?.mean_all()?.to_scalar::<f32>()?) / people as f64;
            }
            pictures.push(drawn);
        }
        println!(
            "{what}: identity {:.4} in {faces} faces of {}, mean absolute difference of pixels {:.2e} of 2",
            cosine / faces.max(1) as f64,
            people * prompts.len(),
            difference,
        );
        if own.is_empty() {
            own = pictures;
        }
    }
    Ok(())
}

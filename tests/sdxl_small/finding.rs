use std::collections::HashSet;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use lcm_lookahead::hub::REPOSITORIES;
use lcm_lookahead::sdxl::{SdxlChoice, SdxlFiles};
use lcm_lookahead::{Base, Error};

use crate::layout::{Layout, fixture, hub};
use crate::server::Server;

#[test]
fn everything_is_downloaded_once_and_found_offline_afterwards() -> Result<()> {
    let layout = Layout::new()?;
    let published = layout.published()?;
    // What is the same in two places of a repository is sent once: the vocabulary of both tokenizers.
    let owner_and_name = |path: &str| path.split('/').take(2).collect::<Vec<_>>().join("/");
    let distinct: HashSet<_> =
        published.iter().map(|(path, content)| (owner_and_name(path), content.clone())).collect();
    let count = distinct.len();
    ensure!(count + 2 == published.len(), "{count}");
    let server = Server::start(published)?;
    let home = layout.path().join("home");
    let files = SdxlFiles::find(&hub(&home, &[("HF_ENDPOINT", &server.origin)])?, &layout.choice())?;
    assert_eq!(server.downloads(), count);
    ensure!(files.unet.starts_with(&home), "{}", files.unet.display());
    let base = Base::sdxl(&files, DType::F32, &Device::Cpu)?;
    assert_eq!((base.resolution, base.lcm_lora.is_empty()), (32, false));

    let offline = SdxlFiles::find(&hub(&home, &[("HF_HUB_OFFLINE", "1")])?, &layout.choice())?;
    assert_eq!((offline.unet, offline.adapter), (files.unet, files.adapter));
    assert_eq!(server.downloads(), count);
    Ok(())
}

#[test]
fn everything_that_is_missing_is_named_in_one_sentence() -> Result<()> {
    let layout = Layout::new()?;
    let all = hub(&layout.path().join("empty"), &[("HF_HUB_OFFLINE", "1")])?;
    let error = SdxlFiles::find(&all, &SdxlChoice::default()).unwrap_err();
    ensure!(matches!(error, Error::Hub { .. }), "{error}");
    let text = error.to_string();
    let ours = REPOSITORIES.iter().filter(|r| !["stabilityai/sdxl-turbo", "rinong/lcm_lookahead"].contains(&r.id));
    for repository in ours {
        ensure!(text.contains(repository.id), "{}: {text}", repository.id);
        for file in repository.files {
            ensure!(text.contains(file.path), "{}: {text}", file.path);
        }
    }
    ensure!(text.lines().count() == 1 && text.contains("--weights"), "{text}");

    // What is here is not called missing.
    let error = SdxlFiles::find(&layout.hub()?, &SdxlChoice::default()).unwrap_err().to_string();
    ensure!(error.starts_with("opencv/face_recognition_sface: `face_recognition_sface_2021dec.onnx`"), "{error}");
    ensure!(!error.contains("also missing"), "{error}");
    Ok(())
}

#[test]
fn a_pipeline_or_unet_of_ones_own_takes_the_place_of_the_published_one() -> Result<()> {
    let layout = Layout::new()?;
    let pipeline = layout.path().join("fine-tune");
    std::fs::rename(layout.weights().join("stable-diffusion-xl-base-1.0"), &pipeline)?;
    let choice = SdxlChoice { pipeline: Some(pipeline.clone()), resolution: Some(48), ..layout.choice() };
    let files = SdxlFiles::find(&layout.hub()?, &choice)?;
    assert_eq!(
        (files.unet.clone(), files.scheduler.clone()),
        (pipeline.join("unet"), Some(pipeline.join("scheduler")))
    );
    assert_eq!(Base::sdxl(&files, DType::F32, &Device::Cpu)?.resolution, 48);

    for unet in [fixture("formats/sharded/unet"), fixture("formats/sharded")] {
        let choice = SdxlChoice { unet: Some(unet), ..choice.clone() };
        let files = SdxlFiles::find(&layout.hub()?, &choice)?;
        assert_eq!((files.unet.clone(), &files.scheduler), (fixture("formats/sharded/unet"), &None));
        Base::sdxl(&files, DType::F32, &Device::Cpu)?;
    }
    // A published fine-tune by its name.
    let turbo = layout.weights().join("sdxl-turbo/unet");
    std::fs::create_dir_all(&turbo)?;
    for entry in std::fs::read_dir(pipeline.join("unet"))? {
        let path = entry?.path();
        std::fs::copy(&path, turbo.join(path.file_name().context("a name")?))?;
    }
    for name in ["sdxl-turbo", "stabilityai/sdxl-turbo"] {
        let choice = SdxlChoice { unet: Some(name.into()), ..choice.clone() };
        let files = SdxlFiles::find(&layout.hub()?, &choice)?;
        assert_eq!((files.unet.clone(), &files.scheduler, files.own_base), (turbo.clone(), &None, false));
        Base::sdxl(&files, DType::F32, &Device::Cpu)?;
    }
    let choice = SdxlChoice { unet: Some("no/such/folder".into()), ..choice };
    let error = SdxlFiles::find(&layout.hub()?, &choice).unwrap_err().to_string();
    assert_eq!(error, "no/such/folder: there is no such file or folder");
    Ok(())
}

#[test]
fn components_that_do_not_fit_together_are_refused_by_file_and_field() -> Result<()> {
    let layout = Layout::new()?;
    let files = SdxlFiles::find(&layout.hub()?, &layout.choice())?;
    let refused = |files: &SdxlFiles, dtype: DType| match Base::sdxl(files, dtype, &Device::Cpu) {
        Err(error) => error,
        Ok(_) => panic!("accepted"),
    };
    // A text encoder in the other's place has another projection.
    let swapped =
        SdxlFiles { text_encoders: [files.text_encoders[1].clone(), files.text_encoders[0].clone()], ..files.clone() };
    let error = refused(&swapped, DType::F32);
    let Error::Config { source_name, field, reason } = &error else { anyhow::bail!("{error}") };
    ensure!(source_name.ends_with("unet/config.json") && field == "projection_class_embeddings_input_dim", "{error}");
    ensure!(reason.contains("the second text encoder"), "{error}");

    let vae = files.autoencoder.join("config.json");
    let text = std::fs::read_to_string(&vae)?;
    for (from, to, field) in [
        ("\"act_fn\": \"silu\"", "\"act_fn\": \"relu\"", "act_fn"),
        ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "up_block_types"),
        ("\"norm_num_groups\": 2", "\"norm_num_groups\": 3", "block_out_channels"),
        ("\"latent_channels\": 4", "\"latent_channels\": 1e9", "latent_channels"),
    ] {
        ensure!(text.contains(from), "{from}");
        std::fs::write(&vae, text.replace(from, to))?;
        let error = refused(&files, DType::F32);
        let Error::Config { source_name, field: named, .. } = &error else { anyhow::bail!("{error}") };
        assert_eq!((source_name.as_str(), named.as_str()), (vae.display().to_string().as_str(), field), "{error}");
    }
    std::fs::write(&vae, &text)?;

    let scheduler = files.scheduler.clone().expect("given").join("scheduler_config.json");
    let text = std::fs::read_to_string(&scheduler)?;
    std::fs::write(&scheduler, text.replace("\"epsilon\"", "\"v_prediction\""))?;
    let error = refused(&files, DType::F32);
    ensure!(matches!(&error, Error::Config { field, .. } if field == "prediction_type"), "{error}");
    std::fs::write(&scheduler, text)?;

    let odd = SdxlFiles { resolution: Some(36), ..files.clone() };
    let error = refused(&odd, DType::F32).to_string();
    ensure!(error.contains("a multiple of 16"), "{error}");
    let error = refused(&files, DType::BF16).to_string();
    ensure!(error.contains("expected one of [F32, F64] on this device, found BF16"), "{error}");
    let swapped = SdxlFiles { identity_network: files.face_locator.clone(), ..files };
    ensure!(refused(&swapped, DType::F32).to_string().contains("no identity network this crate knows"));
    Ok(())
}

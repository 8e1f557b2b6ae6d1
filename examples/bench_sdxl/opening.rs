//! Opening networks from files: the U-Net, and encoders on demand.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use candle_core::{DType, Device};
use lcm_lookahead::models::OnDemand;
use lcm_lookahead::models::clip_text::{self, ClipText};
use lcm_lookahead::models::clip_vision::{self, ClipVision};
use lcm_lookahead::models::unet::Config;
use lcm_lookahead::nn::Weights;
use lcm_lookahead::{Base, UNet, cuda};

use crate::measure::Report;
use crate::networks::{RandomText, base};

/// Writes a U-Net of arbitrary numbers in bf16 below a folder and opens it several times.
pub fn measure(report: &Report, folder: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in(folder).with_context(|| folder.display().to_string())?;
    let path = folder.path().join("unet.safetensors");
    write(&path, UNet::shapes(&Config::sdxl())?)?;
    let open = || -> anyhow::Result<(f64, f64)> {
        let start = Instant::now();
        let weights = Weights::from_safetensors(&path, DType::BF16, &report.device)?;
        let opened = start.elapsed().as_secs_f64();
        let unet = UNet::load(&Config::sdxl(), &weights)?;
        cuda::synchronize(&report.device)?;
        let seconds = start.elapsed().as_secs_f64();
        drop(unet);
        Ok((opened, seconds))
    };
    for _ in 0..5 {
        let (opened, seconds) = open()?;
        println!("opening the U-Net from safetensors: {seconds:.3} s, of which the table of contents {opened:.3} s");
    }
    Ok(())
}

/// Networks whose encoders of text and images are opened from files of arbitrary numbers in this folder when they are used.
pub fn lean(device: &Device, folder: &Path) -> anyhow::Result<Base> {
    let paths = ["clip_l", "big_g", "vit_h"].map(|name| folder.join(format!("{name}.safetensors")));
    let texts = [clip_text::Config::clip_l(), clip_text::Config::open_clip_big_g()];
    let image = clip_vision::Config::vit_h_14();
    let shapes = |load: &dyn Fn(&Weights) -> lcm_lookahead::Result<()>| -> anyhow::Result<_> {
        let weights = Weights::shapes_only();
        load(&weights)?;
        Ok(weights.shapes())
    };
    for (path, config) in paths.iter().zip(&texts) {
        write(path, shapes(&|weights| ClipText::load(config, weights).map(|_| ()))?)?;
    }
    write(&paths[2], shapes(&|weights| ClipVision::load(&image, weights).map(|_| ()))?)?;
    let weights = {
        let device = device.clone();
        move |path: &Path| Weights::from_safetensors(path, DType::BF16, &device)
    };
    let [first, second, vision] = paths;
    let (text_weights, mut base) = (weights.clone(), base(device)?);
    base.text_encoder = Arc::new(OnDemand::new(move || {
        let first = ClipText::load(&texts[0], &text_weights(&first)?)?;
        Ok(RandomText { first, second: ClipText::load(&texts[1], &text_weights(&second)?)? })
    }));
    base.image_encoder = Arc::new(OnDemand::new(move || ClipVision::load(&image, &weights(&vision)?)));
    Ok(base)
}

fn write(path: &Path, shapes: BTreeMap<String, Vec<usize>>) -> anyhow::Result<()> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in shapes {
        let begin = end;
        end += shape.iter().product::<usize>() * DType::BF16.size_in_bytes();
        header.insert(name, serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}));
    }
    let header = serde_json::Value::Object(header).to_string();
    // bf16 numbers of about 0.01, one after the other.
    let block: Vec<u8> = (0..1u32 << 23).flat_map(|i| [(i * 37) as u8, 0x3c]).collect();
    let file = std::fs::File::create(path).with_context(|| path.display().to_string())?;
    let mut file = BufWriter::new(file);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    while end > 0 {
        let count = end.min(block.len());
        file.write_all(&block[..count])?;
        end -= count;
    }
    Ok(file.flush()?)
}

//! Opening the U-Net from a file.

use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use candle_core::DType;
use lcm_lookahead::models::unet::Config;
use lcm_lookahead::nn::Weights;
use lcm_lookahead::{UNet, cuda};

use crate::measure::Report;

/// Writes a U-Net of arbitrary numbers in bf16 to a folder, opens it several times, and deletes it.
pub fn measure(report: &Report, folder: &Path) -> anyhow::Result<()> {
    let path = folder.join("bench_sdxl_unet.safetensors");
    write(&path)?;
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
    let times = (0..5).map(|_| open()).collect::<anyhow::Result<Vec<_>>>();
    std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
    for (opened, seconds) in times? {
        println!("opening the U-Net from safetensors: {seconds:.3} s, of which the table of contents {opened:.3} s");
    }
    Ok(())
}

fn write(path: &Path) -> anyhow::Result<()> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in UNet::shapes(&Config::sdxl())? {
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

//! Names and counts at full size, without weights; files are read and written in `tests/formats.rs`.

use super::*;
use crate::models::resampler;

fn sdxl() -> Result<Layout> {
    let unet = UNet::load(&unet::Config::sdxl(), &Weights::shapes_only())?;
    let config = FaceEncoderConfig {
        resampler: resampler::Config::ip_adapter_plus_sdxl(),
        kv_encoder: Some(KvEncoderConfig::default()),
    };
    Layout::of(&config, &unet)
}

#[test]
fn the_released_encoder_has_5148_names_of_which_1804_are_aliases() -> Result<()> {
    let layout = sdxl()?;
    let encoder: Vec<_> = layout.tensors().filter(|(name, _)| name.starts_with(layout::ENCODER)).collect();
    assert_eq!(encoder.len(), 5148);
    let count = |kind: fn(&Origin) -> bool| encoder.iter().filter(|(_, place)| kind(&place.origin)).count();
    assert_eq!(count(|origin| matches!(origin, Origin::Alias(_))), 1804);
    assert_eq!(count(|origin| matches!(origin, Origin::Base(_))), 1680);
    assert_eq!(count(|origin| matches!(origin, Origin::CopyOf(_))), 140);
    Ok(())
}

#[test]
fn what_is_new_in_it_has_430_833_920_parameters_of_3_120_135_940_in_the_encoder() -> Result<()> {
    let layout = sdxl()?;
    let parameters = |kind: &dyn Fn(&str, &Origin) -> bool| -> usize {
        let chosen = layout.tensors().filter(|(name, place)| kind(name, &place.origin));
        chosen.map(|(_, place)| place.shape.iter().product::<usize>()).sum()
    };
    assert_eq!(parameters(&|_, origin| matches!(origin, Origin::New(_))), 430_833_920);
    let unique = |name: &str, origin: &Origin| name.starts_with(layout::ENCODER) && !matches!(origin, Origin::Alias(_));
    assert_eq!(parameters(&unique), 3_120_135_940);
    Ok(())
}

#[test]
fn the_last_block_has_no_lora_of_its_own_and_the_middle_ones_projections_come_last() -> Result<()> {
    let layout = sdxl()?;
    let last = "encoder_unet.up_blocks.1.attentions.2.transformer_blocks.1";
    assert!(layout.origin(&format!("{last}.attn1.to_q.lora_layer.down.weight")).is_none());
    assert_eq!(
        layout.origin(&format!("{last}.extract_kv1.to_k.lora_layer.down.weight")),
        Some(&Origin::New(format!("kv_encoder.export.{}.attn1.to_k.lora_A.weight", &last["encoder_unet.".len()..])))
    );
    for (block, number) in [
        ("down_blocks.1.attentions.0.transformer_blocks.0", 1),
        ("up_blocks.1.attentions.2.transformer_blocks.1", 119),
        ("mid_block.attentions.0.transformer_blocks.9", 139),
    ] {
        assert_eq!(
            layout.origin(&format!("encoder_unet.{block}.extract_kv2.to_v.weight")),
            Some(&Origin::New(format!("ip_adapter.{number}.to_v_ip.weight")))
        );
    }
    Ok(())
}

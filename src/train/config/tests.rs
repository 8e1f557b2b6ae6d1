use super::*;
use crate::train::LrSchedule;

fn message(text: &str) -> String {
    TrainConfig::from_toml_str("run.toml", text).expect_err("must be refused").to_string()
}

#[test]
fn every_preset_is_valid_and_survives_toml() {
    for name in TrainConfig::PRESETS {
        let config = TrainConfig::preset(name).unwrap();
        config.validate().unwrap();
        let text = config.to_toml().unwrap();
        assert_eq!(TrainConfig::from_toml_str("written", &text).unwrap(), config, "{name}");
    }
}

#[test]
fn the_paper_preset_has_the_numbers_of_section_4() {
    let config = TrainConfig::paper();
    assert_eq!((config.max_train_steps, config.train_batch_size), (5000, 8));
    assert_eq!((config.optimizer.adapter_lr, config.optimizer.learning_rate), (1e-5, 5e-6));
    assert_eq!((config.timesteps.diffusion_annealing, config.timesteps.lookahead_annealing), (0.2, 0.2));
    assert_eq!((config.adapter.encoder_lora_rank, config.adapter.kv_lora_rank), (4, 0));
    assert_eq!((config.lookahead.lora_scale.full_probability, config.lookahead.lora_scale.min_scale), (0.5, 0.1));
    assert_eq!(config.update_mode, UpdateMode::Joint);
}

#[test]
fn the_official_preset_differs_from_the_paper_only_where_the_code_does() {
    let (paper, official) = (TrainConfig::paper().to_toml().unwrap(), TrainConfig::official().to_toml().unwrap());
    let differing: Vec<&str> =
        official.lines().zip(paper.lines()).filter(|(a, b)| a != b).map(|(line, _)| line).collect();
    let expected = [
        "update_mode = \"alternating\"",
        "kv_lora_rank = 4",
        "diffusion_annealing = 0.5",
        "perceptual_weight = 0.001",
        "scale_loss_by_lora_scale = true",
        "preview_form = \"boundary\"",
        "hold_iterations = 5",
    ];
    assert_eq!(differing, expected);
}

#[test]
fn a_file_says_only_what_differs_from_its_preset() {
    let text = "preset = \"mini\"\nseed = 7\n[optimizer]\nlearning_rate = 1\nlr_scheduler = \"cosine\"\n[lookahead.lora_scale]\nmin_scale = 0.5\n";
    let config = TrainConfig::from_toml_str("run.toml", text).unwrap();
    let mut expected = TrainConfig::mini();
    expected.seed = 7;
    expected.optimizer.learning_rate = 1.0;
    expected.optimizer.lr_scheduler = LrSchedule::Cosine;
    expected.lookahead.lora_scale.min_scale = 0.5;
    assert_eq!(config, expected);
    assert_eq!(TrainConfig::from_toml_str("empty", "").unwrap(), TrainConfig::paper());
}

#[test]
fn an_unknown_key_is_an_error_that_names_the_nearest_valid_one() {
    assert_eq!(
        message("[optimizer]\nadaptor_lr = 1e-5"),
        "run.toml: `optimizer.adaptor_lr`: unknown key; did you mean `adapter_lr`?"
    );
    assert_eq!(
        message("learning_rate = 1e-5"),
        "run.toml: `learning_rate`: unknown key; did you mean `optimizer.learning_rate`?"
    );
    assert_eq!(message("[optimiser]\nx = 1"), "run.toml: `optimiser`: unknown key; did you mean `optimizer`?");
    assert_eq!(
        message("[lookahead.lora_scale]\nminscale = 0.1"),
        "run.toml: `lookahead.lora_scale.minscale`: unknown key; did you mean `min_scale`?"
    );
}

#[test]
fn a_wrong_type_names_field_expected_and_found() {
    assert_eq!(
        message("[optimizer]\nlearning_rate = \"fast\""),
        "run.toml: `optimizer.learning_rate`: expected a number, found the string \"fast\""
    );
    assert_eq!(
        message("max_train_steps = 1.5"),
        "run.toml: `max_train_steps`: expected a whole number, found the number 1.5"
    );
    assert_eq!(message("seed = -1"), "run.toml: `seed`: expected a whole number, not negative, found -1");
    assert_eq!(message("optimizer = 3"), "run.toml: `optimizer`: expected a table, found the whole number 3");
    assert_eq!(message("[recompute]\nx = 1"), "run.toml: `recompute`: expected true or false, found a table");
    assert_eq!(
        message("[adapter]\nextended_layers = [1]"),
        "run.toml: `adapter.extended_layers`: expected a list of strings, found the whole number 1 in it"
    );
    let wrong_variant = message("update_mode = \"both\"");
    assert!(wrong_variant.starts_with("run.toml: `update_mode`: "), "{wrong_variant}");
    assert!(wrong_variant.contains("`joint`") && wrong_variant.contains("`alternating`"), "{wrong_variant}");
    let wrong_preset = message("preset = \"papers\"");
    assert_eq!(wrong_preset, "run.toml: `preset`: expected one of \"paper\", \"official\", \"mini\", found \"papers\"");
}

#[test]
fn text_that_is_not_toml_is_refused_with_its_line() {
    let error = message("seed = 1\nmax_train_steps = = 2");
    assert!(error.starts_with("run.toml: not valid TOML") && error.contains("line 2"), "{error}");
}

#[test]
fn a_value_out_of_range_names_its_field_and_range() {
    for (text, expected) in [
        ("[dropout]\nkv_drop_chance = 1.5", "`dropout.kv_drop_chance`: expected a number from 0 to 1, found 1.5"),
        ("[optimizer]\nadam_beta2 = 1.0", "`optimizer.adam_beta2`: expected a number from 0 to below 1, found 1"),
        ("[optimizer]\nadapter_lr = nan", "`optimizer.adapter_lr`: expected a finite number above 0, found NaN"),
        ("[data]\nresolution = 100", "`data.resolution`: expected a multiple of 8 from 16 to 4096, found 100"),
        ("train_batch_size = 0", "`train_batch_size`: expected at least 1, found 0"),
        ("train_batch_size = 2", "`lookahead.batch_size`: expected 1 to `train_batch_size` (2), found 8"),
        (
            "[lookahead.lora_scale]\nhold_iterations = 0",
            "`lookahead.lora_scale.hold_iterations`: expected at least 1, found 0",
        ),
    ] {
        assert_eq!(message(text), format!("run.toml: {expected}"));
    }
}

#[test]
fn an_alignment_loss_survives_toml_and_its_fields_have_ranges() {
    let text = "preset = \"mini\"\n[lookahead.alignment]\nloss = \"sds\"\nweight = 0.5\nguidance_scale = 3\n";
    let config = TrainConfig::from_toml_str("run.toml", text).unwrap();
    let mut expected = TrainConfig::mini();
    expected.lookahead.alignment =
        AlignmentConfig { loss: AlignmentLoss::Sds, weight: 0.5, guidance_scale: 3.0, ..AlignmentConfig::default() };
    assert_eq!(config, expected);
    assert_eq!(TrainConfig::from_toml_str("written", &config.to_toml().unwrap()).unwrap(), expected);

    let wrong_variant = message("[lookahead.alignment]\nloss = \"distillation\"");
    assert!(wrong_variant.starts_with("run.toml: `lookahead.alignment.loss`: "), "{wrong_variant}");
    assert!(wrong_variant.contains("`sds`") && wrong_variant.contains("`consistency`"), "{wrong_variant}");
    for (fields, expected) in [
        ("weight = -1", "weight`: expected a finite number, not negative, found -1"),
        ("guidance_scale = 0.5", "guidance_scale`: expected a finite number, at least 1, found 0.5"),
        ("sds_max_timestep = 1001", "sds_max_timestep`: expected at most 1000, found 1001"),
        ("sds_min_timestep = 980", "sds_min_timestep`: expected less than `sds_max_timestep` (980), found 980"),
        ("consistency_skip = 0", "consistency_skip`: expected at least 1, found 0"),
        ("consistency_skip = 1000", "consistency_skip`: expected at most 999, found 1000"),
    ] {
        let found = message(&format!("[lookahead.alignment]\n{fields}"));
        assert_eq!(found, format!("run.toml: `lookahead.alignment.{expected}"));
    }
    assert_eq!(
        message("[lookahead.alignment]\nguidance = 2"),
        "run.toml: `lookahead.alignment.guidance`: unknown key; did you mean `guidance_scale`?"
    );
}

#[test]
fn a_missing_file_is_one_clear_error() {
    let error = TrainConfig::from_toml("/nowhere/run.toml").unwrap_err().to_string();
    assert!(error.starts_with("/nowhere/run.toml: cannot read the configuration"), "{error}");
}

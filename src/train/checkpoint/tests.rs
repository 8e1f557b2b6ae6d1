use std::fs;

use candle_core::{DType, Device, Var};
use tempfile::TempDir;

use super::*;
use crate::train::{AdamWConfig, Gradients, ParameterGroup};

struct Run {
    parameters: Parameters,
    optimizer: AdamW,
    ema: Ema,
}

/// A run of one parameter after one update.
fn run() -> Run {
    let parameters = Parameters::new();
    parameters.insert("proj.weight", Var::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap());
    let group = ParameterGroup { parameters: parameters.clone(), learning_rate: 0.1, weight_decay: 0.01 };
    let mut optimizer = AdamW::new(vec![group], AdamWConfig::default()).unwrap();
    let mut ema = Ema::new(&parameters, 0.5, false).unwrap();
    let mut gradients = Gradients::new();
    gradients.insert("proj.weight", Tensor::new(&[[1f32, -2.0], [0.5, 0.0]], &Device::Cpu).unwrap());
    optimizer.step(&gradients, 1.0).unwrap();
    ema.update().unwrap();
    Run { parameters, optimizer, ema }
}

fn save(directory: &TempDir, step: u64, keep_last: usize) -> PathBuf {
    let run = run();
    Checkpoint::capture(step, &run.parameters, &run.optimizer, Some(&run.ema), &TrainConfig::mini())
        .unwrap()
        .save(directory.path(), keep_last)
        .unwrap()
}

fn names(directory: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(directory.path()).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn same(a: &HashMap<String, Tensor>, b: &HashMap<String, Tensor>) -> bool {
    let numbers = |tensor: &Tensor| -> Vec<f64> {
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    a.len() == b.len()
        && a.iter().all(|(name, tensor)| tensor.dims() == b[name].dims() && numbers(tensor) == numbers(&b[name]))
}

#[test]
fn a_checkpoint_brings_back_the_whole_state() {
    let directory = TempDir::new().unwrap();
    let folder = save(&directory, 20, 0);
    assert_eq!(folder, directory.path().join("checkpoint-20"));
    let loaded = Checkpoint::load(&folder).unwrap();
    let mut fresh = run();
    fresh.parameters.all()[0].1.set(&Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap()).unwrap();
    loaded.restore(&fresh.parameters, &mut fresh.optimizer, Some(&mut fresh.ema)).unwrap();
    let original = run();
    let capture =
        |run: &Run| Checkpoint::capture(20, &run.parameters, &run.optimizer, Some(&run.ema), &loaded.config).unwrap();
    let (restored, original) = (capture(&fresh), capture(&original));
    assert_eq!((loaded.step, &loaded.config), (20, &TrainConfig::mini()));
    assert!(same(&restored.parameters, &original.parameters));
    assert!(same(&restored.optimizer, &original.optimizer));
    assert!(same(restored.ema.as_ref().unwrap(), original.ema.as_ref().unwrap()));
}

#[test]
fn averaged_parameters_are_used_where_there_are_any() {
    let directory = TempDir::new().unwrap();
    let mut loaded = Checkpoint::load(save(&directory, 1, 0)).unwrap();
    let run = run();
    loaded.restore_averaged_parameters(&run.parameters).unwrap();
    let averaged = run.parameters.get("proj.weight").unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(averaged, run.ema.averages()["proj.weight"].to_vec2::<f32>().unwrap());
    loaded.ema = None;
    loaded.restore_averaged_parameters(&run.parameters).unwrap();
    assert_ne!(averaged, run.parameters.get("proj.weight").unwrap().to_vec2::<f32>().unwrap());
}

#[test]
fn only_the_newest_are_kept_and_only_our_folders_are_removed() {
    let directory = TempDir::new().unwrap();
    for other in ["checkpoint-best", "checkpoint-007", "samples"] {
        fs::create_dir(directory.path().join(other)).unwrap();
        fs::write(directory.path().join(other).join("state.json"), b"{}").unwrap();
    }
    for step in [9, 10, 100] {
        save(&directory, step, 2);
    }
    let expected = ["checkpoint-007", "checkpoint-10", "checkpoint-100", "checkpoint-best", "samples"];
    assert_eq!(names(&directory), expected);
    assert_eq!(latest(directory.path()).unwrap(), Some(directory.path().join("checkpoint-100")));
}

#[test]
fn the_checkpoint_just_written_is_kept_even_beside_newer_ones() {
    let directory = TempDir::new().unwrap();
    save(&directory, 50, 0);
    save(&directory, 100, 0);
    save(&directory, 60, 1);
    assert_eq!(names(&directory), ["checkpoint-100", "checkpoint-60"]);
}

#[test]
fn a_directory_without_checkpoints_has_no_latest() {
    let directory = TempDir::new().unwrap();
    assert_eq!(latest(directory.path()).unwrap(), None);
    assert_eq!(latest(directory.path().join("absent")).unwrap(), None);
}

#[test]
fn a_crash_while_writing_leaves_the_earlier_checkpoint_the_latest() {
    let directory = TempDir::new().unwrap();
    let earlier = save(&directory, 10, 0);
    let half = directory.path().join(".checkpoint-20.partial");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("parameters.safetensors"), b"half").unwrap();
    fs::create_dir(directory.path().join("checkpoint-30")).unwrap();
    assert_eq!(latest(directory.path()).unwrap(), Some(earlier.clone()));
    Checkpoint::load(&earlier).unwrap();
    save(&directory, 20, 0);
    assert_eq!(names(&directory), ["checkpoint-10", "checkpoint-20", "checkpoint-30"]);
}

#[test]
fn a_crash_while_replacing_or_removing_leaves_whole_checkpoints() {
    let directory = TempDir::new().unwrap();
    let place = save(&directory, 10, 0);
    fs::rename(&place, directory.path().join(".checkpoint-10.replaced")).unwrap();
    assert_eq!(latest(directory.path()).unwrap(), Some(place.clone()));
    Checkpoint::load(&place).unwrap();
    fs::create_dir(directory.path().join(".checkpoint-5.removed")).unwrap();
    save(&directory, 10, 0);
    assert_eq!(names(&directory), ["checkpoint-10"]);
}

#[test]
fn a_write_that_fails_leaves_the_earlier_checkpoint_as_it_was() {
    let directory = TempDir::new().unwrap();
    let earlier = save(&directory, 10, 1);
    // A file where the partial folder should be makes the write fail, whoever runs the test.
    fs::write(directory.path().join(".checkpoint-20.partial"), b"").unwrap();
    let run = run();
    let next = Checkpoint::capture(20, &run.parameters, &run.optimizer, None, &TrainConfig::mini()).unwrap();
    let error = next.save(directory.path(), 1).unwrap_err().to_string();
    assert!(error.contains(".checkpoint-20.partial: cannot create the folder"), "{error}");
    assert_eq!(latest(directory.path()).unwrap(), Some(earlier.clone()));
    Checkpoint::load(earlier).unwrap();
}

#[test]
fn a_folder_that_cannot_be_written_is_one_clear_error() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("out");
    fs::write(&file, b"a file").unwrap();
    let run = run();
    let checkpoint = Checkpoint::capture(1, &run.parameters, &run.optimizer, None, &TrainConfig::mini()).unwrap();
    let error = checkpoint.save(&file, 1).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: cannot create the folder: ", file.display())), "{error}");
}

#[test]
fn cut_off_damaged_and_missing_files_are_named() {
    let directory = TempDir::new().unwrap();
    let folder = save(&directory, 10, 0);
    for name in [PARAMETERS, OPTIMIZER, EMA, CONFIG] {
        let path = folder.join(name);
        let whole = fs::read(&path).unwrap();
        let error_with = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            Checkpoint::load(&folder).unwrap_err().to_string()
        };
        let cut = error_with(&whole[..whole.len() / 2]);
        assert!(cut.starts_with(&format!("{}: cut off: expected", path.display())), "{cut}");
        let mut flipped = whole.clone();
        flipped[whole.len() - 1] ^= 1;
        let damaged = error_with(&flipped);
        assert!(damaged.starts_with(&format!("{}: damaged: expected checksum", path.display())), "{damaged}");
        fs::remove_file(&path).unwrap();
        let missing = Checkpoint::load(&folder).unwrap_err().to_string();
        assert!(missing.starts_with(&format!("{}: cannot read", path.display())), "{missing}");
        fs::write(&path, whole).unwrap();
    }
    Checkpoint::load(&folder).unwrap();
}

#[test]
fn another_format_version_and_a_cut_off_state_are_refused() {
    let directory = TempDir::new().unwrap();
    let folder = save(&directory, 10, 0);
    let path = folder.join("state.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"format_version\": 1", "\"format_version\": 2")).unwrap();
    let error = Checkpoint::load(&folder).unwrap_err().to_string();
    assert_eq!(error, format!("{}: checkpoint format version 2, expected 1", path.display()));
    fs::write(&path, &text[..text.len() / 2]).unwrap();
    let error = Checkpoint::load(&folder).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: not the state of a checkpoint, or cut off", path.display())), "{error}");
}

#[test]
fn a_wrong_shape_or_a_missing_tensor_names_file_and_tensor() {
    let directory = TempDir::new().unwrap();
    let loaded = Checkpoint::load(save(&directory, 10, 0)).unwrap();
    let path = directory.path().join("checkpoint-10").join(PARAMETERS).display().to_string();
    let other = Parameters::new();
    other.insert("proj.weight", Var::new(&[1f32], &Device::Cpu).unwrap());
    let error = loaded.restore_parameters(&other).unwrap_err().to_string();
    assert_eq!(error, format!("{path}: tensor `proj.weight`: expected shape [1], found shape [2, 2]"));
    other.insert("proj.bias", Var::new(&[1f32], &Device::Cpu).unwrap());
    let error = loaded.restore_parameters(&other).unwrap_err().to_string();
    assert_eq!(error, format!("{path}: tensor `proj.bias`: expected shape [1], found nothing"));
}

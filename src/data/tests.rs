//! What data sets promise.

use std::{fs, io::Cursor, path::Path};

use ::image::{DynamicImage, GrayImage, ImageBuffer, ImageFormat, Luma, Rgb, RgbImage, Rgba, RgbaImage};
use candle_core::{DType, Device, Tensor};

use super::*;
use crate::mini::portrait::{Scene, Style};
use crate::random::Address;
use crate::{Error, Result};

fn plain(width: u32, height: u32, color: [u8; 3]) -> RgbImage {
    RgbImage::from_pixel(width, height, Rgb(color))
}

/// A set of identities with the given numbers of vanilla and stylized pictures; each picture has a colour of its own.
fn write_set(root: &Path, people: &[(usize, usize)]) {
    let mut labels = serde_json::Map::new();
    for (person, &(vanilla, stylized)) in people.iter().enumerate() {
        for k in 0..vanilla + stylized {
            let (folder, style) = if k < vanilla { ("vanilla", "photo") } else { ("stylized", "mosaic") };
            let relative = format!("p{person}/{folder}/A_{style}_of_conceptname_{k}.png");
            save_png(&plain(8, 8, [20 * person as u8 + 5, 9 * k as u8 + 3, 77]), root.join(&relative)).unwrap();
            labels.insert(relative, format!("p{person}").into());
        }
    }
    fs::write(root.join("metadata.json"), serde_json::to_string(&labels).unwrap()).unwrap();
}

fn open(root: &Path) -> FaceDataset {
    FaceDataset::open(&DatasetConfig::new(root, 8)).unwrap()
}

fn open_vanilla(root: &Path) -> FaceDataset {
    let mut config = DatasetConfig::new(root, 8);
    config.sources[0].vanilla_only_for_encoder = true;
    FaceDataset::open(&config).unwrap()
}

fn reason(path: &Path) -> String {
    match load_image(path) {
        Err(Error::Image { path: named, reason }) => {
            assert_eq!(named, path);
            reason
        }
        other => panic!("expected Error::Image, found {other:?}"),
    }
}

#[test]
fn grey_rgba_and_16_bit_pictures_are_converted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    GrayImage::from_pixel(3, 2, Luma([100])).save(&path).unwrap();
    assert_eq!(load_image(&path).unwrap(), plain(3, 2, [100; 3]));
    RgbaImage::from_pixel(3, 2, Rgba([255, 0, 0, 0])).save(&path).unwrap();
    assert_eq!(load_image(&path).unwrap(), plain(3, 2, [255; 3]), "what is transparent becomes white");
    RgbaImage::from_pixel(3, 2, Rgba([200, 0, 0, 51])).save(&path).unwrap();
    assert_eq!(load_image(&path).unwrap(), plain(3, 2, [244, 204, 204]));
    let deep: ImageBuffer<Rgb<u16>, _> = ImageBuffer::from_pixel(3, 2, Rgb([65535u16, 0, 32896]));
    DynamicImage::ImageRgb16(deep).save(&path).unwrap();
    assert_eq!(load_image(&path).unwrap(), plain(3, 2, [255, 0, 128]));
}

#[test]
fn the_format_is_decided_by_the_content() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a_jpeg.png");
    plain(9, 9, [40, 90, 140]).save_with_format(&path, ImageFormat::Jpeg).unwrap();
    assert_eq!(load_image(&path).unwrap().dimensions(), (9, 9));
}

#[test]
fn exif_orientation_is_respected() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.jpg");
    // Left red, right blue; turned a quarter clockwise the red half is on top.
    let picture = RgbImage::from_fn(32, 16, |x, _| if x < 16 { Rgb([250, 0, 0]) } else { Rgb([0, 0, 250]) });
    let mut jpeg = Cursor::new(Vec::new());
    picture.write_to(&mut jpeg, ImageFormat::Jpeg).unwrap();
    let tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    let mut bytes = vec![0xff, 0xd8, 0xff, 0xe1, 0, (2 + 6 + tiff.len()) as u8];
    bytes.extend(b"Exif\0\0");
    bytes.extend(tiff);
    bytes.extend(&jpeg.get_ref()[2..]);
    fs::write(&path, bytes).unwrap();
    let loaded = load_image(&path).unwrap();
    assert_eq!(loaded.dimensions(), (16, 32));
    assert!(loaded.get_pixel(8, 3)[0] > 200 && loaded.get_pixel(8, 28)[2] > 200);
}

#[test]
fn what_is_not_a_picture_is_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    fs::write(&path, "this is text").unwrap();
    assert!(reason(&path).contains("expected a PNG or JPEG"));
    fs::write(&path, "").unwrap();
    assert!(reason(&path).contains("empty"));
    let mut png = Cursor::new(Vec::new());
    RgbImage::from_fn(64, 64, |x, y| Rgb([x as u8 * 3, y as u8 * 7, (x * y) as u8]))
        .write_to(&mut png, ImageFormat::Png)
        .unwrap();
    let half = png.get_ref().len() / 2;
    fs::write(&path, &png.get_ref()[..half]).unwrap();
    assert!(reason(&path).contains("cut off"));
    assert!(matches!(load_image(folder.path().join("none.png")), Err(Error::Io { .. })));
}

#[test]
fn a_header_that_promises_too_much_is_refused_before_memory_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    for (width, height) in [(0x7fff_ffff_u32, 0x7fff_ffff_u32), (60_000, 60_000), (9_000, 9_000)] {
        let mut header = b"IHDR".to_vec();
        header.extend(width.to_be_bytes());
        header.extend(height.to_be_bytes());
        header.extend([8, 2, 0, 0, 0]);
        let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
        bytes.extend(&header);
        bytes.extend(crc32fast::hash(&header).to_be_bytes());
        bytes.extend(b"\0\0\0\x04IDAT\0\0\0\0\0\0\0\0");
        fs::write(&path, bytes).unwrap();
        let _ = reason(&path);
    }
}

#[test]
fn pictures_of_1x1_and_20000x20_work_and_keep_their_aspect() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    save_png(&plain(1, 1, [9, 8, 7]), &path).unwrap();
    assert_eq!(resize_and_crop(&load_image(&path).unwrap(), 16, Crop::Center), plain(16, 16, [9, 8, 7]));
    let wide = RgbImage::from_fn(20_000, 20, |x, _| if x < 10_000 { Rgb([200, 0, 0]) } else { Rgb([0, 200, 0]) });
    save_png(&wide, &path).unwrap();
    let square = resize_and_crop(&load_image(&path).unwrap(), 40, Crop::Center);
    assert!(square.get_pixel(4, 20)[0] > 190 && square.get_pixel(36, 20)[1] > 190, "the middle is kept");
}

#[test]
fn shrinking_averages_and_keeps_the_whole_short_side() {
    let columns = RgbImage::from_fn(640, 400, |x, _| if x % 2 == 0 { Rgb([0; 3]) } else { Rgb([200; 3]) });
    for size in [16, 50, 100, 200] {
        let small = resize_and_crop(&columns, size, Crop::Center);
        // The outermost pixels see a filter that the border cuts off.
        let inner = small.enumerate_pixels().filter(|(x, ..)| (2..size - 2).contains(x));
        assert!(inner.into_iter().all(|(.., p)| p[0].abs_diff(100) < 14), "aliasing at {size}");
    }
    let ramp = RgbImage::from_fn(400, 400, |_, y| Rgb([(y * 255 / 399) as u8; 3]));
    let small = resize_and_crop(&ramp, 20, Crop::Center);
    assert!(small.get_pixel(0, 0)[0] < 12 && small.get_pixel(0, 19)[0] > 243);
}

#[test]
fn a_random_crop_is_decided_by_its_address() {
    let ramp = RgbImage::from_fn(256, 16, |x, _| Rgb([x as u8; 3]));
    let crop = |step| resize_and_crop(&ramp, 16, Crop::Random(Address::new(1, "crop").step(step)));
    assert_eq!(crop(3), crop(3));
    assert!((0..20).any(|step| crop(step) != crop(3)));
}

#[test]
fn tensors_and_pictures_convert_back_and_forth() -> Result<()> {
    let picture = RgbImage::from_fn(5, 3, |x, y| Rgb([x as u8 * 50, y as u8 * 100, 255]));
    let tensor = to_tensor(&picture, &Device::Cpu)?;
    assert_eq!((tensor.dims(), tensor.dtype()), (&[3, 3, 5][..], DType::F32));
    assert_eq!(tensor.get(2)?.flatten_all()?.to_vec1::<f32>()?, [1.0; 15]);
    assert_eq!(from_tensor(&tensor)?, picture);
    let wild = Tensor::new(&[[[f32::NAN]], [[7.0]], [[-3.0]]], &Device::Cpu)?;
    assert_eq!(from_tensor(&wild)?.get_pixel(0, 0).0, [0, 255, 0]);
    assert!(from_tensor(&Tensor::zeros((2, 3, 3), DType::F32, &Device::Cpu)?).is_err());
    Ok(())
}

#[test]
fn saving_creates_folders_leaves_no_temporary_files_and_fails_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/b/c.png");
    save_png(&plain(2, 2, [1, 2, 3]), &path).unwrap();
    assert_eq!(load_image(&path).unwrap(), plain(2, 2, [1, 2, 3]));
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    let below_a_file = path.join("d.png");
    assert!(matches!(save_png(&plain(2, 2, [0; 3]), &below_a_file), Err(Error::Io { .. })));
}

#[test]
fn prompts_come_from_file_names_as_in_the_official_layout() {
    let prompt = |name: &str| prompt_from_path(Path::new("p/vanilla").join(name), "a face");
    assert_eq!(prompt("A_photo_of_conceptname_123.jpg"), "A photo of a face");
    assert_eq!(prompt("A_photo_of_conceptname_123_4.jpg"), "A photo of a face");
    assert_eq!(prompt("A_photo_of_conceptname_in_1920s_style_5.png"), "A photo of a face in 1920s style");
    assert_eq!(prompt("123.png"), "");
    assert_eq!(prompt_from_path("A_photo_of_conceptname_1.jpg", "face"), "A photo of face");
    let stem = file_stem_from_prompt("an oil painting of a face on a beach", "a face", 9);
    assert_eq!(prompt_from_path(format!("{stem}.png"), "a face"), "An oil painting of a face on a beach");
    assert!(!file_stem_from_prompt("a/b\\c:d", "", 1).contains(['/', '\\', ':']));
}

#[test]
fn prompts_are_compressed_at_whole_words() {
    assert_eq!(compress_prompt("a photo of A MAN in a forest", "a man", "a face"), "a photo of a face in a forest");
    assert_eq!(compress_prompt("a photo of a manor", "a man", "a face"), "a photo of a manor");
    assert_eq!(compress_prompt("a photo", "", "a face"), "a photo");
    assert_eq!(compress_prompt("ein Bild: é a man", "a man", "x"), "ein Bild: é x");
}

#[test]
fn metadata_paths_that_leave_the_root_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    save_png(&plain(4, 4, [1; 3]), folder.path().join("secret.png")).unwrap();
    let root = folder.path().join("set");
    save_png(&plain(4, 4, [2; 3]), root.join("a/x.png")).unwrap();
    let absolute = folder.path().join("secret.png").display().to_string();
    let mut hostile = vec![
        "../secret.png".to_owned(),
        "a/../../secret.png".into(),
        absolute,
        "..\\secret.png".into(),
        "C:\\x.png".into(),
    ];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(folder.path().join("secret.png"), root.join("link.png")).unwrap();
        std::os::unix::fs::symlink(folder.path(), root.join("up")).unwrap();
        hostile.extend(["link.png".to_owned(), "up/secret.png".into()]);
    }
    for path in hostile {
        let labels = serde_json::json!({"a/x.png": "a", path.clone(): "b"});
        fs::write(root.join("metadata.json"), labels.to_string()).unwrap();
        match FaceDataset::open(&DatasetConfig::new(&root, 4)) {
            Err(Error::Dataset { reason, .. }) => assert!(reason.contains(&path), "{reason}"),
            other => panic!("{path}: {:?}", other.map(|set| set.report())),
        }
    }
}

#[test]
fn metadata_of_another_kind_is_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    for text in ["", "[1, 2]", "{\"a.png\": [1]}", "{\"a.png\": "] {
        fs::write(folder.path().join("metadata.json"), text).unwrap();
        assert!(
            matches!(FaceDataset::open(&DatasetConfig::new(folder.path(), 4)), Err(Error::Format { .. })),
            "{text}"
        );
    }
    assert!(matches!(FaceDataset::open(&DatasetConfig::new(folder.path().join("no"), 4)), Err(Error::Io { .. })));
    assert!(matches!(FaceDataset::open(&DatasetConfig::default()), Err(Error::Config { .. })));
}

#[test]
fn a_pair_is_two_pictures_of_one_identity() {
    let folder = tempfile::tempdir().unwrap();
    write_set(folder.path(), &[(3, 2), (2, 2), (1, 1)]);
    let set = open(folder.path());
    for index in 0..60 {
        let sample = set.sample(1, index).unwrap();
        assert_ne!(sample.target_path, sample.conditioning_path);
        assert_eq!(sample.target.get_pixel(0, 0)[0], sample.conditioning.get_pixel(0, 0)[0], "the identity's red");
        assert!(["A photo of a face", "A mosaic of a face"].contains(&sample.prompt.as_str()));
    }
}

#[test]
fn only_vanilla_pictures_condition_where_the_identity_has_another() {
    let folder = tempfile::tempdir().unwrap();
    write_set(folder.path(), &[(3, 2), (1, 3), (0, 2), (1, 0)]);
    let set = open_vanilla(folder.path());
    for index in 0..4 * set.len() as u64 {
        let sample = set.sample(1, index).unwrap();
        let vanilla = |path: &Path| path.to_string_lossy().contains("vanilla");
        let (target, condition) = (vanilla(&sample.target_path), vanilla(&sample.conditioning_path));
        match sample.identity.as_str() {
            "p0" => assert!(condition),
            // The single vanilla picture conditions all others, and is itself conditioned by one of them.
            "p1" => assert_eq!(condition, !target),
            "p2" => assert!(!condition),
            _ => assert_eq!(sample.target_path, sample.conditioning_path),
        }
        assert!(sample.identity == "p3" || sample.target_path != sample.conditioning_path);
    }
}

#[test]
fn an_epoch_shows_every_picture_once_and_the_next_in_another_order() {
    let folder = tempfile::tempdir().unwrap();
    write_set(folder.path(), &[(4, 3), (3, 3)]);
    let set = open(folder.path());
    let n = set.len() as u64;
    let epoch = |e: u64| (e * n..e * n + n).map(|i| set.sample(5, i).unwrap().target_path).collect::<Vec<_>>();
    let (first, second) = (epoch(0), epoch(1));
    assert_ne!(first, second);
    let sorted = |mut paths: Vec<_>| {
        paths.sort();
        paths.dedup();
        paths
    };
    assert_eq!(sorted(first.clone()).len() as u64, n);
    assert_eq!(sorted(first), sorted(second));
}

#[test]
fn sampling_is_a_pure_function_of_seed_and_index() {
    let folder = tempfile::tempdir().unwrap();
    write_set(folder.path(), &[(3, 2), (2, 2)]);
    let (set, again) = (open(folder.path()), open(folder.path()));
    let forwards: Vec<_> = (0..20).map(|i| set.sample(3, i).unwrap()).collect();
    let mut backwards: Vec<_> = (0..20).rev().map(|i| again.sample(3, i).unwrap()).collect();
    backwards.reverse();
    assert_eq!(forwards, backwards);
    assert!((0..20).any(|i| set.sample(4, i).unwrap() != forwards[i as usize]));
}

#[test]
fn ranks_share_a_step_without_overlap_and_batches_have_their_shapes() {
    let folder = tempfile::tempdir().unwrap();
    write_set(folder.path(), &[(4, 4), (4, 4)]);
    let set = open(folder.path());
    let whole = set.batch(1, 1, 0, 1, 4, &Device::Cpu).unwrap();
    let parts: Vec<_> = (0..2).map(|rank| set.batch(1, 1, rank, 2, 2, &Device::Cpu).unwrap()).collect();
    let joined = Tensor::cat(&[&parts[0].pixel_values, &parts[1].pixel_values], 0).unwrap();
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values(&whole.pixel_values), values(&joined));
    assert_eq!(whole.encoder_pixel_values.dims(), [4, 3, 8, 8]);
    assert_eq!((whole.prompts.len(), whole.encoder_prompts.len(), whole.identities.len()), (4, 4, 4));
    assert!(set.batch(1, 0, 2, 2, 2, &Device::Cpu).is_err() && set.batch(1, 0, 0, 1, 0, &Device::Cpu).is_err());
}

#[test]
fn one_identity_and_one_image_per_identity_work() {
    for people in [vec![(2, 1)], vec![(1, 0)], vec![(1, 0), (1, 0), (1, 0)]] {
        let folder = tempfile::tempdir().unwrap();
        write_set(folder.path(), &people);
        let batch = open_vanilla(folder.path()).batch(1, 7, 0, 1, 5, &Device::Cpu).unwrap();
        assert_eq!(batch.pixel_values.dims(), [5, 3, 8, 8]);
    }
}

#[test]
fn plain_folders_and_a_flat_folder_work() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["ann/1.png", "ann/2.png", "bob/1.png", "bob/2.png"] {
        save_png(&plain(6, 6, [name.len() as u8; 3]), folder.path().join(name)).unwrap();
    }
    let report = open(folder.path()).report();
    assert_eq!((report.images, report.identities), (4, 2));
    let flat = folder.path().join("ann");
    let mut config = DatasetConfig::new(&flat, 6);
    config.sources[0].augment = true;
    config.sources[0].prompt_in_filename = false;
    let set = FaceDataset::open(&config).unwrap();
    let sample = set.sample(0, 0).unwrap();
    assert_eq!(sample.target_path, sample.conditioning_path);
    assert_eq!((set.report().single_image_identities, sample.prompt.as_str()), (2, "a photo of a face"));
}

#[test]
fn unusable_pictures_are_counted_and_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    write_set(folder.path(), &[(3, 3), (2, 0)]);
    fs::write(folder.path().join("p0/vanilla/A_photo_of_conceptname_0.png"), "text").unwrap();
    fs::remove_file(folder.path().join("p0/vanilla/A_photo_of_conceptname_1.png")).unwrap();
    let set = open_vanilla(folder.path());
    for index in 0..30 {
        let sample = set.sample(2, index).unwrap();
        assert_ne!(sample.target_path, sample.conditioning_path);
    }
    assert_eq!((set.report().missing, set.report().unreadable, set.report().images), (1, 1, 7));
}

#[test]
fn a_set_without_one_readable_picture_is_an_error_not_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.png"), "text").unwrap();
    fs::write(folder.path().join("b.png"), "text").unwrap();
    assert!(matches!(open(folder.path()).sample(0, 0), Err(Error::Dataset { .. })));
    assert!(matches!(open(folder.path()).batch(0, 0, 0, 1, 2, &Device::Cpu), Err(Error::Dataset { .. })));
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(FaceDataset::open(&DatasetConfig::new(empty.path(), 8)), Err(Error::Dataset { .. })));
}

#[test]
fn balanced_sources_are_drawn_by_weight_not_by_size() {
    let (large, small) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_set(large.path(), &[(10, 10)]);
    write_set(small.path(), &[(2, 0)]);
    let mut config = DatasetConfig::new(large.path(), 8);
    config.sources.push(Source { root: small.path().into(), weight: 3.0, ..Source::default() });
    config.balance = true;
    let set = FaceDataset::open(&config).unwrap();
    let from_small = (0..200).filter(|&i| set.sample(1, i).unwrap().target_path.starts_with(small.path())).count();
    assert!((125..175).contains(&from_small), "{from_small} of 200, expected about 150");
}

#[test]
fn a_generated_set_opens_and_is_the_same_when_generated_again() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("set");
    let config = GenerateConfig {
        out: out.clone(),
        identities: 3,
        images_per_identity: 5,
        size: 24,
        ..GenerateConfig::default()
    };
    let summary = generate_dataset(&config, |_, _| {}).unwrap();
    assert_eq!((summary.identities, summary.images), (3, 15));
    let set = open_vanilla(&out);
    assert_eq!((set.report().images, set.report().identities, set.report().missing), (15, 3, 0));
    for index in 0..15 {
        let sample = set.sample(0, index).unwrap();
        assert!(sample.prompt.contains(" of a face") && sample.encoder_prompt.starts_with("A photo of a face"));
    }
    let before = fs::read(&set.sample(0, 0).unwrap().target_path).unwrap();
    generate_dataset(&config, |_, _| {}).unwrap();
    assert_eq!(before, fs::read(&set.sample(0, 0).unwrap().target_path).unwrap());
    let other = GenerateConfig { seed: 1, ..config.clone() };
    assert!(matches!(generate_dataset(&other, |_, _| {}), Err(Error::Dataset { .. })));
    generate_dataset(&GenerateConfig { force: true, ..other }, |_, _| {}).unwrap();
}

#[test]
fn a_generated_set_leaves_out_what_it_is_told_to() {
    let folder = tempfile::tempdir().unwrap();
    // All scenes but one for photos: each person's photos are all of that one.
    let leave_out = Scene::ALL[1..].iter().map(|scene| (Style::Photo, *scene)).collect();
    let config = GenerateConfig {
        out: folder.path().to_path_buf(),
        identities: 2,
        images_per_identity: 6,
        size: 16,
        leave_out,
        ..GenerateConfig::default()
    };
    generate_dataset(&config, |_, _| {}).unwrap();
    let set = open(folder.path());
    let prompts: Vec<String> = (0..12).map(|i| set.sample(0, i).unwrap().prompt).collect();
    assert_eq!(prompts.iter().filter(|prompt| *prompt == "A photo of a face").count(), 6, "{prompts:?}");

    let everything = Scene::ALL.iter().map(|scene| (Style::Photo, *scene)).collect();
    let error = generate_dataset(&GenerateConfig { leave_out: everything, force: true, ..config }, |_, _| {});
    assert!(error.unwrap_err().to_string().contains("leave_out"));
}

#[test]
fn generating_spares_foreign_folders_and_works_with_one_picture_each() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("thesis.txt"), "years of work").unwrap();
    let config = GenerateConfig {
        out: folder.path().into(),
        identities: 2,
        images_per_identity: 1,
        size: 16,
        ..GenerateConfig::default()
    };
    assert!(matches!(generate_dataset(&config, |_, _| {}), Err(Error::Dataset { .. })));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let out = folder.path().join("new");
    assert_eq!(generate_dataset(&GenerateConfig { out: out.clone(), ..config.clone() }, |_, _| {}).unwrap().images, 2);
    assert!(open(&out).batch(0, 0, 0, 1, 3, &Device::Cpu).is_ok());
    let none = GenerateConfig { identities: 0, out: folder.path().join("none"), ..config };
    assert!(matches!(generate_dataset(&none, |_, _| {}), Err(Error::Config { .. })));
}

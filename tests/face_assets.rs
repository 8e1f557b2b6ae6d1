//! Real face networks on real photographs, against onnxruntime. `.ci/fetch_face_assets FOLDER` fetches both;
//! `FACE_ASSETS=FOLDER cargo test --release --test face_assets -- --nocapture` prints what was measured. Without the
//! variable the tests say that they were skipped.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use lcm_lookahead::data::{load_image, to_tensor};
use lcm_lookahead::face::{Landmarks, aligned_crop};
use lcm_lookahead::formats::{TensorFile, faces};
use lcm_lookahead::models::face_locator::FaceLocator;
use lcm_lookahead::models::identity::IdentityNetwork;
use lcm_lookahead::models::mobile_face_net::{self, MobileFaceNet};
use lcm_lookahead::models::yunet::YuNet;
use lcm_lookahead::nn::Weights;
use lcm_lookahead::random::Address;

/// Against onnxruntime, f32 on both sides.
const LIMIT: f64 = 1e-4;

struct Assets(PathBuf);

impl Assets {
    /// The folder that the environment names; otherwise says why a test is skipped.
    fn find(test: &str) -> Option<Self> {
        match std::env::var_os("FACE_ASSETS") {
            Some(folder) => Some(Assets(folder.into())),
            None => {
                println!("{test}: skipped, for FACE_ASSETS names no folder (.ci/fetch_face_assets makes one)");
                None
            }
        }
    }

    fn weights(&self, network: &str, dtype: DType) -> Result<Weights> {
        Ok(Weights::from_file(TensorFile::open(self.onnx(network))?, dtype, &Device::Cpu))
    }

    fn onnx(&self, network: &str) -> PathBuf {
        self.0.join(format!("{network}.onnx"))
    }

    fn yunet(&self) -> Result<YuNet> {
        Ok(faces::yunet(self.onnx("yunet"), DType::F32, &Device::Cpu)?)
    }

    fn identity_networks(&self) -> Result<[(&'static str, Arc<dyn IdentityNetwork>); 2]> {
        let network = |name| faces::identity_network(self.onnx(name), DType::F32, &Device::Cpu);
        Ok([("sface", network("sface")?), ("fr_feature", network("fr_feature")?)])
    }

    fn mobile_face_net(&self, dtype: DType) -> Result<MobileFaceNet> {
        let config = mobile_face_net::Config::fr_feature();
        Ok(MobileFaceNet::load(&config, &self.weights("fr_feature", dtype)?)?)
    }

    fn photos(&self) -> Result<BTreeMap<String, Tensor>> {
        files(&self.0.join("photos"))?
            .into_iter()
            .filter(|path| path.extension().is_some_and(|extension| extension == "jpg"))
            .map(|path| Ok((stem(&path)?, to_tensor(&load_image(&path)?, &Device::Cpu)?.unsqueeze(0)?)))
            .collect()
    }
}

fn stem(path: &Path) -> Result<String> {
    Ok(path.file_stem().context("a file's name")?.to_string_lossy().into_owned())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// A picture of the reference, `(height, width, 3)` in bytes, as `(1, 3, height, width)` in [-1, 1].
fn image(bytes: &Tensor) -> Result<Tensor> {
    Ok(bytes.to_dtype(DType::F32)?.permute((2, 0, 1))?.unsqueeze(0)?.affine(1.0 / 127.5, -1.0)?.contiguous()?)
}

fn relative_error(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let norm = |x: &Tensor| -> Result<f64> { Ok(x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    Ok(norm(&(found.reshape(expected.shape())? - expected)?)? / norm(expected)?)
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[test]
fn networks_say_what_onnxruntime_says() -> Result<()> {
    let Some(assets) = Assets::find("networks_say_what_onnxruntime_says") else { return Ok(()) };
    let reference: HashMap<String, Tensor> =
        candle_core::safetensors::load(assets.0.join("reference.safetensors"), &Device::Cpu)?;
    let (yunet, networks) = (assets.yunet()?, assets.identity_networks()?);
    let (mut worst, mut probability) = (BTreeMap::<String, f64>::new(), 0f64);
    for photo in assets.photos()?.keys() {
        let get = |name: &str| reference.get(&format!("{photo}.{name}")).with_context(|| format!("{photo}.{name}"));
        let mut compare = |network: &str, found: &Tensor, expected: &str| -> Result<()> {
            let error = relative_error(found, get(expected)?)?;
            let most = worst.entry(network.to_string()).or_default();
            *most = most.max(error);
            ensure!(error < LIMIT, "{photo}.{expected}: relative error {error:e}");
            Ok(())
        };
        for level in yunet.levels(&image(get("picture")?)?)? {
            compare("yunet", &level.boxes, &format!("bbox_{}", level.stride))?;
            compare("yunet", &level.landmarks, &format!("kps_{}", level.stride))?;
            for (logits, name) in [(&level.scores, "cls"), (&level.objectness, "obj")] {
                // Probabilities, most of them tiny, are compared as they are.
                let expected = get(&format!("{name}_{}", level.stride))?;
                let found = (logits.neg()?.exp()? + 1.0)?.recip()?.reshape(expected.shape())?;
                let difference = f64::from((found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?);
                probability = probability.max(difference);
                ensure!(difference < LIMIT, "{photo}.{name}_{}: differs by {difference:e}", level.stride);
            }
        }
        let crop = image(get("crop")?)?;
        for (name, network) in &networks {
            compare(name, &network.embed(&crop)?, name)?;
        }
    }
    println!("relative errors against onnxruntime: {worst:?}; probabilities differ by up to {probability:e}");
    Ok(())
}

#[test]
fn faces_of_the_photographs_are_found_and_told_apart() -> Result<()> {
    let Some(assets) = Assets::find("faces_of_the_photographs_are_found_and_told_apart") else { return Ok(()) };
    let (yunet, photos) = (assets.yunet()?, assets.photos()?);
    let mut crops = BTreeMap::new();
    for (name, photo) in &photos {
        let found = yunet.detect(photo)?.remove(0);
        let (_, _, height, width) = photo.dims4()?;
        println!("{name}: {width} x {height}, scores {:?}", found.iter().map(|f| f.score).collect::<Vec<_>>());
        let [left_eye, right_eye, nose, left_mouth, right_mouth] =
            yunet.locate(photo)?.remove(0).with_context(|| format!("no face in {name}"))?;
        ensure!(left_eye[0] < right_eye[0] && left_mouth[0] < right_mouth[0], "{name}: left and right");
        ensure!(left_eye[1] < nose[1] && nose[1] < left_mouth[1], "{name}: above and below");
        crops.insert(name.clone(), aligned_crop(photo, &[[left_eye, right_eye, nose, left_mouth, right_mouth]], 112)?);
    }
    for (network_name, network) in assets.identity_networks()? {
        let embed = |name: &str| -> Result<Vec<f32>> { Ok(network.embed(&crops[name])?.flatten_all()?.to_vec1()?) };
        let pair = |a: &str, b: &str| -> Result<f64> { Ok(cosine(&embed(a)?, &embed(b)?)) };
        let same = [pair("person_a_1", "person_a_2")?, pair("person_b_1", "person_b_2")?];
        let mut others = Vec::new();
        for a in ["person_a_1", "person_a_2"] {
            for b in ["person_b_1", "person_b_2", "impostor_1", "impostor_2"] {
                others.push(pair(a, b)?);
            }
        }
        let most = others.iter().copied().fold(-1.0, f64::max);
        println!("{network_name}: same {same:.3?}, others at most {most:.3}");
        ensure!(same.iter().all(|cosine| *cosine > most + 0.1), "{network_name}: same {same:?}, others {others:?}");
    }
    Ok(())
}

#[test]
fn persons_of_orl_are_told_apart() -> Result<()> {
    let Some(assets) = Assets::find("persons_of_orl_are_told_apart") else { return Ok(()) };
    let yunet = assets.yunet()?;
    let (mut persons, mut crops, mut missed) = (Vec::new(), Vec::new(), 0);
    for person in files(&assets.0.join("orl"))? {
        for path in files(&person)? {
            let picture = to_tensor(&load_image(&path)?, &Device::Cpu)?.unsqueeze(0)?;
            // Faces fill these pictures: some margin lets the detector see them whole.
            let margin = 32;
            let wide = picture.pad_with_same(2, margin, margin)?.pad_with_same(3, margin, margin)?;
            match yunet.locate(&wide)?.remove(0) {
                Some(face) => {
                    let face: Landmarks = face.map(|[x, y]| [x - margin as f64, y - margin as f64]);
                    crops.push(aligned_crop(&picture, &[face], 112)?);
                    persons.push(stem(&person)?);
                }
                None => missed += 1,
            }
        }
    }
    println!("{} faces found, {missed} missed", crops.len());
    ensure!(missed <= 4, "{missed} faces missed");
    for (name, network) in assets.identity_networks()? {
        let mut embeddings: Vec<Vec<f32>> = Vec::new();
        for batch in crops.chunks(20) {
            embeddings.extend(network.embed(&Tensor::cat(batch, 0)?)?.to_vec2::<f32>()?);
        }
        let (mut same, mut other) = (Vec::new(), Vec::new());
        for i in 0..embeddings.len() {
            for j in 0..i {
                let cosine = cosine(&embeddings[i], &embeddings[j]);
                if persons[i] == persons[j] { same.push(cosine) } else { other.push(cosine) }
            }
        }
        other.sort_by(|a, b| b.total_cmp(a));
        let threshold = other[other.len() / 1000];
        let accepted = same.iter().filter(|cosine| **cosine > threshold).count() as f64 / same.len() as f64;
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        println!("{name}: same {:.3}, other {:.3}, TAR at FAR 1e-3 {accepted:.4}", mean(&same), mean(&other));
        ensure!(accepted >= 0.99, "{name}: TAR at FAR 1e-3 is {accepted}");
    }
    Ok(())
}

#[test]
fn the_gradient_reaches_the_pixels_through_the_aligned_crop() -> Result<()> {
    let Some(assets) = Assets::find("the_gradient_reaches_the_pixels_through_the_aligned_crop") else { return Ok(()) };
    let (photos, network) = (assets.photos()?, assets.mobile_face_net(DType::F64)?);
    let photo = &photos["person_a_1"];
    let face = assets.yunet()?.locate(photo)?.remove(0).context("no face")?;
    let photo = photo.to_dtype(DType::F64)?;
    let other = photos["person_b_1"].to_dtype(DType::F64)?;
    let other_face = assets.yunet()?.locate(&photos["person_b_1"])?.remove(0).context("no face")?;
    let target = network.embed(&aligned_crop(&other, &[other_face], 112)?)?;
    let loss = |image: &Tensor| -> Result<Tensor> {
        Ok((network.embed(&aligned_crop(image, &[face], 112)?)? * &target)?.sum_all()?)
    };
    let variable = Var::from_tensor(&photo)?;
    let gradient = loss(&variable)?.backward()?.remove(&variable).context("no gradient")?;
    let direction = Address::new(1, "direction").normal(photo.shape(), DType::F64, &Device::Cpu)?;
    let analytic = (&gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
    let at = |step: f64| -> Result<f64> { Ok(loss(&(&photo + (&direction * step)?)?)?.to_scalar::<f64>()?) };
    // Small enough that few of the PReLUs change sides.
    let step = 1e-7;
    let numeric = (at(step)? - at(-step)?) / (2.0 * step);
    println!("derivative along a random direction: {analytic:.9}, by differences {numeric:.9}");
    ensure!((analytic - numeric).abs() < 1e-4 * numeric.abs(), "{analytic} {numeric}");
    Ok(())
}

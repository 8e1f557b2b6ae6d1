//! The portraits that pretraining sees.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use rand::Rng;

use super::files::save_tensors;
use super::training::Options;
use super::workers::Workers;
use crate::face::Landmarks;
use crate::formats::TensorFile;
use crate::mini::RESOLUTION;
use crate::mini::portrait::{Identity, Portrait, Pose, Scene, Style};
use crate::random::Address;
use crate::{Error, Result};

/// Seeds of the identities that pretraining may draw.
pub const TRAINING_IDENTITIES: Range<u64> = 0..100_000;
/// Seeds from here on are held out: no network of the miniature has seen one of these people.
pub const HELD_OUT_FROM: u64 = 1_000_000;
/// Portraits of each person, one after the other.
pub(super) const PER_IDENTITY: usize = 8;
/// Of how many portraits a piece of the pool is that is drawn or not as a whole.
const PIECE: usize = 64;
/// Most portraits of a pool: the kernel that picks pictures out of it counts its bytes in 32 bits.
const MOST: usize = 80_000;

/// Whether a style and a scene are never drawn together in pretraining: a ninth of the pairs of a style other than the
/// photo with a scene other than the studio, each style and each scene being seen in others. What the networks make of these pairs shows whether they combine.
pub fn held_out_combination(style: Style, scene: Scene) -> bool {
    let place = |found: Option<usize>| found.unwrap_or_default();
    let style = place(Style::ALL.iter().position(|known| *known == style));
    let scene = place(Scene::ALL.iter().position(|known| *known == scene));
    style > 0 && scene > 0 && (5 * style + scene) % 9 == 4
}

/// A portrait of a person, all else drawn at `address`. A quarter of them are photos.
fn portrait(identity: u64, address: Address) -> Portrait {
    let mut rng = address.rng();
    let style = match rng.random_range(0..4) {
        0 => Style::Photo,
        _ => Style::ALL[rng.random_range(0..Style::ALL.len())],
    };
    let scene = loop {
        let scene = Scene::ALL[rng.random_range(0..Scene::ALL.len())];
        if !held_out_combination(style, scene) {
            break scene;
        }
    };
    Portrait {
        identity: Identity::from_seed(identity),
        style,
        scene,
        pose: Pose::from_seed(rng.random_range(0..1 << 40)),
    }
}

/// Drawn portraits: people `first..`, the same number of each one after the other.
#[derive(Debug)]
pub struct Pool {
    /// What is drawn.
    pub portraits: Vec<Portrait>,
    /// The true landmarks, in pixels, the centre of the first pixel at `[0, 0]`.
    pub landmarks: Vec<Landmarks>,
    /// `(portraits, side, side, 3)`, bytes, where the networks are.
    pictures: Tensor,
}

impl Pool {
    /// The pool of a run: read from `options.pool_file` where that exists, or else drawn; at most `options.pool`
    /// portraits.
    ///
    /// # Errors
    /// Those of [`load`](Self::load) and [`draw`](Self::draw).
    pub fn of(options: &Options) -> Result<Self> {
        match &options.pool_file {
            Some(file) if file.exists() => Ok(Self::load(file, &options.device)?.first(options.pool)),
            _ => Self::draw(options, 0),
        }
    }

    /// Draws up to `options.pool` portraits of the training identities from `first` on, as many as the time budget lets.
    ///
    /// # Errors
    /// [`Error::Argument`] where the people are not all for training.
    pub fn draw(options: &Options, first: u64) -> Result<Self> {
        let count = options.pool.clamp(PER_IDENTITY, MOST);
        let people = first..first + count.div_ceil(PER_IDENTITY) as u64;
        if people.end > TRAINING_IDENTITIES.end {
            let expected = format!("training identities, {TRAINING_IDENTITIES:?}");
            return Err(Error::argument("Pool::draw", "first", expected, format!("{people:?}")));
        }
        Self::draw_people(options, people, count)
    }

    /// Draws so many portraits of people that no stage trains with.
    ///
    /// # Errors
    /// Where a thread cannot be started or memory is out.
    pub fn draw_held_out(options: &Options, count: usize) -> Result<Self> {
        let people = HELD_OUT_FROM..HELD_OUT_FROM + count.div_ceil(PER_IDENTITY) as u64;
        Self::draw_people(&Options { budget: Duration::MAX, ..options.clone() }, people, count)
    }

    fn draw_people(options: &Options, people: Range<u64>, count: usize) -> Result<Self> {
        let (began, address) = (Instant::now(), Address::new(options.seed, "pretraining portrait"));
        let workers = Workers::new(options.threads)?;
        let pieces = workers.map(count, PIECE, |range| {
            // The first piece is drawn in any case: an empty pool is of no use.
            if range.start > 0 && options.start.elapsed() > options.budget {
                return Ok(None);
            }
            let drawn = range.map(|index| {
                let portrait = portrait(people.start + (index / PER_IDENTITY) as u64, address.sample(index));
                let drawn = portrait.render(RESOLUTION as u32);
                let landmarks = drawn.landmarks.map(|point| point.map(|value| f64::from(value) - 0.5));
                (portrait, landmarks, drawn.image.into_raw())
            });
            Ok(Some(drawn.collect::<Vec<_>>()))
        })?;
        let (mut portraits, mut landmarks, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
        // Pieces are begun in order, so those that were drawn are the first ones, but for a last few.
        for (portrait, points, picture) in pieces.into_iter().map_while(|piece| piece).flatten() {
            portraits.push(portrait);
            landmarks.push(points);
            bytes.extend_from_slice(&picture);
        }
        let shape = (portraits.len(), RESOLUTION, RESOLUTION, 3);
        println!("{} portraits drawn in {:.1} s", portraits.len(), began.elapsed().as_secs_f64());
        Ok(Pool { portraits, landmarks, pictures: Tensor::from_vec(bytes, shape, &options.device)? })
    }

    /// Writes the pool to a file.
    ///
    /// # Errors
    /// [`Error::Io`] where that fails.
    pub fn save(&self, file: &Path) -> Result<()> {
        let numbers = |of: fn(&Portrait) -> i64| -> Result<Tensor> {
            let numbers: Vec<i64> = self.portraits.iter().map(of).collect();
            Ok(Tensor::from_vec(numbers, self.portraits.len(), &Device::Cpu)?)
        };
        let place = |portrait: &Portrait| {
            let style = Style::ALL.iter().position(|style| *style == portrait.style).unwrap_or_default();
            let scene = Scene::ALL.iter().position(|scene| *scene == portrait.scene).unwrap_or_default();
            (style * Scene::ALL.len() + scene) as i64
        };
        let landmarks: Vec<f64> = self.landmarks.iter().flatten().flatten().copied().collect();
        let tensors = HashMap::from([
            ("identity".to_string(), numbers(|portrait| portrait.identity.seed as i64)?),
            ("pose".to_string(), numbers(|portrait| portrait.pose.seed as i64)?),
            ("style_and_scene".to_string(), numbers(place)?),
            ("landmarks".to_string(), Tensor::from_vec(landmarks, (self.len(), 5, 2), &Device::Cpu)?),
            ("pictures".to_string(), self.pictures.clone()),
        ]);
        save_tensors(file, &tensors)
    }

    /// Reads a pool that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`Error::Format`] where the file is another, [`Error::Argument`] where it shows people that are not for training.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let wrong = |reason: &str| Error::Format { path: path.into(), reason: reason.into() };
        let numbers = |name: &str| -> Result<Vec<i64>> { Ok(file.load(name, &Device::Cpu)?.to_vec1::<i64>()?) };
        let (identities, poses, places) = (numbers("identity")?, numbers("pose")?, numbers("style_and_scene")?);
        let landmarks = file.load("landmarks", &Device::Cpu)?.flatten_all()?.to_vec1::<f64>()?;
        let pictures = file.load("pictures", device)?;
        let count = identities.len();
        let whole = (count, RESOLUTION, RESOLUTION, 3);
        if poses.len() != count || places.len() != count || landmarks.len() != 10 * count || count == 0 {
            return Err(wrong("not a pool of portraits"));
        }
        if pictures.dims4()? != whole || pictures.dtype() != DType::U8 {
            return Err(wrong("not a pool of portraits of the miniature's size"));
        }
        let portraits = identities.iter().zip(&poses).zip(&places).map(|((identity, pose), place)| {
            let (place, scenes) = (*place as usize, Scene::ALL.len());
            let style = Style::ALL.get(place / scenes).ok_or_else(|| wrong("a style that is not known"))?;
            if !TRAINING_IDENTITIES.contains(&(*identity as u64)) {
                return Err(wrong("people that are not for training"));
            }
            Ok(Portrait {
                identity: Identity::from_seed(*identity as u64),
                style: *style,
                scene: Scene::ALL[place % scenes],
                pose: Pose::from_seed(*pose as u64),
            })
        });
        let portraits = portraits.collect::<Result<Vec<_>>>()?;
        let points = |ten: &[f64]| -> Landmarks { std::array::from_fn(|i| [ten[2 * i], ten[2 * i + 1]]) };
        Ok(Pool { portraits, landmarks: landmarks.chunks_exact(10).map(points).collect(), pictures })
    }

    /// Only the first portraits, at most so many.
    pub(super) fn first(mut self, most: usize) -> Self {
        let count = most.clamp(1, self.len());
        self.portraits.truncate(count);
        self.landmarks.truncate(count);
        self
    }

    /// How many portraits.
    pub fn len(&self) -> usize {
        self.portraits.len()
    }

    /// Whether there is none; a pool always has one.
    pub fn is_empty(&self) -> bool {
        self.portraits.is_empty()
    }

    /// How many people, the last of them perhaps with fewer portraits.
    pub fn people(&self) -> usize {
        self.len().div_ceil(PER_IDENTITY)
    }

    /// Some pictures, `(chosen, side, side, 3)` in [-1, 1], f32, where the pool lies.
    ///
    /// # Errors
    /// [`Error::Candle`] for an index that is too large, or where memory is out.
    pub fn channels_last(&self, chosen: &[usize]) -> Result<Tensor> {
        let rows: Vec<u32> = chosen.iter().map(|index| *index as u32).collect();
        let rows = Tensor::from_vec(rows, chosen.len(), self.pictures.device())?;
        Ok(self.pictures.index_select(&rows, 0)?.to_dtype(DType::F32)?.affine(2.0 / 255.0, -1.0)?)
    }

    /// Some pictures as networks take them, `(chosen, 3, side, side)` in [-1, 1], f32.
    ///
    /// # Errors
    /// As [`channels_last`](Self::channels_last).
    pub fn images(&self, chosen: &[usize]) -> Result<Tensor> {
        Ok(self.channels_last(chosen)?.permute((0, 3, 1, 2))?.contiguous()?)
    }

    /// One picture.
    ///
    /// # Errors
    /// As [`channels_last`](Self::channels_last).
    pub fn picture(&self, index: usize) -> Result<RgbImage> {
        let bytes = self.pictures.get(index)?.flatten_all()?.to_vec1::<u8>()?;
        let side = RESOLUTION as u32;
        // A row of the tensor holds exactly a picture's bytes.
        Ok(RgbImage::from_raw(side, side, bytes).unwrap_or_else(|| RgbImage::new(side, side)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mini::portrait::HELD_OUT_COMBINATIONS;

    #[test]
    fn a_pool_shows_each_training_identity_several_times_and_survives_a_file() -> Result<()> {
        let folder = std::env::temp_dir().join(format!("lcm-lookahead-pool-{}", std::process::id()));
        let options = Options { pool: 16, threads: 2, ..Options::default() };
        let pool = Pool::draw(&options, 3)?;
        let identity = |i: usize| pool.portraits[i].identity.seed;
        assert!((0..16).all(|i| identity(i) == 3 + (i / PER_IDENTITY) as u64));
        let file = folder.join("pool.safetensors");
        pool.save(&file)?;
        let read = Pool::load(&file, &Device::Cpu)?;
        std::fs::remove_dir_all(&folder).ok();
        assert_eq!((&pool.portraits, &pool.landmarks), (&read.portraits, &read.landmarks));
        let drawn = pool.portraits[9].render(RESOLUTION as u32).image;
        assert_eq!(read.picture(9)?, drawn);
        let value = read.images(&[9])?.get(0)?.get(1)?.get(5)?.get(7)?.to_scalar::<f32>()?;
        assert!((value - (f32::from(drawn.get_pixel(7, 5)[1]) / 127.5 - 1.0)).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn what_experiments_hold_out_pretraining_did_not_see_but_for_the_photo() {
        let unseen = HELD_OUT_COMBINATIONS.into_iter().filter(|(style, scene)| held_out_combination(*style, *scene));
        let expected = HELD_OUT_COMBINATIONS.into_iter().filter(|(style, _)| *style != Style::Photo);
        assert_eq!(unseen.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    }

    #[test]
    fn held_out_identities_are_refused() {
        let options = Options { pool: 16, threads: 1, ..Options::default() };
        let error = Pool::draw(&options, TRAINING_IDENTITIES.end - 1).unwrap_err();
        assert!(matches!(error, Error::Argument { .. }), "{error}");
        const { assert!(TRAINING_IDENTITIES.end <= HELD_OUT_FROM) };
    }
}

//! How pictures are judged: is it the person, is it what the text says.

use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use lcm_lookahead::lookahead::IdentityLoss;
use lcm_lookahead::mini::MiniConfig;
use lcm_lookahead::mini::portrait::{Identity, Scene, Style};
use lcm_lookahead::models::clip_vision::ClipVision;
use lcm_lookahead::models::face_locator::FaceLocator;
use lcm_lookahead::models::mini_identity::MiniIdentity;
use lcm_lookahead::models::roles::TokenizedClipText;
use lcm_lookahead::nn::Weights;
use lcm_lookahead::{Result, ops};

use crate::people::portrait;

/// Networks that judge pictures.
pub struct Judge {
    /// An identity network that no training has seen.
    pub held_out: IdentityLoss,
    /// The identity network of the losses.
    pub taught: IdentityLoss,
    text: TokenizedClipText,
    vision: ClipVision,
    /// Embeddings of the captions of all styles and scenes, `(styles * scenes, dimension)`.
    captions: Tensor,
}

/// How well a picture fits its text.
#[derive(Clone, Copy, Debug)]
pub struct TextFit {
    /// Cosine of the embeddings of picture and text.
    pub cosine: f64,
    /// Whether the nearest caption of all styles and scenes has the text's style.
    pub style: bool,
    /// Whether it has the text's scene.
    pub scene: bool,
}

impl Judge {
    /// The miniature's networks in the type of `weights`, with an identity network that is not part of it.
    pub fn load(weights: &Weights, held_out: MiniIdentity) -> Result<Self> {
        let config = MiniConfig::mini();
        let locator: Arc<dyn FaceLocator> = Arc::new(config.load_face_locator(weights)?);
        let text = config.load_text_encoder(weights)?;
        let person = Identity::from_seed(0);
        let all = Style::ALL.iter().flat_map(|style| Scene::ALL.iter().map(|scene| (*style, *scene)));
        let captions: Vec<String> = all.map(|(style, scene)| portrait(&person, style, scene).prompt()).collect();
        Ok(Judge {
            held_out: IdentityLoss::new(Arc::new(held_out), locator.clone()),
            taught: IdentityLoss::new(Arc::new(config.load_identity_network(weights)?), locator),
            captions: embed_texts(&text, &captions)?,
            vision: config.load_image_encoder(weights)?,
            text,
        })
    }

    /// The networks' own type of some pictures.
    fn input(&self, pictures: &Tensor) -> Result<Tensor> {
        Ok(pictures.detach().to_dtype(self.vision.kind().0)?.clamp(-1.0, 1.0)?)
    }

    /// CLIP's image tower.
    pub fn vision(&self) -> &ClipVision {
        &self.vision
    }

    /// CLIP's embeddings of pictures `(pictures, 3, height, width)`, of unit length.
    pub fn embed(&self, pictures: &Tensor) -> Result<Tensor> {
        normalise(&self.vision.forward(&self.vision.preprocess(&self.input(pictures)?)?)?.pooled.detach())
    }

    /// How well pictures fit their texts, captions of a style and scene.
    pub fn text(&self, pictures: &Tensor, texts: &[String]) -> Result<Vec<TextFit>> {
        let (pictures, texts_embedded) = (self.embed(pictures)?, embed_texts(&self.text, texts)?);
        let cosines = (&pictures * texts_embedded)?.sum(D::Minus1)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let nearest = ops::linear(&pictures, &self.captions, None)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
        let fits = cosines.into_iter().zip(nearest).zip(texts).map(|((cosine, nearest), text)| {
            let (style, scene) = (nearest as usize / Scene::ALL.len(), nearest as usize % Scene::ALL.len());
            let (style, scene) = (Style::ALL[style].phrase(), Scene::ALL[scene].phrase());
            TextFit { cosine, style: text.starts_with(style), scene: text.ends_with(scene) }
        });
        Ok(fits.collect())
    }

    /// Cosines of the faces of pictures with those of other pictures, pair by pair, by one of the identity networks;
    /// none where either shows no face.
    pub fn identity(&self, by: &IdentityLoss, pictures: &Tensor, others: &Tensor) -> Result<Vec<Option<f64>>> {
        let mut cosines = vec![None; pictures.dim(0)?];
        let (pictures, others) = (by.embed(&self.input(pictures)?)?, by.embed(&self.input(others)?)?);
        let (Some(faces), Some(other_faces)) = (pictures.0, others.0) else { return Ok(cosines) };
        let both: Vec<usize> = pictures.1.iter().copied().filter(|place| others.1.contains(place)).collect();
        let rows = |places: &[usize], faces: &Tensor| -> Result<Tensor> {
            let kept = (0..places.len()).filter(|i| both.contains(&places[*i])).map(|i| i as u32);
            let kept: Vec<u32> = kept.collect();
            let count = kept.len();
            Ok(faces.detach().index_select(&Tensor::from_vec(kept, count, faces.device())?, 0)?)
        };
        if both.is_empty() {
            return Ok(cosines);
        }
        let products = (rows(&pictures.1, &faces)? * rows(&others.1, &other_faces)?)?;
        let found = products.sum(D::Minus1)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        for (place, cosine) in both.into_iter().zip(found) {
            cosines[place] = Some(cosine);
        }
        Ok(cosines)
    }
}

fn embed_texts(encoder: &TokenizedClipText, texts: &[String]) -> Result<Tensor> {
    let ids = encoder.tokenizer.encode(texts, encoder.network.device())?;
    normalise(&encoder.network.forward(&ids)?.pooled.detach())
}

fn normalise(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?)
}

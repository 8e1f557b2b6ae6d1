//! Guiding the latents of one denoising step by a loss on the picture they will become (paper, section 5.1).

use std::sync::Arc;

use candle_core::{D, DType, Tensor, Var};

use crate::lookahead::ImageLoss;
use crate::models::roles::LatentDecoder;
use crate::nn::LoraSet;
use crate::{Error, Result, ops};

/// What stands for the final picture while it is not there yet.
#[derive(Clone, Debug)]
pub enum Through {
    /// The one-step preview of the model with this LCM-LoRA, without guidance by text: the paper's choice.
    Preview(LoraSet),
    /// The clean latents that the sampler's own (guided) noise prediction implies, "typically blurry and discolored in
    /// early timesteps".
    X0,
}

/// Repeated gradient steps on the latents at one step of sampling (paper, section 5.1 and figure 5, after Wallace et al.
/// 2023). The remaining steps go on as ever.
///
/// Every repeat predicts the clean latents by [`Through`], decodes them, and moves the latents against the gradient of the
/// loss: `z <- z - step_size g / rms(g)`, where each picture's gradient is divided by its own root mean square. So the
/// step size means the same for every loss, and a picture's result does not depend on those beside it.
pub struct LatentGuidance<'a> {
    /// The loss between what the latents will become and `target`.
    pub loss: &'a dyn ImageLoss,
    /// The guiding pictures, `(batch, 3, height, width)` in [-1, 1]: one for each picture that is drawn.
    pub target: &'a Tensor,
    /// What stands for the final picture.
    pub through: Through,
    /// The decoder the gradient passes through; a small one will do
    /// ([`Base::preview_decoder`](crate::lookahead::Base::preview_decoder)).
    pub decoder: Arc<dyn LatentDecoder>,
    /// The step to guide at: as many steps as are then left, itself included, from the number of all steps (pure noise)
    /// down to 1. 44 of 50 in the paper.
    pub at: usize,
    /// Gradient steps. The paper gives no number.
    pub repeats: usize,
    /// Length of a gradient step, as the root mean square of its change of the latents, whose own is near 1. The paper
    /// gives no number.
    pub step_size: f64,
    /// Whether the activations of the U-Net are recomputed in the backward pass: less memory, more time.
    pub recompute: bool,
}

impl LatentGuidance<'_> {
    /// The index of the step to guide at, of `steps` steps.
    pub(super) fn index(&self, steps: usize) -> Result<usize> {
        if !(1..=steps).contains(&self.at) {
            let expected = format!("1 to {steps} steps left");
            return Err(Error::argument("LatentGuidance", "at", expected, self.at.to_string()));
        }
        Ok(steps - self.at)
    }

    /// Moves latents; `clean` predicts the clean latents from them. Returns the moved ones and the loss before every
    /// step, the mean over the pictures that counted.
    pub(super) fn guide(
        &self,
        latents: &Tensor,
        clean: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Vec<f64>)> {
        let mut latents = latents.detach();
        let mut losses = Vec::with_capacity(self.repeats);
        for _ in 0..self.repeats {
            let (loss, gradient) = self.gradient(&latents, &clean)?;
            losses.push(loss);
            let Some(gradient) = gradient else { continue };
            let wide = ops::widen(&gradient)?;
            let batch = wide.dim(0)?;
            let rms = wide.reshape((batch, ()))?.sqr()?.mean_keepdim(D::Minus1)?.sqrt()?.reshape((batch, 1, 1, 1))?;
            // A picture that did not count, for instance without a face, has no gradient and stays as it is.
            let step = wide.broadcast_div(&(rms + 1e-30)?)?.affine(self.step_size, 0.0)?;
            latents = ops::cast(&(ops::widen(&latents)? - step)?, latents.dtype())?.detach();
        }
        Ok((latents, losses))
    }

    /// The loss of latents and its gradient by them; none where no picture counted.
    fn gradient(&self, latents: &Tensor, clean: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(f64, Option<Tensor>)> {
        let variable = Var::from_tensor(latents)?;
        let pictures = self.decoder.decode(&clean(variable.as_tensor())?)?;
        let value = self.loss.loss(&pictures, &self.target.to_dtype(pictures.dtype())?)?;
        let loss = value.loss.detach().to_dtype(DType::F64)?.to_scalar::<f64>()?;
        if value.counted == 0 {
            return Ok((loss, None));
        }
        Ok((loss, value.loss.backward()?.get(&variable).map(Tensor::detach)))
    }
}

/// Pictures drawn with [`LatentGuidance`].
#[derive(Clone, Debug)]
pub struct GuidedPictures {
    /// `(batch, 3, height, width)`, nominally in [-1, 1].
    pub images: Tensor,
    /// The loss before each gradient step, the mean over the pictures that counted.
    pub losses: Vec<f64>,
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::lookahead::{Base, LossValue};
    use crate::mini;
    use crate::models::unet::Pass;
    use crate::nn::Loras;
    use crate::personalize::{TextToImage, TextToImageOptions};
    use crate::random::Address;
    use crate::schedule::SamplerKind;

    /// The mean squared difference of the pixels.
    struct Pixels;

    impl ImageLoss for Pixels {
        fn name(&self) -> &str {
            "pixels"
        }

        fn loss(&self, previews: &Tensor, target: &Tensor) -> Result<LossValue> {
            Ok(LossValue { loss: (previews - target)?.sqr()?.mean_all()?, counted: previews.dim(0)? })
        }
    }

    struct Setting {
        base: Base,
        text_to_image: TextToImage,
        target: Tensor,
        noise: Tensor,
        prompts: Vec<String>,
        options: TextToImageOptions,
    }

    impl Setting {
        fn new(batch: usize) -> Result<Self> {
            let base = mini::tiny_base(1, DType::F64, &Device::Cpu)?;
            let text_to_image = TextToImage::new(&base);
            let draw = |purpose, shape| Address::new(3, purpose).normal_batch(batch, shape, DType::F64, &Device::Cpu);
            Ok(Setting {
                target: (draw("target", (3, 32, 32))? * 0.3)?,
                noise: draw("noise", (4, 8, 8))?,
                prompts: vec!["a photo of a face".to_string(); batch],
                options: TextToImageOptions {
                    steps: 5,
                    sampler: SamplerKind::Ddim,
                    guidance_scale: 2.0,
                    ..TextToImageOptions::default()
                },
                base,
                text_to_image,
            })
        }

        fn guidance(&self, through: Through) -> LatentGuidance<'_> {
            LatentGuidance {
                loss: &Pixels,
                target: &self.target,
                through,
                decoder: self.base.preview_decoder.clone(),
                at: 4,
                repeats: 3,
                step_size: 0.05,
                recompute: false,
            }
        }

        fn preview(&self) -> Through {
            Through::Preview(self.base.lcm_lora.clone())
        }

        fn draw(&self, guidance: &LatentGuidance<'_>) -> Result<GuidedPictures> {
            self.text_to_image.generate_guided(&self.prompts, &self.noise, &self.options, guidance)
        }
    }

    fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
        Ok((a - b)?.abs()?.max_all()?.to_scalar::<f64>()?)
    }

    #[test]
    fn every_gradient_step_lowers_the_loss_by_preview_and_by_x0() -> Result<()> {
        let setting = Setting::new(2)?;
        for through in [setting.preview(), Through::X0] {
            let pictures = setting.draw(&setting.guidance(through))?;
            let losses = &pictures.losses;
            assert!(losses.len() == 3 && losses[1] < losses[0] && losses[2] < losses[1], "{losses:?}");
            assert_eq!(pictures.images.dims(), [2, 3, 32, 32]);
        }
        Ok(())
    }

    #[test]
    fn the_gradient_matches_finite_differences_through_the_network_and_the_decoder() -> Result<()> {
        let setting = Setting::new(1)?;
        let text = setting.base.conditioning(&setting.prompts)?;
        for recompute in [false, true] {
            let pass = Pass { loras: Loras::one(&setting.base.lcm_lora, 1.0), recompute, ..Pass::default() };
            let clean = |latents: &Tensor| {
                let prediction = setting.base.unet.forward(latents, &[801], &text, &pass)?;
                setting.base.schedule.predict_x0(latents, &prediction, &[801])
            };
            let guidance = setting.guidance(Through::X0);
            let loss_at = |latents: &Tensor| Ok::<f64, Error>(guidance.gradient(latents, clean)?.0);
            let (_, gradient) = guidance.gradient(&setting.noise, clean)?;
            let Some(gradient) = gradient else { panic!("no gradient") };
            for sample in 0..3 {
                let address = Address::new(5, "direction").sample(sample);
                let direction = address.normal(setting.noise.shape(), DType::F64, &Device::Cpu)?;
                let at = |size: f64| loss_at(&(&setting.noise + (&direction * size)?)?);
                let numeric = (at(1e-5)? - at(-1e-5)?) / 2e-5;
                let analytic = (&gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
                let error = (analytic - numeric).abs() / numeric.abs();
                assert!(error < 1e-5 && numeric.abs() > 1e-4, "{analytic} and {numeric}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_step_has_the_length_asked_for_and_goes_against_the_gradient() -> Result<()> {
        let setting = Setting::new(2)?;
        let guidance = LatentGuidance { repeats: 1, ..setting.guidance(Through::X0) };
        let clean = |latents: &Tensor| Ok(latents.tanh()?);
        let (moved, _) = guidance.guide(&setting.noise, clean)?;
        let (_, gradient) = guidance.gradient(&setting.noise, clean)?;
        let Some(gradient) = gradient else { panic!("no gradient") };
        let change = (moved - &setting.noise)?;
        for sample in 0..2 {
            let (change, gradient) = (change.get(sample)?, gradient.get(sample)?);
            let rms = |x: &Tensor| Ok::<f64, Error>(x.sqr()?.mean_all()?.sqrt()?.to_scalar::<f64>()?);
            assert!((rms(&change)? - 0.05).abs() < 1e-12);
            let expected = (&gradient * (-0.05 / rms(&gradient)?))?;
            assert!(distance(&change, &expected)? < 1e-12);
        }
        Ok(())
    }

    #[test]
    fn a_pictures_result_does_not_depend_on_those_beside_it() -> Result<()> {
        let (both, one) = (Setting::new(2)?, Setting::new(1)?);
        let together = both.draw(&both.guidance(both.preview()))?.images;
        let alone = one.draw(&one.guidance(one.preview()))?.images;
        assert!(distance(&together.narrow(0, 0, 1)?, &alone)? < 1e-9);
        Ok(())
    }

    #[test]
    fn without_repeats_the_pictures_are_those_without_guidance() -> Result<()> {
        let setting = Setting::new(1)?;
        let plain = setting.text_to_image.generate(&setting.prompts, &setting.noise, &setting.options)?;
        let none = LatentGuidance { repeats: 0, ..setting.guidance(Through::X0) };
        assert_eq!(distance(&setting.draw(&none)?.images, &plain)?, 0.0);
        assert!(distance(&setting.draw(&setting.guidance(Through::X0))?.images, &plain)? > 1e-3);
        Ok(())
    }

    #[test]
    fn a_step_that_is_not_there_and_targets_that_do_not_fit_are_refused() -> Result<()> {
        let setting = Setting::new(1)?;
        for at in [0, 6] {
            let error = setting.draw(&LatentGuidance { at, ..setting.guidance(Through::X0) }).unwrap_err();
            assert!(matches!(error, Error::Argument { argument: "at", .. }), "{error}");
        }
        let two = Tensor::cat(&[&setting.target, &setting.target], 0)?;
        let error = setting.draw(&LatentGuidance { target: &two, ..setting.guidance(Through::X0) }).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "target", .. }), "{error}");
        Ok(())
    }
}

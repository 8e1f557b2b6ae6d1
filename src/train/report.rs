//! What a training step came to.

use candle_core::{DType, Tensor};

use crate::Result;

/// A scalar that has been computed, or will be: on a GPU the host goes on while the number is on its way.
#[derive(Debug)]
pub(super) enum Reading {
    Known(f64),
    #[cfg(feature = "cuda")]
    OnItsWay(crate::cuda::Reading),
}

impl Reading {
    pub fn start(scalar: &Tensor) -> Result<Self> {
        let scalar = scalar.detach();
        #[cfg(feature = "cuda")]
        if scalar.device().is_cuda() {
            return Ok(Reading::OnItsWay(crate::cuda::Reading::start(&crate::ops::widen(&scalar)?)?));
        }
        Ok(Reading::Known(scalar.to_dtype(DType::F64)?.to_scalar()?))
    }

    pub fn wait(&self) -> Result<f64> {
        match self {
            Reading::Known(value) => Ok(*value),
            #[cfg(feature = "cuda")]
            Reading::OnItsWay(reading) => reading.wait(),
        }
    }
}

/// What a step's losses come to, as far as it was computed: on a GPU that is still going on, and whoever reads the numbers
/// waits for it. So it is best to ask for gradients first.
#[derive(Debug, Default)]
pub struct PendingReport {
    pub(super) diffusion: Option<Reading>,
    pub(super) lookahead: Vec<(String, Reading, usize)>,
    pub(super) alignment: Option<(&'static str, Reading)>,
    pub(super) lora_scale: Option<f64>,
}

impl PendingReport {
    /// The numbers, as soon as they are there.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn read(&self) -> Result<LossReport> {
        Ok(LossReport {
            diffusion: self.diffusion.as_ref().map(Reading::wait).transpose()?,
            lookahead: self
                .lookahead
                .iter()
                .map(|(name, value, counted)| Ok((name.clone(), value.wait()?, *counted)))
                .collect::<Result<_>>()?,
            alignment: self
                .alignment
                .as_ref()
                .map(|(name, value)| Ok::<_, crate::Error>((*name, value.wait()?)))
                .transpose()?,
            lora_scale: self.lora_scale,
        })
    }
}

/// What a step's losses came to.
#[derive(Clone, Debug, Default)]
pub struct LossReport {
    /// The diffusion loss (equation 2).
    pub diffusion: Option<f64>,
    /// Each image loss (equation 4): name, value before its weight, samples that counted.
    pub lookahead: Vec<(String, f64, usize)>,
    /// The loss that keeps the LCM path aligned (section 4.2): name and value before its weight.
    pub alignment: Option<(&'static str, f64)>,
    /// Scale of the LCM-LoRA in the lookahead pass.
    pub lora_scale: Option<f64>,
}

/// What one training step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// The iteration, counted from 0.
    pub step: u64,
    /// The losses, averaged over the gradient-accumulation batches.
    pub losses: LossReport,
    /// Norm of the gradient over all trainable parameters, before clipping; one value an update.
    pub gradient_norms: Vec<f64>,
    /// Factor of the learning-rate schedule.
    pub lr_factor: f64,
}

impl LossReport {
    /// Adds a part of the step, one of `parts` of equal weight.
    pub(super) fn add(&mut self, part: LossReport, parts: u64) {
        let share = 1.0 / parts as f64;
        if let Some(diffusion) = part.diffusion {
            *self.diffusion.get_or_insert(0.0) += diffusion * share;
        }
        for (name, value, counted) in part.lookahead {
            match self.lookahead.iter_mut().find(|(known, ..)| *known == name) {
                // The mean over the samples that counted in any part.
                Some((_, mean, total)) if *total + counted > 0 => {
                    *mean = (*mean * *total as f64 + value * counted as f64) / (*total + counted) as f64;
                    *total += counted;
                }
                Some(_) => {}
                None => self.lookahead.push((name, value, counted)),
            }
        }
        if let Some((name, value)) = part.alignment {
            self.alignment.get_or_insert((name, 0.0)).1 += value * share;
        }
        self.lora_scale = part.lora_scale.or(self.lora_scale);
    }
}

impl StepReport {
    /// The report as named numbers, for the metrics file.
    pub(super) fn values(&self, learning_rates: &[f64]) -> Vec<(String, f64)> {
        let mut values = Vec::new();
        if let Some(diffusion) = self.losses.diffusion {
            values.push(("loss/diffusion".to_string(), diffusion));
        }
        for (name, value, counted) in &self.losses.lookahead {
            if *counted > 0 {
                values.push((format!("loss/{name}"), *value));
            }
            values.push((format!("counted/{name}"), *counted as f64));
        }
        values.extend(self.losses.alignment.map(|(name, value)| (format!("loss/{name}"), value)));
        values.extend(self.losses.lora_scale.map(|scale| ("lora_scale".to_string(), scale)));
        for (i, norm) in self.gradient_norms.iter().enumerate() {
            let name = if i == 0 { "gradient_norm".to_string() } else { format!("gradient_norm_{}", i + 1) };
            values.push((name, *norm));
        }
        for (i, rate) in learning_rates.iter().enumerate() {
            values.push((format!("learning_rate/{i}"), rate * self.lr_factor));
        }
        values
    }
}

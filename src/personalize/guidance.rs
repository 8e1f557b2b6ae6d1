//! Classifier-free guidance (Ho and Salimans 2021), with the terms of the KV path.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::Result;

/// How the noise predictions with and without conditions are combined.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Guidance {
    /// The conditional prediction alone: for LCM sampling.
    None,
    /// `u + scale (c - u)`, where u lacks text, image tokens and reference, and c has all of them.
    Plain {
        /// Guidance scale, 1 for none; 5.0 is the official value where no reference is used.
        scale: f64,
    },
    /// The official three-term form (official pipeline; the paper's supplementary):
    /// `u + no_kv (c - u) + full (c_kv - u) + kv (u_kv - u)`, where c has text and image tokens, and `_kv` has the
    /// reference besides. The reference of `u_kv` comes from a KV encoder without text.
    ThreeTerm {
        /// Weight of text and image tokens without the reference.
        no_kv: f64,
        /// Weight of all conditions.
        full: f64,
        /// Weight of the reference alone.
        kv: f64,
    },
}

impl Guidance {
    /// The official weights of the three-term form: 3.0, 2.0, 2.0.
    pub fn official() -> Self {
        Guidance::ThreeTerm { no_kv: 3.0, full: 2.0, kv: 2.0 }
    }
}

/// The noise predictions of one step that a [`Guidance`] may combine.
pub(super) struct Predictions {
    /// No text, no image, no reference.
    pub unconditional: Tensor,
    /// Text and image, no reference.
    pub conditional: Tensor,
    /// The reference alone.
    pub unconditional_kv: Tensor,
    /// Everything.
    pub conditional_kv: Tensor,
}

impl Predictions {
    /// The three-term form.
    pub fn three_term(&self, no_kv: f64, full: f64, kv: f64) -> Result<Tensor> {
        let u = &self.unconditional;
        let text = ((&self.conditional - u)? * no_kv)?;
        let all = ((&self.conditional_kv - u)? * full)?;
        let reference = ((&self.unconditional_kv - u)? * kv)?;
        Ok((((u + text)? + all)? + reference)?)
    }
}

/// `u + scale (c - u)`.
pub(super) fn plain(unconditional: &Tensor, conditional: &Tensor, scale: f64) -> Result<Tensor> {
    Ok((unconditional + ((conditional - unconditional)? * scale)?)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_three_term_form_is_the_official_one() -> Result<()> {
        let number = |x: f64| Tensor::new(&[x], &Device::Cpu);
        let predictions = Predictions {
            unconditional: number(1.0)?,
            conditional: number(2.0)?,
            unconditional_kv: number(4.0)?,
            conditional_kv: number(7.0)?,
        };
        // 1 + 3 (2 - 1) + 2 (7 - 1) + 2 (4 - 1)
        assert_eq!(predictions.three_term(3.0, 2.0, 2.0)?.to_vec1::<f64>()?, [22.0]);
        assert_eq!(plain(&number(1.0)?, &number(2.0)?, 5.0)?.to_vec1::<f64>()?, [6.0]);
        Ok(())
    }
}

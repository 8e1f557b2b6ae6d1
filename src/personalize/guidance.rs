//! Classifier-free guidance (Ho and Salimans 2021), with the terms of the KV path.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

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

/// One of the noise predictions that a guidance combines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Branch {
    /// Whether it has text and image tokens.
    pub conditional: bool,
    /// The reference's keys and values, where it has them.
    pub reference: Option<ReferenceText>,
}

/// What the KV encoder is told about the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReferenceText {
    /// The encoder prompt.
    Prompt,
    /// Nothing.
    None,
}

const UNCONDITIONAL: Branch = Branch { conditional: false, reference: None };
const CONDITIONAL: Branch = Branch { conditional: true, reference: None };
const UNCONDITIONAL_KV: Branch = Branch { conditional: false, reference: Some(ReferenceText::None) };
const CONDITIONAL_KV: Branch = Branch { conditional: true, reference: Some(ReferenceText::Prompt) };

impl Guidance {
    /// The predictions it combines, with or without a KV path. Those with a reference come first, each with another
    /// one: the KV encoder's results are then in place for them, and the others look at none.
    pub(super) fn branches(self, with_reference: bool) -> &'static [Branch] {
        match (self, with_reference) {
            (Guidance::None, true) => &[CONDITIONAL_KV],
            (Guidance::None, false) => &[CONDITIONAL],
            (Guidance::Plain { .. }, true) => &[CONDITIONAL_KV, UNCONDITIONAL],
            // Without a reference the three terms are one: what has the reference equals what lacks it.
            (Guidance::Plain { .. } | Guidance::ThreeTerm { .. }, false) => &[CONDITIONAL, UNCONDITIONAL],
            (Guidance::ThreeTerm { .. }, true) => &[CONDITIONAL_KV, UNCONDITIONAL_KV, CONDITIONAL, UNCONDITIONAL],
        }
    }

    /// Combines the predictions of its branches, which come in their order.
    pub(super) fn combine(self, predictions: &[Tensor]) -> Result<Tensor> {
        match (self, predictions) {
            (_, [prediction]) => Ok(prediction.clone()),
            (Guidance::Plain { scale }, [c, u]) => plain(u, c, scale),
            (Guidance::ThreeTerm { no_kv, full, .. }, [c, u]) => plain(u, c, no_kv + full),
            (Guidance::ThreeTerm { no_kv, full, kv }, [c_kv, u_kv, c, u]) => {
                let [text, reference, all] = [(c, no_kv), (u_kv, kv), (c_kv, full)]
                    .map(|(with, weight)| Ok::<_, Error>(((with - u)? * weight)?));
                Ok((((u + text?)? + all?)? + reference?)?)
            }
            (_, others) => {
                let found = others.len().to_string();
                Err(Error::argument("Guidance", "predictions", "one for each branch", found))
            }
        }
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
        let predictions = [number(7.0)?, number(4.0)?, number(2.0)?, number(1.0)?];
        // 1 + 3 (2 - 1) + 2 (7 - 1) + 2 (4 - 1)
        let guidance = Guidance::official();
        assert_eq!(guidance.branches(true), [CONDITIONAL_KV, UNCONDITIONAL_KV, CONDITIONAL, UNCONDITIONAL]);
        assert_eq!(guidance.combine(&predictions)?.to_vec1::<f64>()?, [22.0]);
        // Without a reference: 1 + (3 + 2) (2 - 1)
        assert_eq!(guidance.combine(&predictions[2..])?.to_vec1::<f64>()?, [6.0]);
        assert_eq!(plain(&number(1.0)?, &number(2.0)?, 5.0)?.to_vec1::<f64>()?, [6.0]);
        Ok(())
    }
}

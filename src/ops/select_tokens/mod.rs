//! Some tokens of a sequence, the same ones in every sample.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::support::{dispatch, on_cuda};
use crate::autograd::{Backward, Forward, Function, Value, apply};
use crate::{Error, Result};

/// Where there is no token.
const NONE: u32 = u32::MAX;

/// Which tokens of a sequence [`select_tokens`] returns. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TokenSelection {
    kept: Arc<[u32]>,
    /// For every token of the sequence its place among those kept, or [`NONE`].
    places: Arc<[u32]>,
    /// Both, one after the other, where the tokens lie on a GPU.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    on_gpu: Option<Tensor>,
}

impl TokenSelection {
    /// A selection from a sequence of so many tokens; `kept`: their indices, each once, in the order wanted; `device`:
    /// where the tokens lie.
    ///
    /// # Errors
    /// [`Error::Argument`] where none is kept, or an index leaves the sequence or is there twice.
    pub fn new(kept: Vec<u32>, tokens: usize, device: &Device) -> Result<Self> {
        let wrong = |found: String| {
            Error::argument("TokenSelection::new", "kept", format!("indices below {tokens}, each once"), found)
        };
        if kept.is_empty() {
            return Err(wrong("none".into()));
        }
        let mut places = vec![NONE; tokens];
        for (place, token) in kept.iter().enumerate() {
            match places.get_mut(*token as usize) {
                Some(free @ &mut NONE) => *free = place as u32,
                Some(_) => return Err(wrong(format!("{token} twice"))),
                None => return Err(wrong(token.to_string())),
            }
        }
        let on_gpu = match device {
            Device::Cuda(_) => Some(Tensor::new([&kept[..], &places[..]].concat(), device)?),
            _ => None,
        };
        Ok(TokenSelection { kept: kept.into(), places: places.into(), on_gpu })
    }

    /// How many tokens are kept.
    #[allow(clippy::len_without_is_empty, reason = "at least one is kept")]
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// How many tokens the sequence has.
    pub fn tokens(&self) -> usize {
        self.places.len()
    }
}

/// The selected tokens, in their order.
///
/// `x`: `(batch, tokens, channels)`. Returns `(batch, kept tokens, channels)`. Gradient for `x`, zero for the tokens that
/// are not kept.
///
/// # Errors
/// [`Error::Argument`] where `x` has another rank, or as many tokens as the selection is not for.
pub fn select_tokens(x: &Tensor, selection: &TokenSelection) -> Result<Tensor> {
    match x.dims() {
        [_, tokens, channels] if *tokens == selection.tokens() && *channels > 0 => {}
        other => {
            let expected = format!("(batch, {}, channels)", selection.tokens());
            return Err(Error::argument("select_tokens", "x", expected, format!("{other:?}")));
        }
    }
    apply(SelectTokens(selection.clone()), &[x])
}

struct SelectTokens(TokenSelection);

impl Function for SelectTokens {
    fn name(&self) -> &'static str {
        "select_tokens"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        on_cuda!(inputs[0] => cuda::forward(&self.0, &inputs[0]));
        dispatch!("select_tokens", inputs[0], T => cpu::forward::<T>(&self.0, &inputs[0]))
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let gradient = context.gradient()?;
        on_cuda!(gradient => cuda::backward(&self.0, gradient));
        dispatch!("select_tokens", gradient, T => cpu::backward::<T>(&self.0, gradient))
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

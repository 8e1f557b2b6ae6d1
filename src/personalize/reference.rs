//! Who is drawn: photographs, encoded.

use candle_core::Tensor;

use crate::lookahead::AdapterTokens;
use crate::{Error, Result};

/// Photographs, of one person or one each of several, encoded once for any number of pictures.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Clean latents, `(people, channels, height, width)`.
    pub(super) latents: Tensor,
    pub(super) tokens: AdapterTokens,
}

impl Reference {
    /// How many photographs it holds.
    pub fn people(&self) -> usize {
        self.latents.dims()[0]
    }

    /// The photographs at these places, each as often as it is named: who each picture of a batch is to show.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no such photograph, or none is named.
    pub fn select(&self, people: &[usize]) -> Result<Reference> {
        let count = self.people();
        if people.is_empty() || people.iter().any(|person| *person >= count) {
            let expected = format!("places below {count}");
            return Err(Error::argument("Reference::select", "people", expected, format!("{people:?}")));
        }
        let places: Vec<u32> = people.iter().map(|person| *person as u32).collect();
        let places = Tensor::from_vec(places, people.len(), self.latents.device())?;
        Ok(Reference {
            latents: self.latents.index_select(&places, 0)?,
            tokens: AdapterTokens {
                conditional: self.tokens.conditional.index_select(&places, 0)?,
                unconditional: self.tokens.unconditional.clone(),
            },
        })
    }

    /// One photograph is for all pictures of a batch; several are one for each.
    pub(super) fn check_count(&self, function: &'static str, pictures: usize) -> Result<()> {
        match self.people() {
            1 => Ok(()),
            people if people == pictures => Ok(()),
            people => {
                let expected = format!("1 photograph or {pictures}, one for each picture");
                Err(Error::argument(function, "reference", expected, people.to_string()))
            }
        }
    }
}

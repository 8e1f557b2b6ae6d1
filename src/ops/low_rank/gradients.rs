//! The gradients of the factors.

use candle_core::Tensor;

use super::lcm_low_rank_workspace;
use super::{Arguments, LinearLowRank, LowRank, NAME, lcm_low_rank_gradients, lcm_low_rank_pack, lcm_low_rank_unpack};
use crate::Result;
use crate::autograd::Backward;
use crate::cuda::{Buffer, check, cuda_device, pointer, stream};
use crate::ops::linear::cuda::{matrix, product};

/// Widths of packed factors are filled up to a multiple of this, which tensor cores take.
const MULTIPLE: usize = 8;

impl LinearLowRank {
    /// Adds the gradients of the factors to those of the other inputs.
    pub(super) fn factor_gradients(
        &self,
        context: &Backward<'_>,
        gradient: &Tensor,
        gradients: &mut [Option<Tensor>],
    ) -> Result<()> {
        let device = cuda_device(NAME, gradient)?;
        let mut arguments = self.arguments(context.inputs)?;
        let mut buffers = Vec::with_capacity(context.inputs.len() - self.factors);
        for (i, layer) in self.layers.iter().enumerate() {
            let Some(LowRank { place, .. }) = layer.low_rank else { continue };
            for (place, at) in [(place, &mut arguments.down_gradient[i]), (place + 1, &mut arguments.up_gradient[i])] {
                if context.needs[place] {
                    let buffer = Buffer::like(NAME, &context.inputs[place])?;
                    *at = buffer.pointer();
                    buffers.push((place, buffer));
                }
            }
        }
        match context.saved.get(1) {
            Some(narrow) => {
                arguments.x = pointer(NAME, &context.inputs[0])?;
                arguments.gradient = pointer(NAME, gradient)?;
                arguments.narrow_factors = pointer(NAME, narrow)?;
                // SAFETY: reads the numbers in the arguments.
                let workspace = Buffer::bytes(&device, unsafe { lcm_low_rank_workspace(&raw const arguments) })?;
                arguments.workspace = workspace.pointer();
                // SAFETY: the arguments point to tensors and buffers of the shapes they state, alive on this stream.
                check(NAME, unsafe { lcm_low_rank_gradients(&raw const arguments, stream(&device)) })?;
            }
            None => self.by_products(context, gradient, &mut arguments)?,
        }
        for (place, buffer) in buffers {
            gradients[place] = Some(buffer.into_tensor());
        }
        Ok(())
    }

    /// The same by matrix products with the factors of all layers put together: in f32, for larger ranks, and for
    /// widths that are no multiple of 8.
    fn by_products(&self, context: &Backward<'_>, gradient: &Tensor, arguments: &mut Arguments) -> Result<()> {
        let (x, dtype) = (&context.inputs[0], gradient.dtype());
        let device = cuda_device(NAME, x)?;
        let (out, inner) = context.inputs[1].dims2()?;
        let rows = x.elem_count() / inner.max(1);
        let ranks: usize = self.layers.iter().flat_map(|layer| &layer.low_rank).map(|low_rank| low_rank.rank).sum();
        let width = ranks.next_multiple_of(MULTIPLE);
        let (down, up) = (Buffer::new(&device, (width, inner), dtype)?, Buffer::new(&device, (out, width), dtype)?);
        arguments.width = width as i32;
        (arguments.down_all, arguments.up_all) = (down.pointer(), up.pointer());
        // SAFETY: as above.
        check(NAME, unsafe { lcm_low_rank_pack(&raw const *arguments, stream(&device)) })?;
        let (down, up) = (down.into_tensor(), up.into_tensor());
        let (x_matrix, g) = (matrix(x, rows, inner)?, matrix(gradient, rows, out)?);
        let plain = (None, None);
        let low = product((x, x_matrix), matrix(&down, width, inner)?.t(), plain, &[rows, width])?.into_tensor();
        let of_low = product((gradient, g), matrix(&up, out, width)?, plain, &[rows, width])?.into_tensor();
        let of_low = (&of_low, matrix(&of_low, rows, width)?.t());
        let of_down = product(of_low, x_matrix, plain, &[width, inner])?;
        let of_up = product((gradient, g.t()), matrix(&low, rows, width)?, plain, &[out, width])?;
        (arguments.down_all, arguments.up_all) = (of_down.pointer(), of_up.pointer());
        // SAFETY: as above.
        check(NAME, unsafe { lcm_low_rank_unpack(&raw const *arguments, stream(&device)) })
    }
}

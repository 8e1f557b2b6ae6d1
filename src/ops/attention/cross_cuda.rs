//! Decoupled cross-attention on a GPU, as one kernel.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use super::cuda::{Arguments, GradientArguments, arguments};
use super::{Attention, Mask, Packing};
use crate::Result;
use crate::autograd::{Backward, Forward, Function, apply};
use crate::cuda::{Buffer, check, cuda_device, pointer, stream};

// `cross.cu`, `cross_backward.cu`.
unsafe extern "C" {
    fn lcm_cross_attention_forward(
        call: *const Arguments,
        image_scale: f32,
        lse_image: *mut f32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_cross_attention_backward(
        call: *const GradientArguments,
        image_scale: f32,
        lse_image: *const f32,
        stream: *mut c_void,
    ) -> i32;
    fn lcm_cross_attention_backward_workspace(call: *const GradientArguments) -> usize;
}

const NAME: &str = "cross_attention";
const MOST_KEYS: usize = 128;

/// The fused kernel's result, or `None` where it does not take the tensors.
pub(super) fn cross_attention(
    q: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    image: Option<((&Tensor, &Tensor), f64)>,
    heads: usize,
) -> Result<Option<Tensor>> {
    if keys.dims() != values.dims() {
        return Ok(None);
    }
    fused(q, &[keys, values], Packing::None, image, heads)
}

/// The same with keys and values of the text in one tensor.
pub(super) fn cross_attention_packed(
    q: &Tensor,
    text: &Tensor,
    image: Option<((&Tensor, &Tensor), f64)>,
    heads: usize,
) -> Result<Option<Tensor>> {
    fused(q, &[text], Packing::KeyValue, image, heads)
}

fn fused(
    q: &Tensor,
    text: &[&Tensor],
    packing: Packing,
    image: Option<((&Tensor, &Tensor), f64)>,
    heads: usize,
) -> Result<Option<Tensor>> {
    let &[batch, _, channels] = q.dims() else { return Ok(None) };
    let keys_fit = |tensor: &Tensor, width: usize| matches!(*tensor.dims(), [b, tokens, w] if (b, w) == (batch, width) && (1..=MOST_KEYS).contains(&tokens));
    let alike = |t: &Tensor| t.dtype() == q.dtype() && t.device().same_device(q.device());
    let width = if packing == Packing::KeyValue { 2 * channels } else { channels };
    let takes = q.device().is_cuda()
        && matches!(q.dtype(), DType::BF16 | DType::F16)
        && heads > 0
        && channels == heads * 64
        && text.iter().all(|t| alike(t) && keys_fit(t, width))
        && image.is_none_or(|((k, v), _)| k.dims() == v.dims() && alike(k) && alike(v) && keys_fit(k, channels));
    if !takes {
        return Ok(None);
    }
    let scale = image.map_or(0.0, |(_, scale)| scale as f32);
    let image = image.into_iter().flat_map(|((k, v), _)| [k, v]);
    let inputs: Vec<&Tensor> = [q].into_iter().chain(text.iter().copied()).chain(image).collect();
    let attention = Attention { heads, mask: Mask::None, packing, sees_reference: None };
    apply(CrossAttention { attention, scale }, &inputs).map(Some)
}

/// Its inputs are `q`, keys and values of the text, and keys and values of the image tokens where there are any.
struct CrossAttention {
    attention: Attention,
    scale: f32,
}

impl Function for CrossAttention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let q = &inputs[0];
        let device = cuda_device(NAME, q)?;
        let (batch, tokens, _) = q.dims3()?;
        let out = Buffer::like(NAME, q)?;
        let sums = || Buffer::new(&device, (batch, self.attention.heads, tokens), DType::F32);
        let (lse, lse_image) = (sums()?, sums()?);
        let call = arguments(&self.attention, inputs, out.pointer(), lse.pointer().cast())?;
        // SAFETY: the arguments point to tensors and buffers of the shapes they state, alive on this stream.
        check(NAME, unsafe {
            lcm_cross_attention_forward(&raw const call, self.scale, lse_image.pointer().cast(), stream(&device))
        })?;
        Ok(Forward { outputs: vec![out.into_output()], saved: vec![lse.into_tensor(), lse_image.into_tensor()] })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let device = cuda_device(NAME, &context.inputs[0])?;
        let lse_image = pointer(NAME, &context.saved[1])?;
        let (mut call, gradients) = GradientArguments::new(&self.attention, context)?;
        // SAFETY: as in `forward`; the workspace has the size asked for and lives until the kernels are launched.
        unsafe {
            let bytes = lcm_cross_attention_backward_workspace(&raw const call);
            let workspace = Buffer::bytes(&device, bytes)?;
            call.lend(&workspace, bytes);
            let status = lcm_cross_attention_backward(&raw const call, self.scale, lse_image.cast(), stream(&device));
            check(NAME, status)?;
        }
        Ok(gradients.into_iter().map(|buffer| buffer.map(Buffer::into_tensor)).collect())
    }
}

//! The low-rank factors of several layers as two matrices (on a GPU only).
//!
//! A LoRA of rank 4 is two products with matrices four numbers wide, which a GPU does as slowly as much wider ones. The
//! factors of layers that share their input (queries, keys, values) are put together, and filled up with zeros to a
//! width that tensor cores take: two products for all layers instead of two for each.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

pub(crate) mod linear;

use crate::autograd::{Backward, Forward, Function, Value, apply_many};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};
use crate::{Error, Result};

/// Most layers that can be put together.
pub(crate) const LAYERS: usize = 4;
/// Widths are filled up to a multiple of this.
const MULTIPLE: usize = 8;

/// One of several layers that share their input.
pub(crate) struct Factors<'a> {
    /// Width of its output.
    pub output: usize,
    /// `down` `(rank, input)` and `up` `(output, rank)`, both f32, and a scale; `None` for a layer without factors.
    pub low_rank: Option<(&'a Tensor, &'a Tensor, f64)>,
}

/// `down` `(width, input)` and `up` `(sum of the outputs, width)`, of a dtype, such that `(x down^T) up^T` is
/// `scale * (x down_i^T) up_i^T` of every layer i, side by side.
///
/// # Errors
/// [`Error::Argument`] where shapes or dtypes do not fit.
pub(crate) fn lora_factors(layers: &[Factors<'_>], dtype: DType) -> Result<(Tensor, Tensor)> {
    let wrong = |found: String| Error::argument(NAME, "layers", "f32 factors that fit up to 4 layers", found);
    let given: Vec<(&Tensor, &Tensor, f64)> = layers.iter().filter_map(|layer| layer.low_rank).collect();
    let Some((first, _, _)) = given.first() else { return Err(wrong("no factors".into())) };
    if layers.len() > LAYERS {
        return Err(wrong(format!("{} layers", layers.len())));
    }
    let input = first.dims2()?.1;
    let mut shape = Shape { input, width: 0, layers: Vec::new(), dtype };
    for layer in layers {
        let rank = match layer.low_rank {
            None => None,
            Some((down, up, scale)) => {
                let (rank, columns) = down.dims2()?;
                let fits = columns == input && up.dims() == [layer.output, rank];
                if !fits || [down, up].iter().any(|tensor| tensor.dtype() != DType::F32) {
                    return Err(wrong(format!("{:?} and {:?}, {:?}", down.dims(), up.dims(), up.dtype())));
                }
                Some((rank, scale as f32))
            }
        };
        shape.width += rank.map_or(0, |(rank, _)| rank);
        shape.layers.push((layer.output, rank));
    }
    shape.width = shape.width.next_multiple_of(MULTIPLE);
    let inputs: Vec<&Tensor> = given.iter().flat_map(|(down, up, _)| [*down, *up]).collect();
    let mut outputs = apply_many(LoraFactors { shape }, &inputs)?.into_iter();
    outputs.next().zip(outputs.next()).ok_or_else(|| wrong("no result".into()))
}

const NAME: &str = "lora_factors";

struct Shape {
    input: usize,
    width: usize,
    /// Output, and rank and scale where the layer has factors.
    layers: Vec<(usize, Option<(usize, f32)>)>,
    dtype: DType,
}

/// `LcmLoraFactors` of `lora_factors.h`.
#[repr(C)]
struct Arguments {
    down: [*const c_void; LAYERS],
    up: [*const c_void; LAYERS],
    down_gradient: [*mut c_void; LAYERS],
    up_gradient: [*mut c_void; LAYERS],
    scale: [f32; LAYERS],
    rank: [i32; LAYERS],
    output: [i32; LAYERS],
    count: i32,
    input: i32,
    width: i32,
    dtype: i32,
    down_all: *mut c_void,
    up_all: *mut c_void,
}

unsafe extern "C" {
    fn lcm_lora_factors_forward(arguments: *const Arguments, stream: *mut c_void) -> i32;
    fn lcm_lora_factors_backward(arguments: *const Arguments, stream: *mut c_void) -> i32;
}

impl Shape {
    /// The arguments but for the factors and their gradients.
    fn arguments(&self, down_all: *mut c_void, up_all: *mut c_void) -> Result<Arguments> {
        let mut arguments = Arguments {
            down: [std::ptr::null(); LAYERS],
            up: [std::ptr::null(); LAYERS],
            down_gradient: [std::ptr::null_mut(); LAYERS],
            up_gradient: [std::ptr::null_mut(); LAYERS],
            scale: [0.0; LAYERS],
            rank: [0; LAYERS],
            output: [0; LAYERS],
            count: self.layers.len() as i32,
            input: self.input as i32,
            width: self.width as i32,
            dtype: dtype_code(NAME, self.dtype)?,
            down_all,
            up_all,
        };
        for (i, (output, rank)) in self.layers.iter().enumerate() {
            arguments.output[i] = *output as i32;
            if let Some((rank, scale)) = rank {
                (arguments.rank[i], arguments.scale[i]) = (*rank as i32, *scale);
            }
        }
        Ok(arguments)
    }

    /// The layers that have factors, in the order of the inputs.
    fn adapted(&self) -> impl Iterator<Item = usize> {
        self.layers.iter().enumerate().filter(|(_, (_, rank))| rank.is_some()).map(|(i, _)| i)
    }
}

/// Its inputs are `down` and `up` of every layer that has factors.
struct LoraFactors {
    shape: Shape,
}

impl Function for LoraFactors {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let shape = &self.shape;
        let device = cuda_device(NAME, &inputs[0])?;
        let outputs: usize = shape.layers.iter().map(|(output, _)| output).sum();
        let down = Buffer::new(&device, (shape.width, shape.input), shape.dtype)?;
        let up = Buffer::new(&device, (outputs, shape.width), shape.dtype)?;
        let mut arguments = shape.arguments(down.pointer(), up.pointer())?;
        for (pair, layer) in inputs.chunks_exact(2).zip(shape.adapted()) {
            (arguments.down[layer], arguments.up[layer]) = (pointer(NAME, &pair[0])?, pointer(NAME, &pair[1])?);
        }
        // SAFETY: the arguments point to tensors and buffers of the shapes they state, alive on this stream.
        check(NAME, unsafe { lcm_lora_factors_forward(&raw const arguments, stream(&device)) })?;
        Ok(Forward { outputs: vec![down.into_output(), up.into_output()], saved: Vec::new() })
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let shape = &self.shape;
        let (Some(down), Some(up)) = (&context.gradients[0], &context.gradients[1]) else {
            return Ok(vec![None; context.inputs.len()]);
        };
        let device = cuda_device(NAME, down)?;
        let mut arguments = shape.arguments(pointer(NAME, down)?, pointer(NAME, up)?)?;
        let mut gradients = Vec::with_capacity(context.inputs.len());
        for (i, (input, needed)) in context.inputs.iter().zip(context.needs).enumerate() {
            let buffer = needed.then(|| Buffer::like(NAME, input)).transpose()?;
            let at = buffer.as_ref().map_or(std::ptr::null_mut(), Buffer::pointer);
            if let Some(layer) = shape.adapted().nth(i / 2) {
                let place = if i % 2 == 0 { &mut arguments.down_gradient } else { &mut arguments.up_gradient };
                place[layer] = at;
            }
            gradients.push(buffer);
        }
        // SAFETY: as in `forward`.
        check(NAME, unsafe { lcm_lora_factors_backward(&raw const arguments, stream(&device)) })?;
        Ok(gradients.into_iter().map(|buffer| buffer.map(Buffer::into_tensor)).collect())
    }

    fn uses(&self, _: Value, _: &[bool]) -> bool {
        false
    }
}

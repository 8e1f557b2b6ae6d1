//! Frozen linear layers with trainable low-rank updates (on a GPU only).
//!
//! The update is added to the weight before the product, `x (weight + scale * up down)^T`: that is one read and one write
//! of the weight, and forward pass and gradient of `x` are then those of a frozen layer. What is left are the gradients of
//! the factors, which need nothing but `x` and the gradient of the output.

mod gradients;
mod merge;

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use crate::autograd::{Backward, Forward, Function, Saves, Value, apply};
use crate::cuda::{Buffer, check, cuda_device, dtype_code, pointer, stream};
use crate::ops::linear::cuda::{matrix, product};
use crate::ops::support::same_kind;
use crate::{Error, Result};
pub(crate) use merge::merge;

/// Most layers that can be put together.
const LAYERS: usize = 4;

/// One of several layers that share their input.
pub(crate) struct Factors<'a> {
    /// Width of its output.
    pub output: usize,
    /// `down` `(rank, input)` and `up` `(output, rank)` and a scale; `None` for a layer without factors.
    pub low_rank: Option<(&'a Tensor, &'a Tensor, f64)>,
}

/// `x (weight + scale * up down)^T + bias + residual`, for layers whose weights lie one below the other, and factors in
/// f32.
///
/// `x`: `(..., in)`; `weight`: `(sum of the outputs, in)`, frozen; `bias`: `(sum of the outputs,)`, frozen; `residual`:
/// `(..., sum of the outputs)`. Gradients for `x`, the factors and `residual`.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit.
pub(crate) fn linear_low_rank(
    x: &Tensor,
    weight: &Tensor,
    (bias, residual): (Option<&Tensor>, Option<&Tensor>),
    layers: &[Factors<'_>],
) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let wrong = |argument, expected: String, found: String| Err(Error::argument(NAME, argument, expected, found));
    let Some((&last, before)) = x.dims().split_last() else {
        return wrong("x", format!("(..., {inner})"), "a scalar".into());
    };
    let shape = [before, &[out]].concat();
    if last != inner {
        return wrong("x", format!("(..., {inner})"), format!("{:?}", x.dims()));
    }
    if let Some(bias) = bias.filter(|bias| bias.dims() != [out]) {
        return wrong("bias", format!("({out},)"), format!("{:?}", bias.dims()));
    }
    if let Some(residual) = residual.filter(|residual| residual.dims() != shape) {
        return wrong("residual", format!("{shape:?}"), format!("{:?}", residual.dims()));
    }
    let outputs: usize = layers.iter().map(|layer| layer.output).sum();
    if layers.len() > LAYERS || outputs != out {
        return wrong("layers", format!("up to {LAYERS} of {out} outputs"), format!("{} of {outputs}", layers.len()));
    }
    for tensor in [Some(weight), bias, residual].into_iter().flatten() {
        same_kind(NAME, x, "an argument", tensor)?;
    }
    let mut inputs = vec![x, weight];
    let bias_place = bias.is_some().then_some(inputs.len());
    inputs.extend(bias);
    let residual_place = residual.is_some().then_some(inputs.len());
    inputs.extend(residual);
    let factors = inputs.len();
    let mut places = Vec::with_capacity(layers.len());
    for layer in layers {
        let Some((down, up, scale)) = layer.low_rank else {
            places.push(Layer { output: layer.output, low_rank: None });
            continue;
        };
        let rank = down.dims2()?.0;
        let is = |tensor: &Tensor, shape: [usize; 2]| tensor.dims() == shape && tensor.dtype() == DType::F32;
        if rank == 0 || !is(down, [rank, inner]) || !is(up, [layer.output, rank]) {
            let expected = format!("f32 factors of a rank that fit ({}, {inner})", layer.output);
            return wrong("layers", expected, format!("{:?} and {:?}, {:?}", down.dims(), up.dims(), up.dtype()));
        }
        places.push(Layer { output: layer.output, low_rank: Some(LowRank { place: inputs.len(), rank, scale }) });
        inputs.extend([down, up]);
    }
    apply(LinearLowRank { bias: bias_place, residual: residual_place, factors, layers: places }, &inputs)
}

const NAME: &str = "linear_low_rank";

struct Layer {
    output: usize,
    low_rank: Option<LowRank>,
}

struct LowRank {
    /// Of `down` among the inputs; `up` is the next.
    place: usize,
    rank: usize,
    scale: f64,
}

/// Its inputs are `x` and `weight`, bias and residual where there are any, then the factors of the layers.
struct LinearLowRank {
    bias: Option<usize>,
    residual: Option<usize>,
    /// The place of the first factor.
    factors: usize,
    layers: Vec<Layer>,
}

/// `LcmLowRank` of `low_rank.h`.
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
    factor_dtype: i32,
    tokens: i64,
    weight: *const c_void,
    merged: *mut c_void,
    narrow_factors: *mut c_void,
    x: *const c_void,
    gradient: *const c_void,
    workspace: *mut c_void,
    down_all: *mut c_void,
    up_all: *mut c_void,
}

unsafe extern "C" {
    fn lcm_low_rank_narrow_factors(arguments: *const Arguments) -> usize;
    fn lcm_low_rank_merge(arguments: *const Arguments, stream: *mut c_void) -> i32;
    fn lcm_low_rank_workspace(arguments: *const Arguments) -> usize;
    fn lcm_low_rank_gradients(arguments: *const Arguments, stream: *mut c_void) -> i32;
    fn lcm_low_rank_pack(arguments: *const Arguments, stream: *mut c_void) -> i32;
    fn lcm_low_rank_unpack(arguments: *const Arguments, stream: *mut c_void) -> i32;
}

impl Arguments {
    /// No layers, of an input width and a dtype, with factors in f32.
    fn new(input: usize, dtype: i32) -> Self {
        Arguments {
            down: [std::ptr::null(); LAYERS],
            up: [std::ptr::null(); LAYERS],
            down_gradient: [std::ptr::null_mut(); LAYERS],
            up_gradient: [std::ptr::null_mut(); LAYERS],
            scale: [0.0; LAYERS],
            rank: [0; LAYERS],
            output: [0; LAYERS],
            count: 0,
            input: input as i32,
            width: 0,
            dtype,
            factor_dtype: 0,
            tokens: 0,
            weight: std::ptr::null(),
            merged: std::ptr::null_mut(),
            narrow_factors: std::ptr::null_mut(),
            x: std::ptr::null(),
            gradient: std::ptr::null(),
            workspace: std::ptr::null_mut(),
            down_all: std::ptr::null_mut(),
            up_all: std::ptr::null_mut(),
        }
    }
}

impl LinearLowRank {
    /// The arguments as far as they follow from the inputs.
    fn arguments(&self, inputs: &[Tensor]) -> Result<Arguments> {
        let (x, inner) = (&inputs[0], inputs[1].dims()[1]);
        let mut arguments = Arguments {
            count: self.layers.len() as i32,
            tokens: (x.elem_count() / inner.max(1)) as i64,
            ..Arguments::new(inner, dtype_code(NAME, x.dtype())?)
        };
        for (i, layer) in self.layers.iter().enumerate() {
            arguments.output[i] = layer.output as i32;
            if let Some(LowRank { place, rank, scale }) = layer.low_rank {
                (arguments.rank[i], arguments.scale[i]) = (rank as i32, scale as f32);
                arguments.down[i] = pointer(NAME, &inputs[place])?;
                arguments.up[i] = pointer(NAME, &inputs[place + 1])?;
            }
        }
        Ok(arguments)
    }
}

impl Function for LinearLowRank {
    fn name(&self) -> &'static str {
        NAME
    }

    /// Saves the weight with the updates added, and the factors in its dtype where the gradients' kernels want them.
    fn forward(&self, inputs: &[Tensor]) -> Result<Forward> {
        let x = &inputs[0];
        let (out, inner) = inputs[1].dims2()?;
        let saved = self.save(inputs)?;
        let at = |place: Option<usize>| place.map(|place| &inputs[place]);
        let rows = x.elem_count() / inner.max(1);
        let shape = [&x.dims()[..x.rank() - 1], &[out]].concat();
        let left = (x, matrix(x, rows, inner)?);
        let y = product(left, matrix(&saved[0], out, inner)?.t(), (at(self.bias), at(self.residual)), &shape)?;
        Ok(Forward { outputs: vec![y.into_output()], saved })
    }

    fn saves(&self) -> Saves {
        let count = self.layers.iter().filter(|layer| layer.low_rank.is_some()).count();
        Saves::Alone(std::iter::once(1).chain(self.factors..self.factors + 2 * count).collect())
    }

    fn save(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (x, weight) = (&inputs[0], &inputs[1]);
        let device = cuda_device(NAME, x)?;
        let mut arguments = self.arguments(inputs)?;
        let merged = Buffer::like(NAME, weight)?;
        // SAFETY: the function reads nothing but the numbers in the arguments.
        let narrow = match unsafe { lcm_low_rank_narrow_factors(&raw const arguments) } {
            0 => None,
            numbers => Some(Buffer::new(&device, numbers, x.dtype())?),
        };
        (arguments.weight, arguments.merged) = (pointer(NAME, weight)?, merged.pointer());
        arguments.narrow_factors = narrow.as_ref().map_or(std::ptr::null_mut(), Buffer::pointer);
        // SAFETY: the arguments point to tensors and buffers of the shapes they state, alive on this stream.
        check(NAME, unsafe { lcm_low_rank_merge(&raw const arguments, stream(&device)) })?;
        Ok(std::iter::once(merged).chain(narrow).map(Buffer::into_tensor).collect())
    }

    fn backward(&self, context: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (x, gradient) = (&context.inputs[0], context.gradient()?);
        let (out, inner) = context.inputs[1].dims2()?;
        let rows = x.elem_count() / inner.max(1);
        let mut gradients = vec![None; context.inputs.len()];
        if context.needs[0] {
            let left = (gradient, matrix(gradient, rows, out)?);
            let so_far = context.take_so_far(0);
            let dx = product(left, matrix(&context.saved[0], out, inner)?, (None, so_far.as_ref()), x.dims())?;
            gradients[0] = Some(dx.into_tensor());
        }
        if let Some(residual) = self.residual.filter(|place| context.needs[*place]) {
            gradients[residual] = Some(gradient.clone());
        }
        if context.needs[self.factors..].contains(&true) {
            self.factor_gradients(context, gradient, &mut gradients)?;
        }
        Ok(gradients)
    }

    fn uses(&self, value: Value, needs: &[bool]) -> bool {
        match value {
            Value::Input(0) => needs[self.factors..].contains(&true),
            Value::Input(place) => place >= self.factors,
            Value::Output(_) => false,
        }
    }
}

//! Frozen weights with frozen low-rank updates added to them.

use std::ffi::c_void;

use candle_core::{CudaDevice, DType, Tensor};

use super::{Arguments, Factors, LAYERS, lcm_low_rank_merge};
use crate::cuda::{Buffer, Gemm, Operand, check, cuda_device, dtype_code, gemm, pointer, stream};
use crate::{Error, Result};

const NAME: &str = "merging a LoRA";
/// Updates of larger ranks are matrix products, for tensor cores to do.
const RANKS: usize = 16;

/// `weight + scale * up . down`, in fresh memory, for layers whose weights lie one below the other. Not differentiable.
///
/// `weight`: `(sum of the outputs, ...)`; the factors: `down` of as many numbers as `(rank, ...)`, `up` `(output, rank)`
/// (of convolutions with two ones between), in the dtype of the weight or, up to rank 16, in f32. Sums are made in f32
/// and rounded once.
///
/// # Errors
/// [`Error::Argument`] where shapes, dtypes or devices do not fit.
pub(crate) fn merge(weight: &Tensor, layers: &[Factors<'_>]) -> Result<Tensor> {
    let wrong = |expected: String, found: String| Err(Error::argument(NAME, "LoRA", expected, found));
    let rows = weight.dims().first().copied().unwrap_or(0);
    let input = weight.elem_count() / rows.max(1);
    let outputs: usize = layers.iter().map(|layer| layer.output).sum();
    if outputs != rows {
        return wrong(format!("layers of {rows} outputs together"), format!("{outputs}"));
    }
    let device = cuda_device(NAME, weight)?;
    let (mut largest, mut dtype) = (0, None);
    for (output, (down, up, _)) in layers.iter().filter_map(|layer| Some((layer.output, layer.low_rank?))) {
        let rank = down.dims().first().copied().unwrap_or(0);
        if rank == 0 || up.elem_count() != output * rank || down.elem_count() != rank * input {
            let expected = format!("up ({output}, {rank}) and down ({rank}, {input})");
            return wrong(expected, format!("{:?} and {:?}", up.dims(), down.dims()));
        }
        let first = *dtype.get_or_insert(down.dtype());
        if [down, up].iter().any(|factor| factor.dtype() != first || !factor.device().same_device(weight.device())) {
            let found = format!("{:?} and {:?} on {:?}", down.dtype(), up.dtype(), up.device().location());
            return wrong(format!("all factors of one dtype, on {:?}", weight.device().location()), found);
        }
        largest = largest.max(rank);
    }
    let dtype = dtype.unwrap_or(weight.dtype());
    let by_kernel = largest <= RANKS;
    if dtype != weight.dtype() && !(by_kernel && dtype == DType::F32) {
        let expected = format!("factors of {:?}, as the weight, or of f32 and up to rank {RANKS}", weight.dtype());
        return wrong(expected, format!("{dtype:?}, rank {largest}"));
    }
    let merged = Buffer::like(NAME, weight)?;
    if weight.elem_count() > 0 {
        let mut place = Place { from: pointer(NAME, weight)?, to: merged.pointer() };
        let size = input * weight.dtype().size_in_bytes();
        for layers in layers.chunks(if by_kernel { LAYERS } else { 1 }) {
            match by_kernel {
                true => place.merge_by_kernel(&device, (weight.dtype(), dtype), input, layers)?,
                false => place.merge_by_product(&device, weight.dtype(), input, &layers[0])?,
            }
            place = place.behind(layers.iter().map(|layer| layer.output).sum::<usize>() * size);
        }
    }
    Ok(merged.into_tensor())
}

/// Where a layer's weight is, and where it goes.
struct Place {
    from: *mut c_void,
    to: *mut c_void,
}

impl Place {
    fn behind(self, bytes: usize) -> Self {
        Place { from: self.from.wrapping_byte_add(bytes), to: self.to.wrapping_byte_add(bytes) }
    }

    /// Up to [`LAYERS`] layers, in one launch: a read and a write of the weights.
    fn merge_by_kernel(
        &self,
        device: &CudaDevice,
        (dtype, factors): (DType, DType),
        input: usize,
        layers: &[Factors<'_>],
    ) -> Result<()> {
        let mut arguments = Arguments {
            count: layers.len() as i32,
            factor_dtype: dtype_code(NAME, factors)?,
            weight: self.from,
            merged: self.to,
            ..Arguments::new(input, dtype_code(NAME, dtype)?)
        };
        for (i, layer) in layers.iter().enumerate() {
            arguments.output[i] = layer.output as i32;
            if let Some((down, up, scale)) = layer.low_rank {
                (arguments.rank[i], arguments.scale[i]) = (down.dims()[0] as i32, scale as f32);
                (arguments.down[i], arguments.up[i]) = (pointer(NAME, down)?, pointer(NAME, up)?);
            }
        }
        // SAFETY: the arguments point to tensors and a buffer of the shapes they state, alive on this stream.
        check(NAME, unsafe { lcm_low_rank_merge(&raw const arguments, stream(device)) })
    }

    fn merge_by_product(&self, device: &CudaDevice, dtype: DType, input: usize, layer: &Factors<'_>) -> Result<()> {
        let Some((down, up, scale)) = layer.low_rank else {
            // Nothing to add: a copy.
            return self.merge_by_kernel(device, (dtype, dtype), input, std::slice::from_ref(layer));
        };
        let rank = down.dims()[0];
        gemm(
            device,
            &Gemm {
                dtype,
                left: Operand::new(pointer(NAME, up)?, layer.output, rank),
                right: Operand::new(pointer(NAME, down)?, rank, input),
                scale: scale as f32,
                addend: Some(self.from),
                bias: None,
                out: self.to,
                out_dtype: dtype,
                batch: (1, [0; 3]),
            },
        )
    }
}

//! CUDA graphs: a function of tensors recorded once and launched as a whole.

use candle_core::cuda_backend::cudarc::driver::{CudaGraph, result, sys};
use candle_core::{CudaDevice, Device, Tensor};

use super::{Buffer, cuda_device, pointer};
use crate::{Error, Result};

/// A function of tensors whose kernel launches were recorded: [`replay`](Graph::replay) launches them all at once, so
/// that small batches do not wait for the CPU.
///
/// The function must do the same launches whatever the numbers in its inputs are, must not copy between host and device,
/// and must keep nothing it allocates beyond its outputs. No gradients flow.
pub struct Graph {
    graph: CudaGraph,
    device: CudaDevice,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::device("CUDA graph", error.to_string())
}

impl Graph {
    /// Records a function on inputs of these shapes and dtypes. Runs it once before, so that what is set up at the first
    /// use (plans of matrix products, modules) is set up.
    ///
    /// # Errors
    /// Those of the function; [`Error::Device`] where the inputs do not lie on a GPU or the function cannot be recorded.
    pub fn record(inputs: &[&Tensor], function: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>) -> Result<Graph> {
        let Some(first) = inputs.first() else { return Err(failed("a graph needs an input")) };
        let device = cuda_device("CUDA graph", first)?;
        let inputs: Vec<Tensor> =
            inputs.iter().map(|input| Ok(input.detach().force_contiguous()?)).collect::<Result<_>>()?;
        let outputs: Vec<Tensor> =
            function(&inputs)?.iter().map(|output| Ok(output.detach().force_contiguous()?)).collect::<Result<_>>()?;
        let stream = device.cuda_stream();
        device_of(&device).synchronize()?;
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(failed)?;
        let recorded = function(&inputs).and_then(|results| {
            for (output, result) in outputs.iter().zip(&results) {
                copy(&device, &result.detach().contiguous()?, output)?;
            }
            Ok(())
        });
        // The capture has to be ended also where the function failed, or the stream stays unusable.
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).map_err(failed);
        recorded?;
        let Some(graph) = graph? else { return Err(failed("nothing was recorded")) };
        graph.upload().map_err(failed)?;
        Ok(Graph { graph, device, inputs, outputs })
    }

    /// The outputs for these inputs, of the shapes and dtypes that were recorded.
    ///
    /// # Errors
    /// [`Error::Argument`] where the inputs are others; [`Error::Device`] where the launch fails.
    pub fn replay(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let kind = |tensor: &Tensor| (tensor.dims().to_vec(), tensor.dtype());
        if !inputs.iter().map(|t| kind(t)).eq(self.inputs.iter().map(kind)) {
            let list = |tensors: &mut dyn Iterator<Item = (Vec<usize>, candle_core::DType)>| {
                tensors.map(|kind| format!("{kind:?}")).collect::<Vec<_>>().join(", ")
            };
            let expected = list(&mut self.inputs.iter().map(kind));
            let found = list(&mut inputs.iter().map(|t| kind(t)));
            return Err(Error::argument("Graph::replay", "inputs", expected, found));
        }
        for (input, fixed) in inputs.iter().zip(&self.inputs) {
            copy(&self.device, &input.detach().contiguous()?, fixed)?;
        }
        self.graph.launch().map_err(failed)?;
        self.outputs
            .iter()
            .map(|output| {
                let fresh = Buffer::like("CUDA graph", output)?.into_tensor();
                copy(&self.device, output, &fresh)?;
                Ok(fresh)
            })
            .collect()
    }
}

fn device_of(device: &CudaDevice) -> Device {
    Device::Cuda(device.clone())
}

/// Copies the numbers of a contiguous tensor over those of another of its shape and dtype.
fn copy(device: &CudaDevice, from: &Tensor, to: &Tensor) -> Result<()> {
    let bytes = from.elem_count() * from.dtype().size_in_bytes();
    let (from, to) = (pointer("CUDA graph", from)? as u64, pointer("CUDA graph", to)? as u64);
    // SAFETY: both pointers belong to live, contiguous tensors of this many bytes.
    unsafe { result::memcpy_dtod_async(to, from, bytes, device.cuda_stream().cu_stream()) }.map_err(failed)
}

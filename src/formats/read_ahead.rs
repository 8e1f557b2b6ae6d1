//! Tensors of a file on their way to a GPU before they are asked for.
//!
//! Most tensors of a network are too small to keep all threads busy that copy them, so those that follow in the file come
//! along: networks ask for nearly all tensors of their file, nearly in their order.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{CudaDevice, Tensor};

use super::TensorFile;
use crate::Result;
use crate::cuda::upload_all;

/// Bytes brought at a time.
const WINDOW: usize = 512 << 20;
/// Bytes that may wait to be asked for.
const MOST_WAITING: usize = 1 << 30;

/// What has been read ahead of a file.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    /// The tensors that can be read so, by their place in the file.
    order: Vec<String>,
    places: HashMap<String, usize>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Which tensors, by place, were read.
    read: Vec<bool>,
    waiting: HashMap<String, Tensor>,
    bytes: usize,
}

impl ReadAhead {
    pub fn new(file: &TensorFile) -> Self {
        let order = file.in_file_order();
        let places = order.iter().enumerate().map(|(place, name)| (name.clone(), place)).collect();
        let state = State { read: vec![false; order.len()], waiting: HashMap::new(), bytes: 0 };
        ReadAhead { order, places, state: Mutex::new(state) }
    }

    /// A tensor of the file on the GPU; `None` for one that has to be read by itself.
    pub fn get(&self, file: &TensorFile, name: &str, device: &CudaDevice) -> Result<Option<Tensor>> {
        let Some(&place) = self.places.get(name) else { return Ok(None) };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tensor) = state.waiting.remove(name) {
            state.bytes -= size(&tensor);
            return Ok(Some(tensor));
        }
        let (mut wanted, mut bytes) = (Vec::new(), 0);
        for (at, next) in self.order.iter().enumerate().skip(place) {
            if at > place && state.read[at] {
                continue;
            }
            let Some(upload) = file.upload(next) else { break };
            bytes += upload.bytes.len();
            if at > place && (bytes > WINDOW || state.bytes + bytes > MOST_WAITING) {
                break;
            }
            wanted.push((at, upload));
        }
        let (places, uploads): (Vec<usize>, Vec<_>) = wanted.into_iter().unzip();
        let mut tensors = upload_all(device, &uploads)?.into_iter();
        let first = tensors.next();
        places.iter().for_each(|place| state.read[*place] = true);
        for (place, tensor) in places.iter().skip(1).zip(tensors) {
            state.bytes += size(&tensor);
            state.waiting.insert(self.order[*place].clone(), tensor);
        }
        Ok(first)
    }
}

fn size(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

//! Numbers that tensors without memory of their own repeat, by a stride of 0.

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor};

use super::Output;

thread_local! {
    static NUMBERS: RefCell<Vec<Tensor>> = const { RefCell::new(Vec::new()) };
}

/// A zero, of the kind that candle takes for variables: on this thread always the same one for a dtype and device, as a
/// backward pass needs hundreds.
pub(in crate::autograd) fn number(dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    let fits = |number: &&Tensor| number.dtype() == dtype && number.device().same_device(device);
    if let Some(number) = NUMBERS.with_borrow(|numbers| numbers.iter().find(fits).cloned()) {
        return Ok(number);
    }
    let number = Output::Tensor(Tensor::zeros((), dtype, device)?).into_tracked()?;
    NUMBERS.with_borrow_mut(|numbers| numbers.push(number.clone()));
    Ok(number)
}

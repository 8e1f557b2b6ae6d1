//! A function that has been applied.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};

use super::{Backward, Function, Value, number};
use crate::autograd::tape;
use crate::{Error, Result};

/// An input as far as the backward pass needs it.
struct Input {
    shape: Shape,
    dtype: DType,
    device: Device,
    values: Option<Tensor>,
}

impl Input {
    /// The input, or something of its shape and dtype that takes no memory: one number, repeated by a stride of 0.
    ///
    /// `numbers`: the numbers made so far, one a dtype; a segment has hundreds of inputs.
    fn tensor(&self, gradients: &[Option<Tensor>], numbers: &mut Vec<Tensor>) -> candle_core::Result<Tensor> {
        if let Some(values) = &self.values {
            return Ok(values.clone());
        }
        if let Some(number) = numbers.iter().find(|number| number.dtype() == self.dtype) {
            return number.broadcast_as(&self.shape);
        }
        let number = match gradients.iter().flatten().find(|gradient| gradient.dtype() == self.dtype) {
            Some(gradient) if gradient.elem_count() > 0 => gradient.flatten_all()?.narrow(0, 0, 1)?.reshape(())?,
            _ => number(self.dtype, &self.device)?.detach(),
        };
        numbers.push(number.clone());
        number.broadcast_as(&self.shape)
    }
}

/// A function that has been applied, with all its backward pass needs.
pub(in crate::autograd) struct Node {
    function: Box<dyn Function>,
    inputs: Vec<Input>,
    saved: Vec<Tensor>,
    needs: Vec<bool>,
}

impl Node {
    pub fn new(function: Box<dyn Function>, inputs: Vec<Tensor>, saved: Vec<Tensor>, needs: Vec<bool>) -> Self {
        let input = |(position, input): (usize, Tensor)| Input {
            shape: input.shape().clone(),
            dtype: input.dtype(),
            device: input.device().clone(),
            values: function.uses(Value::Input(position), &needs).then_some(input),
        };
        let inputs = inputs.into_iter().enumerate().map(input).collect();
        Node { function, inputs, saved, needs }
    }

    pub fn name(&self) -> &'static str {
        self.function.name()
    }

    /// Whether the backward pass reads the output at a position.
    pub fn uses_output(&self, position: usize) -> bool {
        self.function.uses(Value::Output(position), &self.needs)
    }

    /// The gradients of all inputs; `None`, which stands for zero, for an input that needs none. With each, whether it is
    /// the sum with what the input had `so_far`.
    pub fn backward(
        &self,
        outputs: &[Option<Tensor>],
        gradients: &[Option<Tensor>],
        mut so_far: Vec<Option<Tensor>>,
    ) -> Result<Vec<(Option<Tensor>, bool)>> {
        let gradients = gradients
            .iter()
            .map(|gradient| gradient.as_ref().map(Tensor::contiguous).transpose())
            .collect::<candle_core::Result<Vec<_>>>()?;
        let mut numbers = Vec::new();
        let inputs = self
            .inputs
            .iter()
            .map(|input| input.tensor(&gradients, &mut numbers))
            .collect::<candle_core::Result<Vec<_>>>()?;
        for (gradient, input) in so_far.iter_mut().zip(&self.inputs) {
            let fits = |sum: &Tensor| sum.is_contiguous() && sum.shape() == &input.shape && sum.dtype() == input.dtype;
            *gradient = gradient.take().filter(fits);
        }
        let offered: Vec<bool> = so_far.iter().map(Option::is_some).collect();
        let context = Backward {
            inputs: &inputs,
            outputs,
            saved: &self.saved,
            gradients: &gradients,
            needs: &self.needs,
            so_far: Mutex::new(so_far),
        };
        let mut computed = tape::outside(|| self.function.backward(&context))?;
        computed.resize(self.inputs.len(), None);
        for ((gradient, input), needed) in computed.iter_mut().zip(&self.inputs).zip(&self.needs) {
            match gradient {
                _ if !needed => *gradient = None,
                Some(given) if given.shape() != &input.shape || given.dtype() != input.dtype => {
                    return Err(Error::argument(
                        self.function.name(),
                        "gradient",
                        format!("shape {:?}, {:?}", input.shape.dims(), input.dtype),
                        format!("shape {:?}, {:?}", given.dims(), given.dtype()),
                    ));
                }
                _ => {}
            }
        }
        let left = context.so_far.into_inner().unwrap_or_else(PoisonError::into_inner);
        let taken = (0..computed.len()).map(|i| offered.get(i) == Some(&true) && matches!(left.get(i), Some(None)));
        let computed: Vec<_> = computed.into_iter().zip(taken).collect();
        if computed.iter().any(|(gradient, taken)| *taken && gradient.is_none()) {
            let expected = "the sum with the gradient that was taken";
            return Err(Error::argument(self.function.name(), "gradient", expected, "none"));
        }
        Ok(computed)
    }

    /// The same, with zeros in place of `None` for every input that needs a gradient, save variables: candle insists
    /// on one for all that it walks through.
    pub fn backward_with_zeros(
        &self,
        variables: &[bool],
        outputs: &[Option<Tensor>],
        gradients: &[Option<Tensor>],
    ) -> candle_core::Result<Vec<Option<Tensor>>> {
        let computed = self.backward(outputs, gradients, Vec::new())?;
        let mut computed: Vec<_> = computed.into_iter().map(|(gradient, _)| gradient).collect();
        for (((gradient, input), needed), variable) in
            computed.iter_mut().zip(&self.inputs).zip(&self.needs).zip(variables)
        {
            if gradient.is_none() && *needed && !variable {
                *gradient = Some(Tensor::zeros(&input.shape, input.dtype, &input.device)?);
            }
        }
        Ok(computed)
    }
}

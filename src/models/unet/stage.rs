//! The down, middle and up blocks, and the state of one run through them.

use std::sync::Arc;

use candle_core::Tensor;

use super::pass::{KeyValues, Pass, Recording};
use super::resnet::{Downsample, Resnet, Upsample};
use super::transformer::{BlockInputs, Transformer, TransformerOutput};
use super::{Conditioning, Config};
use crate::autograd::recompute_needed;
use crate::nn::Weights;
use crate::ops::concat_channels;
use crate::{Error, Result};

/// The state of one run.
pub(super) struct Run<'a> {
    time: &'a Tensor,
    text: &'a Tensor,
    pass: &'a Pass,
    recording: Option<&'a Recording>,
    last: Option<&'a str>,
    pub recorded: KeyValues,
}

impl<'a> Run<'a> {
    pub fn new(
        time: &'a Tensor,
        conditioning: &'a Conditioning,
        pass: &'a Pass,
        recording: Option<&'a Recording>,
        last: Option<&'a String>,
    ) -> Self {
        let text = &conditioning.hidden_states;
        Run { time, text, pass, recording, last: last.map(String::as_str), recorded: KeyValues::default() }
    }

    fn resnet(&self, resnet: &Arc<Resnet>, x: &Tensor) -> Result<Tensor> {
        if !self.pass.recompute {
            return resnet.forward(x, self.time, &self.pass.loras);
        }
        // In two segments: what is kept between them takes little memory for the convolution that need not run again.
        let (first, loras) = (resnet.clone(), self.pass.loras.clone());
        let segment = move |inputs: &[Tensor]| Ok(vec![first.first_half(&inputs[0], &inputs[1], &loras)?]);
        let hidden = one(recompute_needed(&[x, self.time], false, segment)?)?;
        let (second, loras) = (resnet.clone(), self.pass.loras.clone());
        let segment = move |inputs: &[Tensor]| Ok(vec![second.second_half(&inputs[0], &inputs[1], &loras)?]);
        one(recompute_needed(&[&hidden, x], false, segment)?)
    }

    /// `None` where the run ends inside this transformer.
    fn transformer(&mut self, transformer: &Arc<Transformer>, x: &Tensor) -> Result<Option<Tensor>> {
        let names: Vec<&str> = transformer.block_names().collect();
        let inputs: Vec<BlockInputs> = names
            .iter()
            .map(|name| BlockInputs {
                reference: self.pass.reference.as_ref().and_then(|reference| reference.get(name)).cloned(),
                image: self.pass.image_tokens.as_ref().and_then(|tokens| tokens.key_values.get(name)).cloned(),
            })
            .collect();
        let output = match self.pass.recompute {
            false => transformer.forward(x, self.text, &inputs, self.pass, self.recording, self.last)?,
            true => self.recomputed(transformer, x, inputs)?,
        };
        let recorded_names =
            names.iter().filter(|name| self.recording.is_some_and(|recording| recording.includes(name)));
        for (name, (key, value)) in recorded_names.zip(output.recorded) {
            self.recorded.insert(*name, key, value);
        }
        Ok(output.hidden)
    }

    /// The transformer in segments whose activations are recomputed: every block is one, so that what is alive at once
    /// are the activations of one block, and what is kept are the hidden states between blocks.
    fn recomputed(
        &self,
        transformer: &Arc<Transformer>,
        x: &Tensor,
        inputs: Vec<BlockInputs>,
    ) -> Result<TransformerOutput> {
        let (entrance, loras) = (transformer.clone(), self.pass.loras.clone());
        let mut hidden = one(recompute_needed(&[x], false, move |x| Ok(vec![entrance.enter(&x[0], &loras)?]))?)?;
        let mut text = transformer.text_key_values(self.text, &self.pass.loras)?.map(Vec::into_iter);
        let pass = Arc::new(self.pass.apart());
        let mut recorded = Vec::new();
        for (index, inputs) in inputs.into_iter().enumerate() {
            let text = text.as_mut().and_then(Iterator::next);
            let block = self.recomputed_block((transformer, index), &hidden, text, inputs, &pass)?;
            recorded.extend(block.recorded);
            match block.hidden {
                Some(next) => hidden = next,
                None => return Ok(TransformerOutput { hidden: None, recorded }),
            }
        }
        let (exit, loras) = (transformer.clone(), self.pass.loras.clone());
        let leave = move |x: &[Tensor]| Ok(vec![exit.leave(&x[0], &x[1], &loras)?]);
        Ok(TransformerOutput { hidden: Some(one(recompute_needed(&[&hidden, x], false, leave)?)?), recorded })
    }

    /// One block as a segment: every tensor that may need a gradient goes in through its inputs, and recorded keys and
    /// values come out through its outputs. The text's keys and values are constant where they are there already.
    fn recomputed_block(
        &self,
        (transformer, index): (&Arc<Transformer>, usize),
        hidden: &Tensor,
        text: Option<Tensor>,
        inputs: BlockInputs,
        pass: &Arc<Pass>,
    ) -> Result<TransformerOutput> {
        let pairs = [inputs.reference, inputs.image];
        let present = [pairs[0].is_some(), pairs[1].is_some()];
        let flat: Vec<Tensor> = pairs.into_iter().flatten().flat_map(|(key, value)| [key, value]).collect();
        let all: Vec<&Tensor> = [hidden, self.text].into_iter().chain(&flat).collect();
        let (transformer, pass, recording) = (transformer.clone(), pass.clone(), self.recording.cloned());
        let last = self.last.map(str::to_string);
        let keep = pass.keep_attention;
        let segment = move |tensors: &[Tensor]| {
            let mut rest = tensors[2..].iter().cloned();
            let mut pair = |present: bool| match present {
                true => rest.next().zip(rest.next()),
                false => None,
            };
            let inputs = BlockInputs { reference: pair(present[0]), image: pair(present[1]) };
            let text = (&tensors[1], text.as_ref());
            let recording = (recording.as_ref(), last.as_deref());
            let output = transformer.block(index, &tensors[0], text, &inputs, &pass, recording)?;
            let recorded = output.recorded.into_iter().flat_map(|(key, value)| [key, value]);
            Ok(recorded.chain(output.hidden).collect())
        };
        let mut outputs = recompute_needed(&all, keep, segment)?;
        let hidden = if outputs.len() % 2 == 1 { outputs.pop() } else { None };
        let mut outputs = outputs.into_iter();
        let recorded = std::iter::from_fn(|| outputs.next().zip(outputs.next())).collect();
        Ok(TransformerOutput { hidden, recorded })
    }

    /// A resnet and, where the stage has them, the transformer behind it.
    fn layer(
        &mut self,
        resnet: &Arc<Resnet>,
        transformer: Option<&Arc<Transformer>>,
        x: &Tensor,
    ) -> Result<Option<Tensor>> {
        let hidden = self.resnet(resnet, x)?;
        match transformer {
            Some(transformer) => self.transformer(transformer, &hidden),
            None => Ok(Some(hidden)),
        }
    }
}

/// The output of a segment that has one.
fn one(outputs: Vec<Tensor>) -> Result<Tensor> {
    let count = outputs.len();
    outputs.into_iter().next().ok_or_else(|| Error::argument("recompute", "segment", "one output", count.to_string()))
}

fn transformers(config: &Config, level: usize, count: usize, weights: &Weights) -> Result<Vec<Arc<Transformer>>> {
    match config.transformer_layers_per_block[level] {
        0 => Ok(Vec::new()),
        _ => (0..count)
            .map(|i| Ok(Arc::new(Transformer::load(config, level, &weights.pp("attentions").pp(i))?)))
            .collect(),
    }
}

/// diffusers' `DownBlock2D` or `CrossAttnDownBlock2D`.
#[derive(Debug)]
pub(super) struct Down {
    resnets: Vec<Arc<Resnet>>,
    pub attentions: Vec<Arc<Transformer>>,
    downsample: Option<Downsample>,
}

impl Down {
    pub fn load(config: &Config, level: usize, weights: &Weights) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (input, output) = (channels[level.saturating_sub(1)], channels[level]);
        let resnets = (0..config.layers_per_block)
            .map(|i| {
                let input = if i == 0 { input } else { output };
                Ok(Arc::new(Resnet::load(config, input, output, &weights.pp("resnets").pp(i))?))
            })
            .collect::<Result<_>>()?;
        let downsample = match level + 1 < channels.len() {
            true => Some(Downsample::load(output, &weights.pp("downsamplers").pp(0))?),
            false => None,
        };
        let attentions = transformers(config, level, config.layers_per_block, weights)?;
        Ok(Down { resnets, attentions, downsample })
    }

    pub fn forward(&self, mut x: Tensor, skips: &mut Vec<Tensor>, run: &mut Run<'_>) -> Result<Option<Tensor>> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            match run.layer(resnet, self.attentions.get(i), &x)? {
                Some(hidden) => x = hidden,
                None => return Ok(None),
            }
            skips.push(x.clone());
        }
        if let Some(downsample) = &self.downsample {
            x = downsample.forward(&x, &run.pass.loras)?;
            skips.push(x.clone());
        }
        Ok(Some(x))
    }
}

/// diffusers' `UNetMidBlock2DCrossAttn`.
#[derive(Debug)]
pub(super) struct Mid {
    resnets: [Arc<Resnet>; 2],
    pub attention: Arc<Transformer>,
}

impl Mid {
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let level = config.block_out_channels.len() - 1;
        let channels = config.block_out_channels[level];
        let resnet = |i: usize| {
            Ok::<_, Error>(Arc::new(Resnet::load(config, channels, channels, &weights.pp("resnets").pp(i))?))
        };
        let attention = Arc::new(Transformer::load(config, level, &weights.pp("attentions").pp(0))?);
        Ok(Mid { resnets: [resnet(0)?, resnet(1)?], attention })
    }

    pub fn forward(&self, x: Tensor, run: &mut Run<'_>) -> Result<Option<Tensor>> {
        match run.layer(&self.resnets[0], Some(&self.attention), &x)? {
            Some(hidden) => Ok(Some(run.resnet(&self.resnets[1], &hidden)?)),
            None => Ok(None),
        }
    }
}

/// diffusers' `UpBlock2D` or `CrossAttnUpBlock2D`.
#[derive(Debug)]
pub(super) struct Up {
    index: usize,
    resnets: Vec<Arc<Resnet>>,
    pub attentions: Vec<Arc<Transformer>>,
    upsample: Option<Upsample>,
}

impl Up {
    pub fn load(config: &Config, index: usize, weights: &Weights) -> Result<Self> {
        let channels = &config.block_out_channels;
        let level = channels.len() - 1 - index;
        let (output, below, beside) =
            (channels[level], channels[(level + 1).min(channels.len() - 1)], channels[level.saturating_sub(1)]);
        let layers = config.layers_per_block + 1;
        let resnets = (0..layers)
            .map(|i| {
                let hidden = if i == 0 { below } else { output };
                let skip = if i + 1 == layers { beside } else { output };
                Ok(Arc::new(Resnet::load(config, hidden + skip, output, &weights.pp("resnets").pp(i))?))
            })
            .collect::<Result<_>>()?;
        let upsample = match level {
            0 => None,
            _ => Some(Upsample::load(output, &weights.pp("upsamplers").pp(0))?),
        };
        Ok(Up { index, resnets, attentions: transformers(config, level, layers, weights)?, upsample })
    }

    pub fn forward(&self, mut x: Tensor, skips: &mut Vec<Tensor>, run: &mut Run<'_>) -> Result<Option<Tensor>> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            if let Some(mut skip) = skips.pop() {
                if let Some(freeu) = &run.pass.freeu {
                    (x, skip) = freeu.apply(self.index, x, skip)?;
                }
                x = concat_channels(&x, &skip)?;
            }
            match run.layer(resnet, self.attentions.get(i), &x)? {
                Some(hidden) => x = hidden,
                None => return Ok(None),
            }
        }
        if let Some(upsample) = &self.upsample {
            x = upsample.forward(&x, &run.pass.loras)?;
        }
        Ok(Some(x))
    }
}

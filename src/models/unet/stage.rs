//! The down, middle and up blocks, and the state of one run through them.

use std::sync::Arc;

use candle_core::Tensor;

use super::pass::{KeyValues, Pass, Recording};
use super::resnet::{Downsample, Resnet, Upsample};
use super::transformer::{BlockInputs, Transformer, TransformerOutput};
use super::{Conditioning, Config};
use crate::autograd::{recompute, recompute_keeping};
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
        let (resnet, loras) = (resnet.clone(), self.pass.loras.clone());
        let mut outputs =
            recompute(&[x, self.time], move |inputs| Ok(vec![resnet.forward(&inputs[0], &inputs[1], &loras)?]))?;
        Ok(outputs.swap_remove(0))
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
            true => self.recomputed(transformer, x, &inputs)?,
        };
        let recorded_names =
            names.iter().filter(|name| self.recording.is_some_and(|recording| recording.includes(name)));
        for (name, (key, value)) in recorded_names.zip(output.recorded) {
            self.recorded.insert(*name, key, value);
        }
        Ok(output.hidden)
    }

    /// The transformer as a segment whose activations are recomputed: every tensor that may need a gradient goes in
    /// through the segment's inputs, and every recorded key and value comes out through its outputs.
    fn recomputed(
        &self,
        transformer: &Arc<Transformer>,
        x: &Tensor,
        inputs: &[BlockInputs],
    ) -> Result<TransformerOutput> {
        let pairs = |block: &BlockInputs| [block.reference.clone(), block.image.clone()];
        let present: Vec<[bool; 2]> = inputs.iter().map(|block| pairs(block).map(|pair| pair.is_some())).collect();
        let flat: Vec<Tensor> = inputs.iter().flat_map(pairs).flatten().flat_map(|(key, value)| [key, value]).collect();
        let all: Vec<&Tensor> = [x, self.text].into_iter().chain(&flat).collect();
        let (transformer, recording) = (transformer.clone(), self.recording.cloned());
        // The reference and the image keys and values come in as inputs, so the pass itself needs none of them.
        let pass = Pass { reference: None, ..self.pass.clone() };
        let last = self.last.map(str::to_string);
        let keep = pass.keep_attention;
        let segment = move |tensors: &[Tensor]| {
            let mut rest = tensors[2..].iter().cloned();
            let mut pair = |present: bool| match present {
                true => rest.next().zip(rest.next()),
                false => None,
            };
            let inputs: Vec<BlockInputs> = present
                .iter()
                .map(|[reference, image]| BlockInputs { reference: pair(*reference), image: pair(*image) })
                .collect();
            let output =
                transformer.forward(&tensors[0], &tensors[1], &inputs, &pass, recording.as_ref(), last.as_deref())?;
            let recorded = output.recorded.into_iter().flat_map(|(key, value)| [key, value]);
            Ok(recorded.chain(output.hidden).collect())
        };
        let mut outputs = if keep { recompute_keeping(&all, segment)? } else { recompute(&all, segment)? };
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

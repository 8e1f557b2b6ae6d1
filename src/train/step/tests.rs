//! All passes of a step on one tape, beside candle's graph.

use super::*;
use crate::autograd::{gradients, tape};
use crate::lookahead::LossValue;
use crate::train::alignment::tests::{DRAW, Step};

/// The mean squared difference.
struct Distance;

impl ImageLoss for Distance {
    fn name(&self) -> &str {
        "distance"
    }

    fn loss(&self, previews: &Tensor, conditioning_images: &Tensor) -> Result<LossValue> {
        let counted = previews.dim(0)?;
        let difference = (previews - conditioning_images.to_dtype(previews.dtype())?)?;
        Ok(LossValue { loss: difference.sqr()?.mean_all()?, counted })
    }
}

/// Steps that differ in what is dropped, recomputed, and which samples the lookahead loss takes.
fn steps() -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for (adapter_drop, limit, recompute) in [(0.0, 1000, false), (0.5, 1000, true), (1.0, 400, true)] {
        let mut step = Step::new(AlignmentLoss::None, 0.5)?;
        step.config.dropout.adapter_drop_chance = adapter_drop;
        step.config.timesteps.lcm_max_timestep = limit;
        step.config.lookahead.batch_size = 2;
        step.config.recompute = recompute;
        steps.push(step);
    }
    Ok(steps)
}

#[test]
fn losses_and_gradients_on_one_tape_equal_those_of_candles_graph() -> Result<()> {
    let image_losses: Vec<(Box<dyn ImageLoss>, f64)> = vec![(Box::new(Distance), 0.7)];
    for step in steps()? {
        let (losses, prepared) = (step.losses(&image_losses), step.prepared()?);
        let total = |joint: bool, report: &mut PendingReport| -> Result<Tensor> {
            if joint {
                return losses.joint(&prepared, 1, DRAW, true, report);
            }
            let diffusion = losses.diffusion(&prepared, DRAW, report)?;
            let lookahead = losses.lookahead(&prepared, 1, DRAW, report)?;
            Ok(lookahead.map_or(Ok(diffusion.clone()), |lookahead| diffusion + lookahead)?)
        };
        for joint in [true, false] {
            let (mut plain, mut taped) = (PendingReport::default(), PendingReport::default());
            let expected = total(joint, &mut plain)?.backward()?;
            let found = gradients(|| total(joint, &mut taped).map(Some))?;
            let Some(found) = found else { panic!("no gradients") };
            let (plain, taped) = (plain.read()?, taped.read()?);
            assert!(plain.diffusion.is_some() && !plain.lookahead.is_empty());
            assert_eq!((plain.diffusion, plain.lookahead), (taped.diffusion, taped.lookahead));
            for (name, variable) in step.parameters.all() {
                let Some(expected) = expected.get(&variable) else { panic!("no gradient for {name}") };
                let Some(found) = found.get(&variable) else { panic!("none for {name} on the tape") };
                let size = expected.abs()?.max_all()?.to_scalar::<f64>()?;
                let error = (expected - found)?.abs()?.max_all()?.to_scalar::<f64>()?;
                assert!(error <= 1e-11 * size, "{name}: {error} of {size}");
            }
        }
    }
    Ok(())
}

#[test]
fn all_passes_of_a_step_stay_on_one_tape() -> Result<()> {
    for step in steps()? {
        let (losses, prepared) = (step.losses(&[]), step.prepared()?);
        let chosen = prepared.select(&[1])?;
        let recording = tape::record(&[], |_| {
            let conditions = losses.conditions(&prepared, &[700, 300], losses.address("kv drop", DRAW), true)?;
            let first = losses.denoise(&prepared, &[700, 300], &conditions, Loras::none())?;
            let conditions = conditions.select(&[1])?;
            Ok(vec![first, losses.denoise(&chosen, &[300], &conditions, losses.lcm_loras(Some(0.5)))?])
        });
        assert_eq!(recording?.outputs().len(), 2);
    }
    Ok(())
}

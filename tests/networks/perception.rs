use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use lcm_lookahead::models::lpips::{self, Lpips};
use lcm_lookahead::models::yunet::{self, YuNet};
use lcm_lookahead::nn::Weights;

use crate::KINDS;
use crate::support::{Case, norm};

#[test]
fn lpips_on_both_backbones_with_gradients_into_both_images() -> Result<()> {
    let widths = [3, 3, 4, 4, 4];
    for (name, config) in [("lpips_vgg", lpips::Config::vgg()), ("lpips_alex", lpips::Config::alex())] {
        let case = Case::load("perception", name)?;
        for (dtype, limit) in KINDS {
            let weights = case.weights_as(dtype)?;
            let model = Lpips::load(&lpips::Config { widths, ..config.clone() }, &weights, &weights)?;
            let image = |name: &str| -> Result<Var> { Ok(Var::from_tensor(&case.get_as(name, dtype)?)?) };
            let (a, b) = (image("a")?, image("b")?);
            let distance = model.forward(&a, &b)?;
            case.assert_within(limit, "distance", &distance)?;
            let signs = Tensor::new(&[1.0, -2.0], a.device())?.to_dtype(dtype)?;
            let gradients = (distance * signs)?.sum_all()?.backward()?;
            case.assert_within(limit, "a_gradient", gradients.get(&a).context("no gradient")?)?;
            case.assert_within(limit, "b_gradient", gradients.get(&b).context("no gradient")?)?;
            // Equal images have no distance, and a gradient that is 0, not NaN.
            let same = model.forward(&a, &a)?;
            assert_eq!(norm(&same)?, 0.0);
            assert_eq!(norm(&same.sum_all()?.backward()?.remove(&a).context("no gradient")?)?, 0.0);
        }
    }
    Ok(())
}

#[test]
fn lpips_has_the_published_tensors() -> Result<()> {
    for (config, tensors, numbers) in [(lpips::Config::vgg(), 31, 14_716_160), (lpips::Config::alex(), 15, 2_470_848)] {
        let weights = Weights::shapes_only();
        Lpips::load(&config, &weights, &weights)?;
        let shapes = weights.shapes();
        let sum = shapes.values().map(|shape| shape.iter().product::<usize>()).sum::<usize>();
        assert_eq!((shapes.len(), sum), (tensors, numbers));
        assert_eq!(shapes["lin0.model.1.weight"], [1, 64, 1, 1]);
        assert!(shapes.contains_key("features.10.bias"));
    }
    Ok(())
}

#[test]
fn yunet_has_the_published_tensors() -> Result<()> {
    let weights = Weights::shapes_only();
    YuNet::load(&yunet::Config::yunet(), &weights)?;
    let shapes = weights.shapes();
    assert_eq!(shapes.len(), 106);
    for (name, shape) in [
        ("429", vec![32, 1, 3, 3]),
        ("backbone.model2.conv2.conv1.weight", vec![64, 32, 1, 1]),
        ("neck.lateral_convs.2.conv1.bias", vec![64]),
        ("462", vec![64, 1, 3, 3]),
        ("bbox_head.multi_level_kps.0.conv2.weight", vec![10, 1, 3, 3]),
    ] {
        assert_eq!(shapes.get(name), Some(&shape), "{name}");
    }
    Ok(())
}

#[test]
fn yunet_says_what_its_graph_says() -> Result<()> {
    let case = Case::load("perception", "yunet")?;
    let config = yunet::Config { widths: [3, 4, 5, 6, 6, 6], ..yunet::Config::yunet() };
    for (dtype, limit) in KINDS {
        let model = YuNet::load(&config, &case.weights_as(dtype)?)?;
        for (i, level) in model.levels(&case.get_as("images", dtype)?)?.iter().enumerate() {
            assert_eq!(level.stride, 8 << i);
            case.assert_within(limit, &format!("{i}.cls"), &level.scores)?;
            case.assert_within(limit, &format!("{i}.obj"), &level.objectness)?;
            case.assert_within(limit, &format!("{i}.bbox"), &level.boxes)?;
            case.assert_within(limit, &format!("{i}.kps"), &level.landmarks)?;
        }
    }
    Ok(())
}

//! Norms, activations, changes of size, and other operations that move memory.

use candle_core::{DType, Device, Tensor};
use lcm_lookahead::Result;
use lcm_lookahead::autograd::recompute;
use lcm_lookahead::ops::{self, Activation, TokenSelection};

use crate::{compare, gpu, random};

#[test]
fn residual_and_norm_equal_the_cpu() -> Result<()> {
    for channels in [20, 33, 320, 640, 768, 1280, 1664] {
        let x = [3, 5, channels];
        let inputs = [random("x", &x), random("r", &x), random("w", &[channels]), random("b", &[channels])];
        compare(&format!("add_layer_norm {channels}"), &inputs, |t| {
            let (sum, normed) = ops::add_layer_norm(&t[0], &t[1], &t[2], &t[3], 1e-5)?;
            Ok((sum * 0.7)?.add(&normed)?)
        })?;
        // The gradient needs the sum, also where that is no part of the loss.
        compare(&format!("add_layer_norm {channels}, the norm alone"), &inputs, |t| {
            Ok(ops::add_layer_norm(&t[0], &t[1], &t[2], &t[3], 1e-5)?.1)
        })?;
        compare(&format!("add_layer_norm {channels}, the norm alone, recomputed"), &inputs, |t| {
            let inputs: Vec<&Tensor> = t.iter().collect();
            let segment = |t: &[Tensor]| Ok(vec![ops::add_layer_norm(&t[0], &t[1], &t[2], &t[3], 1e-5)?.1]);
            Ok(recompute(&inputs, segment)?.swap_remove(0))
        })?;
    }
    Ok(())
}

#[test]
fn normalisations_equal_the_cpu() -> Result<()> {
    for (channels, groups, activation) in [
        (32, 8, Activation::Silu),
        (320, 32, Activation::Silu),
        (12, 3, Activation::None),
        (80, 8, Activation::Silu),
        (15, 3, Activation::Silu),
        (35, 5, Activation::None),
        (272, 16, Activation::Silu),
        (272, 16, Activation::None),
    ] {
        let x = (random("x", &[2, 9, 7, channels]) + 3.0)?;
        let inputs = [x, random("w", &[channels]), random("b", &[channels])];
        compare(&format!("group_norm {channels}/{groups} {activation:?}"), &inputs, |t| {
            ops::group_norm(&t[0], groups, &t[1], &t[2], 1e-5, activation)
        })?;
        // On a tape, where the input has got a gradient before the normalisation adds its own.
        compare(&format!("group_norm {channels}/{groups} {activation:?} beside its input"), &inputs, |t| {
            let segment = move |t: &[Tensor]| {
                let normed = ops::group_norm(&t[0], groups, &t[1], &t[2], 1e-5, activation)?;
                Ok(vec![ops::concat_channels(&normed, &t[0])?])
            };
            Ok(recompute(&t.iter().collect::<Vec<_>>(), segment)?.swap_remove(0))
        })?;
    }
    for channels in [20, 33, 7, 64, 640, 768, 1280, 1664] {
        let x = (random("x", &[3, 5, channels]) - 2.0)?;
        let inputs = [x, random("w", &[channels]), random("b", &[channels])];
        compare(&format!("layer_norm {channels}"), &inputs, |t| ops::layer_norm(&t[0], &t[1], &t[2], 1e-5))?;
    }
    Ok(())
}

#[test]
fn pointwise_operations_equal_the_cpu() -> Result<()> {
    compare("geglu", &[random("x", &[3, 10, 128])], |t| ops::geglu(&t[0]))?;
    compare("geglu, odd", &[random("x", &[3, 7, 10])], |t| ops::geglu(&t[0]))?;
    for kind in [Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::Relu] {
        compare(&format!("{kind:?}"), &[random("x", &[5, 37])], |t| ops::activation(&t[0], kind))?;
    }
    Ok(())
}

#[test]
fn squeeze_and_excitation_equals_the_cpu() -> Result<()> {
    for (batch, height, width, channels) in [(2, 5, 7, 32), (1, 1, 1, 5), (3, 14, 14, 256), (2, 9, 4, 12)] {
        let (x, one) = ([batch, height, width, channels], [batch, 1, 1, channels]);
        let inputs = [random("x", &x), random("logits", &one), random("addend", &x)];
        compare(&format!("gated_sum {x:?}"), &inputs, |t| ops::gated_sum(&t[0], &t[1], &t[2]))?;
        compare(&format!("mean_pixels {x:?}"), &inputs[..1], |t| ops::mean_pixels(&t[0]))?;
    }
    Ok(())
}

#[test]
fn selected_tokens_equal_the_cpu() -> Result<()> {
    for (channels, kept) in [(32, vec![0, 2, 3, 10]), (5, vec![12]), (640, (0..13).step_by(2).collect())] {
        let on_cpu = TokenSelection::new(kept.clone(), 13, &Device::Cpu)?;
        let on_gpu = gpu().map(|device| TokenSelection::new(kept, 13, &device)).transpose()?;
        compare(&format!("select_tokens {channels}"), &[random("x", &[3, 13, channels])], |t| {
            ops::select_tokens(&t[0], on_gpu.as_ref().filter(|_| t[0].device().is_cuda()).unwrap_or(&on_cpu))
        })?;
    }
    Ok(())
}

#[test]
fn changes_of_size_equal_the_cpu() -> Result<()> {
    for channels in [24, 5, 6, 4] {
        compare(&format!("upsample {channels}"), &[random("x", &[2, 5, 6, channels])], |t| {
            ops::upsample_nearest_2x(&t[0])
        })?;
    }
    for (height, width, antialias) in [(7, 5, true), (24, 20, false), (4, 30, true)] {
        compare(&format!("resize {height}x{width} {antialias}"), &[random("x", &[2, 12, 16, 3])], |t| {
            ops::resize_bilinear(&t[0], height, width, antialias)
        })?;
    }
    for (height, width, channels) in [(7, 21, 3), (3, 2, 3), (24, 16, 8), (12, 5, 1), (1, 40, 3)] {
        compare(&format!("bicubic {height}x{width} {channels}"), &[random("x", &[2, 12, 16, channels])], |t| {
            ops::resize_bicubic(&t[0], height, width)
        })?;
    }
    let matrices = [[[0.7, -0.2, 2.0], [0.25, 0.8, -1.0]], [[1.3, 0.1, -3.0], [-0.1, 0.9, 4.0]]];
    compare("warp 8", &[random("x", &[2, 14, 13, 8])], |t| ops::warp_affine(&t[0], &matrices, 11, 12))?;
    compare("warp", &[random("x", &[2, 14, 13, 3])], |t| ops::warp_affine(&t[0], &matrices, 11, 12))
}

#[test]
fn operations_of_face_networks_equal_the_cpu() -> Result<()> {
    for channels in [3, 8, 64] {
        let x = random("x", &[2, 9, 7, channels]);
        let (a, b) = (random("a", &[channels]), random("b", &[channels]));
        compare(&format!("channel_affine {channels}"), &[x.clone(), a.clone(), b], |t| {
            ops::channel_affine(&t[0], &t[1], &t[2])
        })?;
        compare(&format!("prelu {channels}"), &[x.clone(), a], |t| ops::prelu(&t[0], &t[1]))?;
        for (kernel, stride) in [(2, 2), (3, 2), (1, 2), (3, 1), (2, 3)] {
            compare(&format!("max_pool2d {channels} {kernel} {stride}"), std::slice::from_ref(&x), |t| {
                ops::max_pool2d(&t[0], kernel, stride)
            })?;
        }
        for (kernel, stride, padding) in [([3, 3], 1, 1), ([3, 3], 2, 1), ([7, 7], 1, 0), ([1, 4], 3, 2)] {
            let weight = random("w", &[kernel[0], kernel[1], channels]);
            let inputs = [x.clone(), weight, random("b", &[channels])];
            compare(&format!("depthwise_conv2d {channels} {kernel:?} {stride} {padding}"), &inputs, |t| {
                ops::depthwise_conv2d(&t[0], &t[1], Some(&t[2]), stride, padding)
            })?;
        }
    }
    Ok(())
}

#[test]
fn sums_copies_and_casts_equal_the_cpu() -> Result<()> {
    for shape in [vec![2, 5, 8], vec![3, 7, 5], vec![2, 3, 4, 24], vec![2, 3, 6], vec![1, 9, 4]] {
        let channels = shape[shape.len() - 1];
        let (a, b) = (random("a", &shape), random("b", &shape));
        let name = |what: &str| format!("{what} {shape:?}");
        compare(&name("add_scaled"), &[a.clone(), b.clone()], |t| ops::add_scaled(&t[0], &t[1], -0.7))?;
        compare(&name("add"), &[a.clone(), b.clone()], |t| ops::add(&t[0], &t[1]))?;
        compare(&name("scale"), std::slice::from_ref(&a), |t| ops::scale(&t[0], 1.7))?;
        compare(&name("cast"), std::slice::from_ref(&a), |t| {
            let to = if matches!(t[0].dtype(), DType::BF16 | DType::F16) { DType::F32 } else { t[0].dtype() };
            ops::cast(&ops::scale(&ops::cast(&t[0], to)?, 0.3)?, t[0].dtype())
        })?;
        let vectors = random("v", &[shape[0], channels]);
        compare(&name("add_per_sample"), &[a.clone(), vectors], |t| ops::add_per_sample(&t[0], &t[1]))?;
        compare(&name("concat_channels"), &[a.clone(), b.clone()], |t| ops::concat_channels(&t[0], &t[1]))?;
        compare(&name("split"), &[a], |t| {
            let parts = ops::split(&t[0], &[3, channels - 3])?;
            ops::concat_channels(&ops::scale(&parts[1], 2.0)?, &parts[0])
        })?;
    }
    Ok(())
}

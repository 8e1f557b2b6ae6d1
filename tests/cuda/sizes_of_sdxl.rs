//! Operations at the sizes SDXL has.

use lcm_lookahead::Result;
use lcm_lookahead::ops::{self, Activation, Addends, Mask};

use crate::compare_large;

#[test]
fn operations_at_the_sizes_of_sdxl_equal_f32() -> Result<()> {
    for (size, input, output, stride) in [
        (128usize, 320usize, 320usize, 1usize),
        (128, 960, 320, 1),
        (64, 320, 640, 1),
        (64, 1920, 640, 1),
        (32, 640, 1280, 1),
        (32, 2560, 1280, 1),
        (64, 1280, 1280, 1),
        (128, 320, 320, 2),
        (64, 640, 640, 2),
        (128, 4, 320, 1),
        (128, 320, 4, 1),
    ] {
        let out = size / stride;
        let shapes: [(&'static str, &[usize]); 4] = [
            ("x", &[2, size, size, input]),
            ("w", &[output, 3, 3, input]),
            ("v", &[2, output]),
            ("r", &[2, out, out, output]),
        ];
        compare_large(&format!("conv2d {size} {input}->{output} /{stride}"), &shapes, |t| {
            let addends = Addends { bias: None, per_sample: Some(&t[2]), residual: Some(&t[3]) };
            ops::conv2d_with(&t[0], &t[1], &addends, stride, 1)
        })?;
    }
    for (size, channels) in [(128usize, 320usize), (128, 640), (128, 960), (64, 1920), (32, 2560), (32, 1280)] {
        let shapes: [(&'static str, &[usize]); 3] =
            [("x", &[2, size, size, channels]), ("w", &[channels]), ("b", &[channels])];
        compare_large(&format!("group_norm {size} {channels}"), &shapes, |t| {
            ops::group_norm(&t[0], 32, &t[1], &t[2], 1e-5, Activation::Silu)
        })?;
    }
    for (tokens, keys, heads) in [(4096usize, 4096usize, 10usize), (1024, 1024, 20), (4096, 77, 10), (1024, 77, 20)] {
        let channels = 64 * heads;
        let (q, k): (&[usize], &[usize]) = (&[2, tokens, channels], &[2, keys, channels]);
        compare_large(&format!("attention {tokens} {keys} {heads}"), &[("q", q), ("k", k), ("v", k)], |t| {
            ops::attention(&t[0], (&t[1], &t[2]), None, heads, Mask::None)
        })?;
    }
    for (rows, inner, out) in
        [(1024usize, 1280usize, 1280usize), (1024, 1280, 10240), (1024, 5120, 1280), (77, 2048, 1280), (1, 1280, 1280)]
    {
        let shapes: [(&'static str, &[usize]); 4] =
            [("x", &[2, rows, inner]), ("w", &[out, inner]), ("b", &[out]), ("r", &[2, rows, out])];
        compare_large(&format!("linear {rows} {inner} {out}"), &shapes, |t| {
            let addends = Addends { bias: Some(&t[2]), per_sample: None, residual: Some(&t[3]) };
            ops::linear_with(&t[0], &t[1], &addends)
        })?;
    }
    for (rows, channels) in [(4096usize, 640usize), (1024, 1280)] {
        let shapes: [(&'static str, &[usize]); 3] =
            [("x", &[2, rows, channels]), ("w", &[channels]), ("b", &[channels])];
        compare_large(&format!("layer_norm {channels}"), &shapes, |t| ops::layer_norm(&t[0], &t[1], &t[2], 1e-5))?;
        compare_large(&format!("geglu {channels}"), &[("x", &[2, rows, 8 * channels])], |t| ops::geglu(&t[0]))?;
    }
    compare_large("concat", &[("a", &[2, 64, 64, 640]), ("b", &[2, 64, 64, 320])], |t| {
        ops::concat_channels(&t[0], &t[1])
    })?;
    compare_large("upsample", &[("x", &[2, 32, 32, 1280])], |t| ops::upsample_nearest_2x(&t[0]))
}

//! Attention over one and two sources, and to text and image tokens.

use candle_core::{DType, Tensor};
use lcm_lookahead::ops::{self, Mask};
use lcm_lookahead::{Result, cuda};

use crate::{compare, error, gpu, random};

#[test]
fn cross_attention_to_text_and_image_tokens_equals_the_cpu() -> Result<()> {
    for (heads, width, tokens) in [(2, 64, 200), (1, 64, 1024), (2, 32, 50), (2, 128, 50), (3, 16, 40)] {
        let channels = heads * width;
        let inputs = [
            random("q", &[2, tokens, channels]),
            random("k", &[2, 77, channels]),
            random("v", &[2, 77, channels]),
            random("ki", &[2, 16, channels]),
            random("vi", &[2, 16, channels]),
        ];
        compare(&format!("cross-attention {heads}x{width} {tokens}"), &inputs, |t| {
            ops::cross_attention(&t[0], (&t[1], &t[2]), Some(((&t[3], &t[4]), 0.6)), heads)
        })?;
        let packed = [inputs[0].clone(), random("kv", &[2, 77, 2 * channels])];
        compare(&format!("packed cross-attention {heads}x{width} {tokens}"), &packed, |t| {
            ops::cross_attention_packed(&t[0], &t[1], None, heads)
        })?;
    }
    Ok(())
}

#[test]
fn samples_without_the_reference_equal_the_cpu() -> Result<()> {
    let inputs = [
        random("q", &[3, 150, 128]),
        random("k", &[3, 150, 128]),
        random("v", &[3, 150, 128]),
        random("k2", &[3, 130, 128]),
        random("v2", &[3, 130, 128]),
    ];
    compare("attention where", &inputs, |t| {
        ops::attention_where(&t[0], (&t[1], &t[2]), (&t[3], &t[4]), &[false, true, false], 2)
    })
}

#[test]
fn a_reference_is_read_where_it_lies_among_those_of_other_steps() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let sees = [true, true, false, false];
    for (dtype, limit) in [(DType::F32, 2e-5), (DType::BF16, 1e-2)] {
        let rounded = |name, shape: &[usize]| -> Result<Tensor> { Ok(random(name, shape).to_dtype(dtype)?) };
        let packed = rounded("packed", &[4, 70, 3 * 128])?;
        let all = [rounded("k2", &[6, 50, 128])?, rounded("v2", &[6, 50, 128])?];
        let attend = |packed: &Tensor, all: &[Tensor; 2], start: usize| -> Result<Tensor> {
            let [keys, values] = all.each_ref().map(|all| all.narrow(0, start, 2));
            ops::attention_packed(packed, Some((&keys?, &values?)), Some(&sees), 2)
        };
        let exact = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let moved = |t: &Tensor| t.to_device(&device).unwrap();
        for start in [0, 2, 4] {
            let expected = attend(&exact(&packed), &all.each_ref().map(exact), start)?;
            let found = attend(&moved(&packed), &all.each_ref().map(moved), start)?;
            let error = error(&found, &expected);
            println!("reference from {start} {dtype:?}: {error:.2e}");
            assert!(error < limit, "reference from {start} {dtype:?}: error {error:.2e}, limit {limit:.0e}");
        }
    }
    Ok(())
}

#[test]
fn attention_over_two_sources_equals_the_cpu() -> Result<()> {
    for (batch, heads, width, tokens, own, reference, reference_batch) in [
        (2, 2, 64, 128, 128, 128, 2),
        (3, 1, 64, 100, 77, 130, 1),
        (1, 2, 64, 65, 200, 33, 1),
        (2, 3, 16, 40, 40, 64, 2),
        (2, 2, 32, 70, 16, 5, 1),
        (2, 1, 80, 33, 50, 20, 2),
        (2, 1, 128, 40, 33, 20, 1),
        (1, 1, 256, 40, 33, 20, 1),
    ] {
        let channels = heads * width;
        let inputs = [
            random("q", &[batch, tokens, channels]),
            random("k", &[batch, own, channels]),
            random("v", &[batch, own, channels]),
            random("k2", &[reference_batch, reference, channels]),
            random("v2", &[reference_batch, reference, channels]),
        ];
        compare(&format!("attention {batch} {heads}x{width} {tokens} {own}+{reference}"), &inputs, |t| {
            ops::attention(&t[0], (&t[1], &t[2]), Some((&t[3], &t[4])), heads, Mask::None)
        })?;
    }
    Ok(())
}

#[test]
fn plain_and_causal_attention_equal_the_cpu() -> Result<()> {
    for (heads, width, tokens, own, mask) in [
        (2, 64, 256, 256, Mask::None),
        (2, 64, 200, 77, Mask::None),
        (2, 64, 77, 77, Mask::Causal),
        (2, 32, 32, 32, Mask::Causal),
        (1, 24, 19, 19, Mask::None),
        (2, 128, 70, 90, Mask::None),
        (1, 128, 33, 33, Mask::Causal),
        (1, 96, 40, 50, Mask::None),
        (1, 256, 20, 30, Mask::None),
        (1, 200, 40, 40, Mask::Causal),
        (3, 64, 500, 300, Mask::None),
    ] {
        let channels = heads * width;
        let keys = [2, own, channels];
        let inputs = [random("q", &[2, tokens, channels]), random("k", &keys), random("v", &keys)];
        compare(&format!("attention {heads}x{width} {tokens} {own} {mask:?}"), &inputs, |t| {
            ops::attention(&t[0], (&t[1], &t[2]), None, heads, mask)
        })?;
    }
    Ok(())
}

#[test]
fn attention_in_the_deterministic_mode_equals_the_cpu() -> Result<()> {
    cuda::set_deterministic(true);
    for (heads, width, tokens, own, reference) in
        [(2, 64, 200, 200, None), (1, 64, 300, 77, None), (2, 64, 130, 130, Some(70)), (2, 128, 70, 70, None)]
    {
        let channels = heads * width;
        let keys = [2, own, channels];
        let mut inputs = vec![random("q", &[2, tokens, channels]), random("k", &keys), random("v", &keys)];
        if let Some(reference) = reference {
            let keys = [2, reference, channels];
            inputs.extend([random("k2", &keys), random("v2", &keys)]);
        }
        compare(&format!("deterministic attention {heads}x{width} {tokens} {own} {reference:?}"), &inputs, |t| {
            ops::attention(&t[0], (&t[1], &t[2]), t.get(3).zip(t.get(4)), heads, Mask::None)
        })?;
    }
    cuda::set_deterministic(false);
    Ok(())
}

#[test]
fn packed_self_attention_equals_the_cpu() -> Result<()> {
    for (heads, width, tokens, reference) in [(2, 64, 200, 70), (3, 16, 40, 40)] {
        let channels = heads * width;
        let inputs = [
            random("qkv", &[2, tokens, 3 * channels]),
            random("k2", &[2, reference, channels]),
            random("v2", &[2, reference, channels]),
        ];
        compare(&format!("packed attention {heads}x{width} {tokens}+{reference}"), &inputs, |t| {
            ops::attention_packed(&t[0], Some((&t[1], &t[2])), Some(&[true, false]), heads)
        })?;
        compare(&format!("packed attention {heads}x{width} {tokens}"), &inputs[..1], |t| {
            ops::attention_packed(&t[0], None, None, heads)
        })?;
    }
    Ok(())
}

#[test]
fn attention_over_wide_heads_equals_the_cpu() -> Result<()> {
    for (heads, width, tokens, own, reference, mask) in [
        (1, 512, 70, 70, None, Mask::None),
        (2, 264, 33, 40, None, Mask::None),
        (1, 320, 24, 24, None, Mask::Causal),
        (2, 272, 30, 20, Some((2, 16)), Mask::None),
        (1, 512, 30, 20, Some((1, 40)), Mask::None),
    ] {
        let channels = heads * width;
        let mut inputs = vec![
            random("q", &[2, tokens, channels]),
            random("k", &[2, own, channels]),
            random("v", &[2, own, channels]),
        ];
        if let Some((batch, tokens)) = reference {
            inputs.extend([random("k2", &[batch, tokens, channels]), random("v2", &[batch, tokens, channels])]);
        }
        let name = format!("attention {heads}x{width} {tokens} {own} {reference:?} {mask:?}");
        compare(&name, &inputs, |t| ops::attention(&t[0], (&t[1], &t[2]), t.get(3).zip(t.get(4)), heads, mask))?;
    }
    Ok(())
}

#[test]
fn attention_without_the_reference_in_some_samples_equals_the_cpu() -> Result<()> {
    for (heads, width) in [(2, 64), (3, 16), (1, 320)] {
        let channels = heads * width;
        let inputs = [
            random("q", &[3, 40, channels]),
            random("k", &[3, 40, channels]),
            random("v", &[3, 40, channels]),
            random("k2", &[3, 24, channels]),
            random("v2", &[3, 24, channels]),
        ];
        compare(&format!("attention_where {heads}x{width}"), &inputs, |t| {
            ops::attention_where(&t[0], (&t[1], &t[2]), (&t[3], &t[4]), &[true, false, true], heads)
        })?;
    }
    Ok(())
}

//! A shuffled order that is computed, not stored.

use rand::Rng;

use crate::random::Address;

/// Where place `position` of `0..count` goes in a random permutation that the address decides.
///
/// A Feistel network of four rounds permutes the next power of four; walking its cycle until a number below `count`
/// comes up restricts it to `0..count`. So one place costs no memory and does not need the others.
pub(super) fn shuffled(address: Address, position: usize, count: usize) -> usize {
    if count < 2 {
        return 0;
    }
    let bits = (usize::BITS - (count - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << bits) - 1;
    let mut rng = address.rng();
    let keys: [u64; 4] = [rng.random(), rng.random(), rng.random(), rng.random()];
    let mut value = (position % count) as u64;
    loop {
        let (mut left, mut right) = (value >> bits, value & mask);
        for key in keys {
            let mut mixed = (right ^ key).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (left, right) = (right, left ^ ((mixed >> 32) & mask));
        }
        value = (left << bits) | right;
        if value < count as u64 {
            return value as usize;
        }
    }
}

//! The threads that networks run on: room for candle's recursion, and no way from thread to thread for every operation.

use std::cell::Cell;
use std::sync::OnceLock;

use candle_core::Device;

use super::{leaves, tape};
use crate::{Error, Result};

/// Bytes of address space; only what is touched takes memory.
const STACK: usize = 512 << 20;

thread_local! {
    static IS_LARGE: Cell<bool> = const { Cell::new(false) };
}

/// Threads of rayon's with large stacks, as many as it has by default, made at first use.
fn pool() -> Result<&'static rayon::ThreadPool> {
    static POOL: OnceLock<rayon::ThreadPool> = OnceLock::new();
    if let Some(pool) = POOL.get() {
        return Ok(pool);
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(rayon::current_num_threads())
        .thread_name(|index| format!("lcm-lookahead-{index}"))
        .stack_size(STACK)
        .start_handler(|_| IS_LARGE.set(true))
        .build()
        .map_err(|error| Error::io("start a thread", "(this process)")(std::io::Error::other(error)))?;
    Ok(POOL.get_or_init(|| pool))
}

/// Runs a closure on a thread with a stack of 512 MiB (of address space: only what is touched takes memory).
///
/// candle walks a graph, and drops one, by recursion as deep as the graph: the main thread's stack overflows on a
/// U-Net. Whatever builds, differentiates or drops a training graph belongs inside.
///
/// The thread is one of a pool of rayon's, so that operations on the CPU divide their work without handing all of it to
/// another thread first.
///
/// # Errors
/// The closure's own, and [`Error::Io`] where no thread could be started. A panic of the closure is passed on.
pub fn with_large_stack<T: Send>(run: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    match IS_LARGE.get() {
        true => run(),
        false => pool()?.install(|| alone(run)),
    }
}

/// Runs a closure on one of rayon's threads where it computes on the CPU, for the same reason.
pub(crate) fn on_pool<T: Send>(device: &Device, run: impl FnOnce() -> T + Send) -> T {
    // What frames of a tape are about is on this thread.
    if !device.is_cpu() || rayon::current_thread_index().is_some() || tape::has_frames() {
        return run();
    }
    rayon::scope(|_| alone(run))
}

/// Runs what came to this thread from another one. While it waits, a thread of the pool may begin with such work: what the
/// thread is recording for itself, on a tape or of gradients, is not about that.
fn alone<T>(run: impl FnOnce() -> T) -> T {
    tape::apart(|| leaves::suspended(run))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradients;

    #[test]
    fn work_of_another_thread_does_not_hand_its_gradients_to_this_one() -> Result<()> {
        let none = gradients(|| {
            assert!(leaves::active());
            assert!(!alone(leaves::active));
            assert!(leaves::active());
            Ok(None)
        })?;
        assert!(none.is_none());
        Ok(())
    }
}

//! Room for candle's recursion.

use crate::{Error, Result};

/// Runs a closure on a thread with a stack of 512 MiB (of address space: only what is touched takes memory).
///
/// candle walks a graph, and drops one, by recursion as deep as the graph: the main thread's stack overflows on a
/// U-Net. Whatever builds, differentiates or drops a training graph belongs inside.
///
/// # Errors
/// The closure's own, and [`Error::Io`] where no thread could be started. A panic of the closure is passed on.
pub fn with_large_stack<T: Send>(run: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("lcm-lookahead".into())
            .stack_size(512 << 20)
            .spawn_scoped(scope, run)
            .map_err(Error::io("start a thread", "(this process)"))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

//! Data-parallel work on the cores of one machine.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::{Error, Result};

/// Stack of a worker, of which only what is touched takes memory: candle walks graphs by recursion.
const STACK: usize = 256 << 20;

/// Threads that each compute alone: operations inside a worker run on its thread only. On small networks that is much
/// faster than to split every operation over all cores.
pub struct Workers {
    pools: Vec<ThreadPool>,
}

impl Workers {
    /// This many workers, at least one.
    ///
    /// # Errors
    /// [`Error::Io`] where a thread cannot be started.
    pub fn new(count: usize) -> Result<Self> {
        let pool = |index: usize| {
            let name = move |_| format!("worker {index}");
            ThreadPoolBuilder::new().num_threads(1).stack_size(STACK).thread_name(name).build().map_err(|error| {
                Error::io("start a thread", "(this process)")(std::io::Error::other(error.to_string()))
            })
        };
        Ok(Workers { pools: (0..count.max(1)).map(pool).collect::<Result<_>>()? })
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.pools.len()
    }

    /// Runs a function once on every worker, with the worker's index; the results in the order of the workers.
    ///
    /// # Errors
    /// The first error of a worker.
    pub fn run<T: Send>(&self, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
        let work = &work;
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                self.pools.iter().enumerate().map(|(i, pool)| scope.spawn(move || pool.install(|| work(i)))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        })
    }

    /// Runs a function over `0..items` in pieces of at most `piece` items, each on whichever worker is free; the results
    /// in the order of the pieces.
    ///
    /// # Errors
    /// The first error of a worker.
    pub fn map<T: Send>(
        &self,
        items: usize,
        piece: usize,
        work: impl Fn(Range<usize>) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let (piece, next, done) = (piece.max(1), AtomicUsize::new(0), Mutex::new(Vec::new()));
        self.run(|_| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let start = index * piece;
                if start >= items {
                    return Ok(());
                }
                let result = work(start..(start + piece).min(items))?;
                done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((index, result));
            }
        })?;
        let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        done.sort_by_key(|(index, _)| *index);
        Ok(done.into_iter().map(|(_, result)| result).collect())
    }
}

/// The part of `0..total` that belongs to one of `count` workers: parts differ by at most one item.
pub(super) fn share(total: usize, worker: usize, count: usize) -> Range<usize> {
    total * worker / count..total * (worker + 1) / count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_back_in_order_and_every_item_once() -> Result<()> {
        let workers = Workers::new(3)?;
        let pieces = workers.map(10, 3, |range| Ok(range.collect::<Vec<_>>()))?;
        assert_eq!(pieces, [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7, 8], vec![9]]);
        Ok(())
    }

    #[test]
    fn a_worker_computes_alone() -> Result<()> {
        assert_eq!(Workers::new(2)?.run(|_| Ok(rayon::current_num_threads()))?, [1, 1]);
        Ok(())
    }

    #[test]
    fn shares_cover_everything_once() {
        let all: Vec<usize> = (0..3).flat_map(|worker| share(8, worker, 3)).collect();
        assert_eq!(all, (0..8).collect::<Vec<_>>());
    }
}

//! The thread's stack of frames.

use std::cell::RefCell;

use candle_core::{Tensor, TensorId};

use super::Discovery;
use super::discovery::Kept;
use super::recording::Tape;

/// What [`apply`](crate::autograd::apply) does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::autograd) enum Mode {
    /// Builds candle's graph.
    Graph,
    /// Builds none, and collects the variables.
    Discover,
    /// Makes notes on a tape.
    Record,
}

enum Frame {
    Graph,
    Discover(Discovery),
    Record(Tape),
}

thread_local! {
    static FRAMES: RefCell<Vec<Frame>> = const { RefCell::new(Vec::new()) };
}

/// Takes frames off again, also where a panic passes through.
struct Depth(usize);

impl Drop for Depth {
    fn drop(&mut self) {
        // What the frames hold is dropped after the borrow: dropping tensors may run code of others.
        let rest = FRAMES.with(|frames| {
            let mut frames = frames.borrow_mut();
            let depth = self.0.min(frames.len());
            frames.split_off(depth)
        });
        drop(rest);
    }
}

fn run<T>(frame: Frame, segment: impl FnOnce() -> T) -> (T, Option<Frame>) {
    let depth = FRAMES.with(|frames| {
        let mut frames = frames.borrow_mut();
        frames.push(frame);
        Depth(frames.len() - 1)
    });
    let result = segment();
    let frame = FRAMES.with(|frames| frames.borrow_mut().pop());
    drop(depth);
    (result, frame)
}

/// Whether there are frames on this thread.
pub(in crate::autograd) fn has_frames() -> bool {
    FRAMES.with(|frames| !frames.borrow().is_empty())
}

/// Runs code that has nothing to do with what this thread was doing.
pub(in crate::autograd) fn apart<T>(run: impl FnOnce() -> T) -> T {
    struct Restore(Vec<Frame>);
    impl Drop for Restore {
        fn drop(&mut self) {
            let rest = FRAMES.with(|frames| frames.replace(std::mem::take(&mut self.0)));
            drop(rest);
        }
    }
    let _restore = Restore(FRAMES.with(RefCell::take));
    run()
}

/// What the topmost frame says.
pub(in crate::autograd) fn mode() -> Mode {
    FRAMES.with(|frames| match frames.borrow().last() {
        None | Some(Frame::Graph) => Mode::Graph,
        Some(Frame::Discover(_)) => Mode::Discover,
        Some(Frame::Record(_)) => Mode::Record,
    })
}

/// Runs code whose operations are none of the frames' business: the inside of a function.
pub(in crate::autograd) fn outside<T>(run_it: impl FnOnce() -> T) -> T {
    match mode() {
        Mode::Graph => run_it(),
        _ => run(Frame::Graph, run_it).0,
    }
}

/// Runs a segment in a discovery.
pub(in crate::autograd) fn run_discovery<T>(discovery: Discovery, segment: impl FnOnce() -> T) -> (T, Discovery) {
    match run(Frame::Discover(discovery), segment) {
        (result, Some(Frame::Discover(discovery))) => (result, discovery),
        // Frames are pushed and popped in pairs, so the frame is the one pushed above.
        _ => unreachable!("the frame on top is the discovery's"),
    }
}

/// Runs a segment on a tape.
pub(super) fn run_tape<T>(tape: Tape, segment: impl FnOnce() -> T) -> (T, Tape) {
    match run(Frame::Record(tape), segment) {
        (result, Some(Frame::Record(tape))) => (result, tape),
        // As above.
        _ => unreachable!("the frame on top is the tape's"),
    }
}

/// The discovery on top, if it is one. Nothing that uses the frames may be called inside.
pub(super) fn with_discovery<T>(change: impl FnOnce(&mut Discovery) -> T) -> Option<T> {
    FRAMES.with(|frames| match frames.borrow_mut().last_mut() {
        Some(Frame::Discover(discovery)) => Some(change(discovery)),
        _ => None,
    })
}

/// The tape on top, if it is one. Nothing that uses the frames may be called inside.
pub(super) fn with_tape<T>(change: impl FnOnce(&mut Tape) -> T) -> Option<T> {
    FRAMES.with(|frames| match frames.borrow_mut().last_mut() {
        Some(Frame::Record(tape)) => Some(change(tape)),
        _ => None,
    })
}

/// Whether a tape further down has a tensor: for what is above, that tensor is a leaf.
pub(super) fn is_on_some_tape(id: TensorId) -> bool {
    FRAMES.with(|frames| frames.borrow().iter().any(|frame| matches!(frame, Frame::Record(tape) if tape.has(id))))
}

/// The next value kept by the first run of the segment now run again, for a function and its inputs.
///
/// The tape that has them is the topmost one, or the next below where a segment inside it is being discovered.
pub(super) fn next_kept(name: &'static str, inputs: &[Tensor]) -> Option<crate::Result<Kept>> {
    FRAMES.with(|frames| {
        for frame in frames.borrow_mut().iter_mut().rev() {
            match frame {
                Frame::Graph => return None,
                Frame::Discover(_) => {}
                Frame::Record(tape) => return tape.kept.pop_front().map(|kept| kept.check(name, inputs)),
            }
        }
        None
    })
}

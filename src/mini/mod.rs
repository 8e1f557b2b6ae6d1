//! The miniature: a small but complete instance of the method, and the procedural portraits it is trained on.

pub mod portrait;

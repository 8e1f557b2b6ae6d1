//! What data sets promise.

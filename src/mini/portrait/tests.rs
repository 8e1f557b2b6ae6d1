//! What portraits promise.

use super::*;

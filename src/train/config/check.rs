//! Range checks whose errors name the field.

use std::fmt::Display;
use std::ops::RangeInclusive;

use crate::{Error, Result};

/// Checks fields of one table of the configuration.
pub(super) struct Checker<'a> {
    source_name: &'a str,
    prefix: &'static str,
}

impl<'a> Checker<'a> {
    /// For the table whose fields' full names start with `prefix` (`"optimizer."`; empty for the top).
    pub(super) fn new(source_name: &'a str, prefix: &'static str) -> Self {
        Checker { source_name, prefix }
    }

    /// The same source, another table.
    pub(super) fn within(&self, prefix: &'static str) -> Checker<'a> {
        Checker { source_name: self.source_name, prefix }
    }

    /// Fails unless `holds`. The other checks are cases of this one.
    pub(super) fn require(&self, field: &str, holds: bool, expected: &str, found: impl Display) -> Result<()> {
        if holds {
            return Ok(());
        }
        Err(Error::Config {
            source_name: self.source_name.to_string(),
            field: format!("{}{field}", self.prefix),
            reason: format!("expected {expected}, found {found}"),
        })
    }

    /// A whole number or count that has a smallest value.
    pub(super) fn at_least<T: PartialOrd + Display>(&self, field: &str, value: T, least: T) -> Result<()> {
        let expected = format!("at least {least}");
        self.require(field, value >= least, &expected, value)
    }

    /// A whole number or count that has a largest value.
    pub(super) fn at_most<T: PartialOrd + Display>(&self, field: &str, value: T, most: T) -> Result<()> {
        let expected = format!("at most {most}");
        self.require(field, value <= most, &expected, value)
    }

    /// A number within a closed range; never NaN.
    pub(super) fn within_range(&self, field: &str, value: f64, range: RangeInclusive<f64>) -> Result<()> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        self.require(field, range.contains(&value), &expected, value)
    }

    /// A number in `[0, 1)`.
    pub(super) fn below_one(&self, field: &str, value: f64) -> Result<()> {
        self.require(field, (0.0..1.0).contains(&value), "a number from 0 to below 1", value)
    }

    /// A finite number that is not negative.
    pub(super) fn not_negative(&self, field: &str, value: f64) -> Result<()> {
        self.require(field, value.is_finite() && value >= 0.0, "a finite number, not negative", value)
    }

    /// A finite number above zero.
    pub(super) fn positive(&self, field: &str, value: f64) -> Result<()> {
        self.require(field, value.is_finite() && value > 0.0, "a finite number above 0", value)
    }
}

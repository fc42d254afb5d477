//! Histograms with classic and native buckets as plain values, and how they are shown to Prometheus.
//!
//! The arithmetic is pure: [`Tally`] and [`Counter`] are states that a fold keeps, compares and saves; the constants of a family
//! ([`HistogramFamily`], [`CounterFamily`]) are handed in. What is shown goes through the prometheus crate's own messages, so that
//! one registry and one page hold these series beside the crate's ordinary metrics.

mod accept;
mod bounds;
mod buckets;
mod exposition;
mod index;
mod options;
mod series;
mod tally;
mod wire;

pub use accept::{Format, encode};
pub use buckets::Buckets;
pub use exposition::{CounterFamily, HistogramFamily};
pub use options::{BucketOptions, DEFAULT_ZERO_THRESHOLD, NativeOptions};
pub use series::{Counter, Series};
pub use tally::Tally;

#[cfg(test)]
mod decoded;
#[cfg(test)]
mod vectors;

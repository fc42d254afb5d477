//! Histograms with classic and native buckets as plain values, and their exposition to Prometheus.
//!
//! The arithmetic is pure. [`Tally`] and [`Counter`] are states that a fold compares and saves;
//! callers pass the constants of a family ([`HistogramFamily`], [`CounterFamily`]). The exposition
//! uses the prometheus crate's own messages, so one page can contain these series and ordinary
//! metrics.

mod accept;
mod bounds;
mod exposition;
mod index;
mod options;
mod series;

pub use accept::Format;
pub use exposition::{CounterFamily, HistogramFamily, encode};
pub use options::{BucketOptions, DEFAULT_ZERO_THRESHOLD, NativeOptions};
pub use series::{Buckets, Counter, Series, SeriesIter, Tally};

#[cfg(test)]
mod decoded;
#[cfg(test)]
mod vectors;

//! Series of a metrics state, for comparison.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::metrics::{Buckets, Counter, Tally};
use crate::stages::{CLAIM_SECONDS, CREATION_SECONDS, CREATIONS, MetricsState, NEGATIVE_DURATIONS};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SeriesKey {
    pub deployment: Uuid,
    pub family: &'static str,
    /// Names and values, in the order of the family.
    pub labels: Vec<(&'static str, String)>,
}

/// The whole state of a series.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Series<'a> {
    Counter(&'a Counter),
    Histogram(&'a Tally),
}

impl Series<'_> {
    /// The value of a counter, or the number of observations of a histogram.
    pub fn count(self) -> u64 {
        match self {
            Series::Counter(counter) => counter.value,
            Series::Histogram(tally) => tally.buckets.count,
        }
    }

    /// The sum of a histogram in microseconds; `None` for a counter.
    pub fn sum_micros(self) -> Option<i128> {
        match self {
            Series::Counter(_) => None,
            Series::Histogram(tally) => Some(tally.sum_micros),
        }
    }

    /// Whether a metrics server would treat the change to `other` as a restart.
    pub fn falls_to(self, other: Series<'_>) -> bool {
        let sum_falls = matches!((self.sum_micros(), other.sum_micros()), (Some(before), Some(after)) if after < before);
        let buckets_fall = match (self, other) {
            (Series::Histogram(before), Series::Histogram(after)) => {
                buckets_fall(&before.buckets, &after.buckets)
            }
            _ => false,
        };
        other.count() < self.count() || sum_falls || buckets_fall
    }
}

fn buckets_fall(before: &Buckets, after: &Buckets) -> bool {
    let bucket_falls =
        |(index, count): (&i32, &u64)| after.positive.get(index).copied().unwrap_or(0) < *count;
    before.schema != after.schema
        || after.zero_count < before.zero_count
        || before.positive.iter().any(bucket_falls)
}

pub(super) fn series(state: &MetricsState) -> BTreeMap<SeriesKey, Series<'_>> {
    let mut found = BTreeMap::new();
    for (deployment, metrics) in state.deployments() {
        let mut add = |family, names: &[&'static str], values: &[String], series| {
            let labels = names.iter().copied().zip(values.iter().cloned()).collect();
            found.insert(SeriesKey { deployment, family, labels }, series);
        };
        for (labels, counter) in &metrics.creations {
            add(CREATIONS.name, &CREATIONS.labels, labels, Series::Counter(counter));
        }
        for (labels, counter) in &metrics.negative_durations {
            add(
                NEGATIVE_DURATIONS.name,
                &NEGATIVE_DURATIONS.labels,
                labels,
                Series::Counter(counter),
            );
        }
        for (labels, tally) in &metrics.creation_seconds {
            add(CREATION_SECONDS.name, &CREATION_SECONDS.labels, labels, Series::Histogram(tally));
        }
        for (labels, tally) in &metrics.claim_seconds {
            add(CLAIM_SECONDS.name, &CLAIM_SECONDS.labels, labels, Series::Histogram(tally));
        }
    }
    found
}

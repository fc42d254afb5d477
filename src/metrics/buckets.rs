//! Counts of classic and native buckets.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::index::{MIN_SCHEMA, bucket_index, coarser};
use super::options::{BucketOptions, NativeOptions};

/// The counts of one histogram of values from 0 up. The owner keeps the sum of the values.
///
/// With native buckets, count = zero count + all native buckets + NaNs, at any time. Otherwise
/// Prometheus refuses a whole scrape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Buckets {
    /// When the series began.
    pub created: DateTime<Utc>,
    /// Number of counted values.
    pub count: u64,
    /// Count of each classic bucket alone, not cumulative.
    pub(super) classic: Vec<u64>,
    /// Current resolution of the native buckets.
    pub schema: i8,
    /// Count of the native zero bucket.
    pub zero_count: u64,
    /// Non-empty native buckets by index.
    pub positive: BTreeMap<i32, u64>,
}

impl Buckets {
    #[must_use]
    pub fn new(options: &BucketOptions, created: DateTime<Utc>) -> Self {
        Self {
            created,
            count: 0,
            classic: vec![0; options.classic_bounds().len()],
            schema: options.native().map_or(0, |native| native.initial_schema()),
            zero_count: 0,
            positive: BTreeMap::new(),
        }
    }

    /// Counts one value (seconds for durations; from 0 to infinity, or NaN). Limits the native
    /// buckets like the Go client: at most one halving per value, so buckets beyond the limit may
    /// remain until the next value.
    ///
    /// # Panics
    /// If these counts have another number of classic bounds.
    pub fn observe(&mut self, options: &BucketOptions, value: f64) {
        self.count += 1;
        let bounds = options.classic_bounds();
        assert_eq!(self.classic.len(), bounds.len(), "these counts have other classic bounds");
        // NaN is not below any bound. It is only in +Inf, which is the count itself.
        if let Some(bucket) = bounds.iter().position(|bound| value <= *bound) {
            self.classic[bucket] += 1;
        }
        if let Some(native) = options.native()
            && !value.is_nan()
        {
            self.observe_native(native, value);
        }
    }

    fn observe_native(&mut self, native: &NativeOptions, value: f64) {
        if value > native.zero_threshold {
            *self.positive.entry(bucket_index(value, self.schema)).or_default() += 1;
        } else {
            self.zero_count += 1;
        }
        if native.max_buckets > 0
            && self.positive.len() > native.max_buckets
            && self.schema > MIN_SCHEMA
        {
            self.halve_resolution();
        }
    }

    /// Merges pairs of neighbours. A server continues its rates across this.
    fn halve_resolution(&mut self) {
        self.schema -= 1;
        for (index, count) in std::mem::take(&mut self.positive) {
            *self.positive.entry(coarser(index, 1)).or_default() += count;
        }
    }

    /// The classic buckets for exposition: upper bound and cumulative count, without `+Inf`.
    pub fn cumulative(&self, options: &BucketOptions) -> impl Iterator<Item = (f64, u64)> {
        assert_eq!(
            self.classic.len(),
            options.classic_bounds().len(),
            "these counts have other classic bounds"
        );
        options.classic_bounds().iter().zip(&self.classic).scan(0, |up_to, (bound, count)| {
            *up_to += count;
            Some((*bound, *up_to))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::metrics::NativeOptions;

    const OPTIONS: BucketOptions =
        BucketOptions::new(&[1.0, 10.0, 60.0], Some(NativeOptions::NEVER_RESET));

    fn observed(options: &BucketOptions, values: &[f64]) -> Buckets {
        let mut buckets = Buckets::new(options, DateTime::UNIX_EPOCH);
        for value in values {
            buckets.observe(options, *value);
        }
        buckets
    }

    fn native_total(buckets: &Buckets) -> u64 {
        buckets.zero_count + buckets.positive.values().sum::<u64>()
    }

    #[test]
    fn a_value_on_a_classic_bound_counts_within_it() {
        let buckets = observed(&OPTIONS, &[1.0, 1.0_f64.next_up(), 60.0, 61.0]);
        assert_eq!(
            buckets.cumulative(&OPTIONS).collect::<Vec<_>>(),
            [(1.0, 1), (10.0, 2), (60.0, 3)]
        );
        assert_eq!(buckets.count, 4);
    }

    #[test]
    fn zero_counts_in_the_zero_bucket() {
        let buckets = observed(&OPTIONS, &[0.0, 0.0]);
        assert_eq!((buckets.zero_count, buckets.positive.len()), (2, 0));
        assert_eq!(buckets.cumulative(&OPTIONS).next(), Some((1.0, 2)));
    }

    #[test]
    fn not_a_number_counts_in_no_bucket() {
        let buckets = observed(&OPTIONS, &[f64::NAN]);
        assert_eq!((buckets.count, native_total(&buckets)), (1, 0));
        assert!(buckets.cumulative(&OPTIONS).all(|(_, count)| count == 0));
    }

    #[test]
    #[should_panic(expected = "other classic bounds")]
    fn counts_with_other_bounds_are_refused() {
        let mut buckets = Buckets::new(&BucketOptions::new(&[1.0], None), DateTime::UNIX_EPOCH);
        buckets.observe(&OPTIONS, 1.0);
    }

    #[test]
    fn a_histogram_beyond_its_limit_only_ever_loses_resolution() {
        let mut buckets = Buckets::new(&OPTIONS, DateTime::UNIX_EPOCH);
        let mut schema = buckets.schema;
        for step in 0..2000 {
            // 20 decades: far more than 100 buckets at schema 3.
            buckets.observe(&OPTIONS, 10_f64.powf(f64::from(step) / 100.0 - 10.0));
            assert!(buckets.schema <= schema);
            assert!(buckets.positive.len() <= 100);
            schema = buckets.schema;
        }
        assert_eq!(buckets.count, 2000);
        assert_eq!(native_total(&buckets), 2000);
        // 20 decades are 66.4 powers of two: 532 buckets at schema 3, 67 at schema 0.
        assert_eq!(schema, 0);
    }

    fn from_zero() -> impl Strategy<Value = f64> {
        use prop::num::f64::{INFINITE, NORMAL, POSITIVE, SUBNORMAL, ZERO};
        POSITIVE | NORMAL | SUBNORMAL | ZERO | INFINITE
    }

    proptest! {
        #[test]
        fn all_buckets_together_hold_every_value(values in prop::collection::vec(from_zero(), 0..400)) {
            let buckets = observed(&OPTIONS, &values);
            prop_assert_eq!(buckets.count, values.len() as u64);
            prop_assert_eq!(native_total(&buckets), values.len() as u64);
        }

        #[test]
        fn a_state_comes_back_from_json_bit_for_bit(
            values in prop::collection::vec(from_zero(), 0..200),
        ) {
            let buckets = observed(&OPTIONS, &values);
            let back: Buckets = serde_json::from_str(&serde_json::to_string(&buckets).unwrap()).unwrap();
            prop_assert_eq!(back, buckets);
        }
    }
}

//! How many values fell into which bucket, classic and native.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::index::bucket_index;
use super::options::BucketOptions;

/// The counts of one histogram; the sum of the values is its owner's.
///
/// With native buckets, count = zero count + all native buckets + NaNs, at any time: Prometheus refuses a whole scrape otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Buckets {
    /// Since when this counts: creation or latest start over.
    pub(super) created: DateTime<Utc>,
    /// When to start over, where the limit strategy has scheduled that.
    pub(super) reset_at: Option<DateTime<Utc>>,
    pub(super) count: u64,
    /// One per classic bound, each on its own: not cumulative.
    pub(super) classic: Vec<u64>,
    pub(super) schema: i8,
    #[serde(with = "exact")]
    pub(super) zero_threshold: f64,
    pub(super) zero_count: u64,
    /// Native buckets by index; none is empty.
    pub(super) positive: BTreeMap<i32, u64>,
    /// Of the negated values.
    pub(super) negative: BTreeMap<i32, u64>,
}

/// Whether a histogram went on counting or started over; whoever keeps the sum starts over with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "the sum has to start over with the counts"]
pub enum Counting {
    /// The counts went on.
    Continued,
    /// The counts were cleared first.
    StartedOver,
}

impl Buckets {
    /// No values yet.
    #[must_use]
    pub fn new(options: &BucketOptions, created: DateTime<Utc>) -> Self {
        Self {
            created,
            reset_at: None,
            count: 0,
            classic: vec![0; options.classic_bounds().len()],
            schema: options.native().map_or(0, |native| native.initial_schema()),
            zero_threshold: options.native().map_or(0.0, |native| native.zero_threshold),
            zero_count: 0,
            positive: BTreeMap::new(),
            negative: BTreeMap::new(),
        }
    }

    /// Counts one value (seconds for durations; NaN and infinities too) and keeps the limit on native buckets.
    ///
    /// # Panics
    /// If these counts were begun with another number of classic bounds.
    pub fn observe(&mut self, options: &BucketOptions, value: f64, now: DateTime<Utc>) -> Counting {
        let counting = self.reset_if_due(options, now);
        self.add(options, value);
        if let Some(native) = options.native()
            && self.must_start_over(native, value, now)
        {
            *self = Self::new(options, now);
            self.add(options, value);
            return Counting::StartedOver;
        }
        counting
    }

    /// Starts over if a scheduled reset is due. Call before showing, for families that reset at all.
    pub fn reset_if_due(&mut self, options: &BucketOptions, now: DateTime<Utc>) -> Counting {
        match self.reset_at {
            Some(at) if at <= now => {
                *self = Self::new(options, at);
                Counting::StartedOver
            }
            _ => Counting::Continued,
        }
    }

    fn add(&mut self, options: &BucketOptions, value: f64) {
        self.count += 1;
        let bounds = options.classic_bounds();
        assert_eq!(self.classic.len(), bounds.len(), "counted with other classic bounds");
        // NaN is below no bound: it only counts in +Inf, which is the count itself.
        if let Some(bucket) = bounds.iter().position(|bound| value <= *bound) {
            self.classic[bucket] += 1;
        }
        if options.native().is_some() {
            self.add_native(value);
        }
    }

    fn add_native(&mut self, value: f64) {
        if value > self.zero_threshold {
            *self.positive.entry(bucket_index(value, self.schema)).or_default() += 1;
        } else if value < -self.zero_threshold {
            *self.negative.entry(bucket_index(-value, self.schema)).or_default() += 1;
        } else if !value.is_nan() {
            self.zero_count += 1;
        }
    }

    /// How many values were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Since when this counts: creation or latest start over.
    #[must_use]
    pub fn created(&self) -> DateTime<Utc> {
        self.created
    }

    /// The classic buckets as they are shown: upper bound and count of all values up to it, without `+Inf`.
    pub fn cumulative(&self, options: &BucketOptions) -> impl Iterator<Item = (f64, u64)> {
        assert_eq!(self.classic.len(), options.classic_bounds().len(), "counted with other classic bounds");
        options.classic_bounds().iter().zip(&self.classic).scan(0, |up_to, (bound, count)| {
            *up_to += count;
            Some((*bound, *up_to))
        })
    }

    /// The resolution of the native buckets now.
    #[must_use]
    pub fn schema(&self) -> i8 {
        self.schema
    }

    /// The native zero bucket now: values within ± this.
    #[must_use]
    pub fn zero_threshold(&self) -> f64 {
        self.zero_threshold
    }

    /// How many values are in the native zero bucket.
    #[must_use]
    pub fn zero_count(&self) -> u64 {
        self.zero_count
    }

    /// The native buckets of positive values by index, none of them empty.
    #[must_use]
    pub fn positive(&self) -> &BTreeMap<i32, u64> {
        &self.positive
    }

    /// The native buckets of negative values by the index of their absolute values, none of them empty.
    #[must_use]
    pub fn negative(&self) -> &BTreeMap<i32, u64> {
        &self.negative
    }
}

/// A double as its shortest decimal in a string: numbers in JSON come back one unit off now and then, and a state must not.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{value:e}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::metrics::NativeOptions;

    const OPTIONS: BucketOptions = BucketOptions::new(&[1.0, 10.0, 60.0], Some(NativeOptions::NEVER_RESET));

    fn observed(options: &BucketOptions, values: &[f64]) -> Buckets {
        let mut buckets = Buckets::new(options, DateTime::UNIX_EPOCH);
        for value in values {
            assert_eq!(buckets.observe(options, *value, DateTime::UNIX_EPOCH), Counting::Continued);
        }
        buckets
    }

    fn native_total(buckets: &Buckets) -> u64 {
        buckets.zero_count + buckets.positive.values().sum::<u64>() + buckets.negative.values().sum::<u64>()
    }

    #[test]
    fn a_value_on_a_classic_bound_counts_within_it() {
        let buckets = observed(&OPTIONS, &[1.0, 1.0_f64.next_up(), 60.0, 61.0]);
        assert_eq!(buckets.cumulative(&OPTIONS).collect::<Vec<_>>(), [(1.0, 1), (10.0, 2), (60.0, 3)]);
        assert_eq!(buckets.count(), 4);
    }

    #[test]
    fn zero_counts_in_the_zero_bucket_and_a_negative_value_in_a_negative_one() {
        let buckets = observed(&OPTIONS, &[0.0, -0.0, -1.0]);
        assert_eq!((buckets.zero_count, buckets.positive.len()), (2, 0));
        assert_eq!(buckets.negative, BTreeMap::from([(0, 1)]));
        assert_eq!(buckets.cumulative(&OPTIONS).next(), Some((1.0, 3)));
    }

    #[test]
    fn not_a_number_counts_in_no_bucket() {
        let buckets = observed(&OPTIONS, &[f64::NAN]);
        assert_eq!((buckets.count, native_total(&buckets)), (1, 0));
        assert!(buckets.cumulative(&OPTIONS).all(|(_, count)| count == 0));
    }

    #[test]
    #[should_panic(expected = "other classic bounds")]
    fn counts_begun_with_other_bounds_are_not_gone_on_with() {
        let mut buckets = Buckets::new(&BucketOptions::new(&[1.0], None), DateTime::UNIX_EPOCH);
        let _ = buckets.observe(&OPTIONS, 1.0, DateTime::UNIX_EPOCH);
    }

    proptest! {
        #[test]
        fn all_buckets_together_hold_every_value(values in prop::collection::vec(prop::num::f64::ANY, 0..400)) {
            let buckets = observed(&OPTIONS, &values);
            let numbers = values.iter().filter(|value| !value.is_nan()).count();
            prop_assert_eq!(buckets.count, values.len() as u64);
            prop_assert_eq!(native_total(&buckets), numbers as u64);
        }

        #[test]
        fn a_state_comes_back_from_json_bit_for_bit(
            values in prop::collection::vec(prop::num::f64::NORMAL, 0..200),
            threshold in 0.0..1e-3,
        ) {
            let options = BucketOptions::new(&[0.5], Some(NativeOptions {
                zero_threshold: threshold, max_zero_threshold: 1e3, ..NativeOptions::NEVER_RESET
            }));
            let buckets = observed(&options, &values);
            let back: Buckets = serde_json::from_str(&serde_json::to_string(&buckets).unwrap()).unwrap();
            prop_assert_eq!(back.zero_threshold.to_bits(), buckets.zero_threshold.to_bits());
            prop_assert_eq!(back, buckets);
        }
    }
}

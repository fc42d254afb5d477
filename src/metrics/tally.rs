//! A histogram of durations whose state does not depend on the order of its observations.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::buckets::Buckets;
use super::options::BucketOptions;

const MICROS_PER_SECOND: f64 = 1e6;

/// The state of one histogram series of durations. It consists of plain numbers and survives JSON
/// unchanged.
///
/// The sum is in whole microseconds, because a sum of doubles depends on the order of its terms.
/// Any order of the same observations gives an equal state while the limit on native buckets is not
/// exceeded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tally {
    /// Number of observations, and their buckets.
    pub buckets: Buckets,
    /// Wide enough for any number of observations.
    pub sum_micros: i128,
}

impl Tally {
    #[must_use]
    pub fn new(options: &BucketOptions, created: DateTime<Utc>) -> Self {
        Self { buckets: Buckets::new(options, created), sum_micros: 0 }
    }

    /// Observes one duration in microseconds.
    pub fn observe_micros(&mut self, options: &BucketOptions, micros: u64) {
        // Exact below 2^53 microseconds (285 years), and correctly rounded: 100,000 microseconds
        // give the double 0.1.
        self.buckets.observe(options, micros as f64 / MICROS_PER_SECOND);
        self.sum_micros += i128::from(micros);
    }

    /// The sum for exposition.
    #[must_use]
    pub fn sum_seconds(&self) -> f64 {
        self.sum_micros as f64 / MICROS_PER_SECOND
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::metrics::NativeOptions;

    const OPTIONS: BucketOptions =
        BucketOptions::new(&[1.0, 10.0, 30.0, 60.0, 300.0], Some(NativeOptions::NEVER_RESET));

    fn tally(micros: &[u64]) -> Tally {
        let mut tally = Tally::new(&OPTIONS, DateTime::UNIX_EPOCH);
        for value in micros {
            tally.observe_micros(&OPTIONS, *value);
        }
        tally
    }

    #[test]
    fn an_empty_tally_sums_to_zero() {
        let tally = tally(&[]);
        assert_eq!((tally.buckets.count, tally.sum_micros, tally.sum_seconds()), (0, 0, 0.0));
    }

    #[test]
    fn the_longest_durations_fit_the_sum_and_survive_json() {
        let tally = tally(&[u64::MAX, u64::MAX, u64::MAX]);
        assert_eq!(tally.sum_micros, 3 * i128::from(u64::MAX));
        assert_eq!(
            serde_json::from_str::<Tally>(&serde_json::to_string(&tally).unwrap()).unwrap(),
            tally
        );
    }

    /// Durations from one second to an hour: 12 powers of two, which need at most 100 buckets.
    fn usual_durations() -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec(prop_oneof![1_000_000_u64..3_600_000_000, Just(0)], 0..300)
    }

    proptest! {
        #[test]
        fn any_order_gives_the_same_state(
            (one, other) in usual_durations().prop_flat_map(|values| (Just(values.clone()), Just(values).prop_shuffle()))
        ) {
            let (one, other) = (tally(&one), tally(&other));
            prop_assert_eq!(one.buckets.schema, 3, "the limit was passed");
            prop_assert_eq!(one.sum_seconds().to_bits(), other.sum_seconds().to_bits());
            prop_assert_eq!(one, other);
        }

        #[test]
        fn a_saved_tally_continues_as_if_never_saved(before in usual_durations(), after in usual_durations()) {
            let saved = serde_json::to_string(&tally(&before)).unwrap();
            let mut restored: Tally = serde_json::from_str(&saved).unwrap();
            let as_value = serde_json::from_value(serde_json::from_str(&saved).unwrap()).unwrap();
            prop_assert_eq!(&restored, &as_value, "through a JSON value as well");
            for micros in &after {
                restored.observe_micros(&OPTIONS, *micros);
            }
            prop_assert_eq!(restored, tally(&[before, after].concat()));
        }
    }
}

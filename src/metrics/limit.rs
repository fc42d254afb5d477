//! What happens when a histogram has more native buckets than its limit: exactly the Go client's strategy, one step per observation.

use chrono::{DateTime, Utc};

use super::buckets::Buckets;
use super::index::{MIN_SCHEMA, coarser, upper_bound};
use super::options::NativeOptions;

impl Buckets {
    /// Run after each value. Above the limit, in this order: say that it must start over, if it is old enough; else schedule that, and
    /// meanwhile widen the zero bucket by one bucket, or else halve the resolution. What is still too much then, waits for the next value.
    pub(super) fn must_start_over(&mut self, native: &NativeOptions, value: f64, now: DateTime<Utc>) -> bool {
        let populated = self.positive.len() + self.negative.len();
        if value.is_nan() || native.max_buckets == 0 || populated <= native.max_buckets {
            return false;
        }
        if let Some(min_reset) = native.min_reset
            && self.reset_at.is_none()
        {
            let earliest = self.created + min_reset;
            if earliest <= now {
                return true;
            }
            self.reset_at = Some(earliest);
        }
        if !self.widen_zero_bucket(native.max_zero_threshold) && self.schema > MIN_SCHEMA {
            self.halve_resolution();
        }
        false
    }

    /// Takes the bucket nearest to zero, on both sides, into the zero bucket, if that does not reach beyond `max_threshold`.
    fn widen_zero_bucket(&mut self, max_threshold: f64) -> bool {
        if self.zero_threshold >= max_threshold {
            return false;
        }
        let nearest = self.positive.keys().next().into_iter().chain(self.negative.keys().next()).min().copied();
        let Some(nearest) = nearest.filter(|index| upper_bound(*index, self.schema) <= max_threshold) else {
            return false;
        };
        self.zero_threshold = upper_bound(nearest, self.schema);
        for side in [&mut self.positive, &mut self.negative] {
            self.zero_count += side.remove(&nearest).unwrap_or(0);
        }
        true
    }

    /// Merges neighbours, two by two: a server goes on with its rates across this.
    fn halve_resolution(&mut self) {
        self.schema -= 1;
        for side in [&mut self.positive, &mut self.negative] {
            for (index, count) in std::mem::take(side) {
                *side.entry(coarser(index, 1)).or_default() += count;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{BucketOptions, Counting};

    #[test]
    fn the_zero_bucket_takes_in_the_nearest_bucket_of_both_signs() {
        let native = NativeOptions { max_buckets: 3, max_zero_threshold: 4.0, ..NativeOptions::NEVER_RESET };
        let options = BucketOptions::new(&[], Some(native));
        let mut buckets = Buckets::new(&options, DateTime::UNIX_EPOCH);
        let observe =
            |buckets: &mut Buckets, value| assert_eq!(buckets.observe(&options, value, DateTime::UNIX_EPOCH), Counting::Continued);
        for value in [8.0, -1.0, 2.0, -2.0] {
            observe(&mut buckets, value);
        }
        assert_eq!((buckets.zero_threshold(), buckets.zero_count(), buckets.negative().len()), (1.0, 1, 1), "-1 is nearest");
        observe(&mut buckets, 16.0);
        assert_eq!((buckets.zero_threshold(), buckets.zero_count(), buckets.negative().len()), (2.0, 3, 0), "2 and -2 go together");
        assert_eq!((buckets.schema(), buckets.positive().len()), (3, 2));
    }

    #[test]
    fn a_histogram_that_never_resets_only_ever_loses_resolution() {
        let options = BucketOptions::new(&[1.0], Some(NativeOptions::NEVER_RESET));
        let mut buckets = Buckets::new(&options, DateTime::UNIX_EPOCH);
        let mut schema = buckets.schema();
        for step in 0..2000 {
            // 20 decades, one value a day: far more than 100 buckets at schema 3, and far more than any reset interval.
            let now = DateTime::UNIX_EPOCH + chrono::TimeDelta::days(step);
            let counting = buckets.observe(&options, 10_f64.powf(step as f64 / 100.0 - 10.0), now);
            assert_eq!(counting, Counting::Continued);
            assert!(buckets.schema() <= schema);
            assert!(buckets.positive().len() <= 100);
            schema = buckets.schema();
        }
        assert_eq!(buckets.count(), 2000);
        assert_eq!(buckets.positive().values().sum::<u64>(), 2000);
        // 20 decades are 66.4 powers of two: 532 buckets at schema 3, 67 at schema 0.
        assert_eq!(schema, 0);
        assert_eq!(buckets.created(), DateTime::UNIX_EPOCH);
    }
}

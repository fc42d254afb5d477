//! Tests of series, of tallies and of their buckets.

use super::*;

mod series {
    use std::time::Duration;

    use super::*;

    const OPTIONS: BucketOptions =
        BucketOptions::new(&[1.0, 10.0], Some(NativeOptions::NEVER_RESET));

    fn labels<const N: usize>(values: [&str; N]) -> [String; N] {
        values.map(str::to_owned)
    }

    #[test]
    fn label_values_that_run_into_each_other_stay_two_series() {
        let mut series = Series::new();
        series.add(labels(["a", "bc"]), 1, DateTime::UNIX_EPOCH);
        series.add(labels(["ab", "c"]), 2, DateTime::UNIX_EPOCH);
        assert_eq!(
            (series.get(["a", "bc"]).unwrap().value, series.get(["ab", "c"]).unwrap().value),
            (1, 2)
        );
    }

    #[test]
    fn the_first_event_sets_the_created_time_of_a_series() {
        let (first, earlier) =
            (DateTime::UNIX_EPOCH + Duration::from_secs(5), DateTime::UNIX_EPOCH);
        let (mut counters, mut tallies) = (Series::new(), Series::new());
        for at in [first, earlier] {
            counters.add(labels(["a"]), 1, at);
            tallies.observe_micros(&OPTIONS, labels(["a"]), 1, at);
        }
        assert_eq!(counters.get(["a"]), Some(&Counter { value: 2, created: first }));
        assert_eq!(tallies.get(["a"]).unwrap().buckets.created, first);
    }

    #[test]
    fn saved_series_come_back_the_same() {
        let mut tallies = Series::new();
        for (name, micros) in [("a\"b\\c\nd", 1_234_567), ("", 0), ("ü", 1)] {
            tallies.observe_micros(
                &OPTIONS,
                labels([name, "x"]),
                micros,
                DateTime::UNIX_EPOCH + Duration::from_micros(1),
            );
        }
        let saved = serde_json::to_string(&tallies).unwrap();
        assert_eq!(serde_json::from_str::<Series<Tally, 2>>(&saved).unwrap(), tallies);
        assert!(
            serde_json::from_str::<Series<Tally, 3>>(&saved)
                .unwrap_err()
                .to_string()
                .contains("2 label values instead of 3")
        );
    }

    #[test]
    fn a_series_that_was_saved_twice_is_refused() {
        let counter = serde_json::json!([["a"], {"value": 1, "created": "1970-01-01T00:00:00Z"}]);
        assert!(serde_json::from_value::<Series<Counter, 1>>(serde_json::json!([counter])).is_ok());
        let error =
            serde_json::from_value::<Series<Counter, 1>>(serde_json::json!([counter, counter]))
                .unwrap_err();
        assert_eq!(error.to_string(), "a series occurs twice");
    }

    #[test]
    fn the_saved_form_is_pinned() {
        let mut tallies = Series::new();
        tallies.observe_micros(
            &OPTIONS,
            labels(["a"]),
            1_500_000,
            DateTime::UNIX_EPOCH + Duration::from_micros(1),
        );
        assert_eq!(
            serde_json::to_value(&tallies).unwrap(),
            serde_json::json!([[["a"], {
                "buckets": {
                    "created": "1970-01-01T00:00:00.000001Z", "count": 1, "classic": [0, 1], "schema": 3, "zero_count": 0, "positive": {"5": 1}
                },
                "sum_micros": 1_500_000
            }]])
        );
    }
}

mod tally {
    use proptest::prelude::*;

    use super::*;

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

mod buckets {
    use proptest::prelude::*;

    use super::*;

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

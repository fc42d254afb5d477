//! Series of a family by their label values: the state that a fold keeps for each family.

use std::collections::{BTreeMap, btree_map};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::options::BucketOptions;
use super::tally::Tally;

/// One state per tuple of label values, in the order of the family's label names.
///
/// A separate map, because the prometheus crate's vectors hash label values without a separator:
/// `("a", "bc")` and `("ab", "c")` would be one series. In JSON it is a list of `[label values,
/// state]`, ordered by label values. (serde's tagged and flattened forms are not usable: they
/// cannot read the whole-number keys and the wide sum of a [`Tally`].)
#[derive(Debug, Clone, PartialEq)]
pub struct Series<T, const N: usize>(BTreeMap<[String; N], T>);

impl<T, const N: usize> Series<T, N> {
    #[must_use]
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// The series with these label values; created by `begin` if missing.
    pub fn entry(&mut self, labels: [String; N], begin: impl FnOnce() -> T) -> &mut T {
        self.0.entry(labels).or_insert_with(begin)
    }

    #[must_use]
    pub fn get(&self, labels: [&str; N]) -> Option<&T> {
        self.0.get(&labels.map(str::to_owned))
    }

    /// All series, ordered by label values.
    pub fn iter(&self) -> btree_map::Iter<'_, [String; N], T> {
        self.0.iter()
    }
}

impl<T, const N: usize> Default for Series<T, N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a, T, const N: usize> IntoIterator for &'a Series<T, N> {
    type Item = (&'a [String; N], &'a T);
    type IntoIter = btree_map::Iter<'a, [String; N], T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<T: Serialize, const N: usize> Serialize for Series<T, N> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.0.iter().map(|(labels, state)| (labels.as_slice(), state)))
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Series<T, N> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let mut series = BTreeMap::new();
        for (labels, state) in Vec::<(Vec<String>, T)>::deserialize(from)? {
            let labels = <[String; N]>::try_from(labels).map_err(|labels| {
                D::Error::custom(format!(
                    "a series has {} label values instead of {N}",
                    labels.len()
                ))
            })?;
            if series.insert(labels, state).is_some() {
                return Err(D::Error::custom("a series occurs twice"));
            }
        }
        Ok(Self(series))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counter {
    /// The counted number.
    pub value: u64,
    /// Time of the first event of the series. It never changes.
    pub created: DateTime<Utc>,
}

impl<const N: usize> Series<Counter, N> {
    /// Adds `n` to a series. The first event sets its created timestamp.
    pub fn add(&mut self, labels: [String; N], n: u64, at: DateTime<Utc>) {
        self.entry(labels, || Counter { value: 0, created: at }).value += n;
    }
}

impl<const N: usize> Series<Tally, N> {
    /// Observes a duration. The first event sets the created timestamp of the series.
    pub fn observe_micros(
        &mut self,
        options: &BucketOptions,
        labels: [String; N],
        micros: u64,
        at: DateTime<Utc>,
    ) {
        self.entry(labels, || Tally::new(options, at)).observe_micros(options, micros);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::NativeOptions;

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

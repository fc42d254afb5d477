//! Series of a family by their label values, and the state of each: a counter, or a histogram of
//! durations. A fold keeps one [`Series`] for each family.

use std::collections::{BTreeMap, btree_map};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::index::{MIN_SCHEMA, bucket_index, coarser};
use super::options::{BucketOptions, NativeOptions};

const MICROS_PER_SECOND: f64 = 1e6;

/// One state per tuple of label values, in the order of the family's label names.
///
/// A separate map, because the prometheus crate's vectors hash label values without a separator:
/// `("a", "bc")` and `("ab", "c")` would be one series. In JSON it is a list of `[label values,
/// state]`, ordered by label values. (serde's tagged and flattened forms are not usable: they
/// cannot read the whole-number keys and the wide sum of a [`Tally`].)
///
/// A clone shares labels and states; a change copies a shared state first.
#[derive(Debug, Clone, PartialEq)]
pub struct Series<T, const N: usize>(BTreeMap<Arc<[String; N]>, Arc<T>>);

type Shared<'a, T, const N: usize> = (&'a Arc<[String; N]>, &'a Arc<T>);
/// All series of a family, ordered by label values.
pub type SeriesIter<'a, T, const N: usize> = std::iter::Map<
    btree_map::Iter<'a, Arc<[String; N]>, Arc<T>>,
    fn(Shared<'a, T, N>) -> (&'a [String; N], &'a T),
>;

impl<T, const N: usize> Series<T, N> {
    #[must_use]
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// The series with these label values; created by `begin` if missing.
    pub fn entry(&mut self, labels: [String; N], begin: impl FnOnce() -> T) -> &mut T
    where
        T: Clone,
    {
        Arc::make_mut(self.0.entry(Arc::new(labels)).or_insert_with(|| Arc::new(begin())))
    }

    #[must_use]
    pub fn get(&self, labels: [&str; N]) -> Option<&T> {
        self.0.get(&labels.map(str::to_owned)).map(|state| &**state)
    }

    /// Adds other series. They replace those with the same labels.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// All series, ordered by label values.
    pub fn iter(&self) -> SeriesIter<'_, T, N> {
        self.0.iter().map(|(labels, state)| (&**labels, &**state))
    }
}

impl<T, const N: usize> Default for Series<T, N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a, T, const N: usize> IntoIterator for &'a Series<T, N> {
    type Item = (&'a [String; N], &'a T);
    type IntoIter = SeriesIter<'a, T, N>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<T: Serialize, const N: usize> Serialize for Series<T, N> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.iter().map(|(labels, state)| (labels.as_slice(), state)))
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
            if series.insert(Arc::new(labels), Arc::new(state)).is_some() {
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

    /// Whether these are counts of a histogram with these options.
    #[must_use]
    pub fn fit(&self, options: &BucketOptions) -> bool {
        let initial = options.native().map_or(0, |native| native.initial_schema());
        self.classic.len() == options.classic_bounds().len()
            && (MIN_SCHEMA.min(initial)..=initial).contains(&self.schema)
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
#[path = "series_tests.rs"]
mod tests;

//! Builds the prometheus crate's messages from plain states.

use prometheus::proto::{self, MetricFamily, MetricType};

use super::options::BucketOptions;
use super::series::{Buckets, Counter, Series, Tally};
use super::wire;

/// The constants of a counter family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CounterFamily<const N: usize> {
    /// Full name, ending in `_total`.
    pub name: &'static str,
    /// Help text of one sentence.
    pub help: &'static str,
    /// Label names, in the order of the series' label values.
    pub labels: [&'static str; N],
}

/// The constants of a histogram family. All its series have the same buckets, because a server uses
/// the first one's for all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HistogramFamily<const N: usize> {
    /// Full name, ending in the unit.
    pub name: &'static str,
    /// Help text of one sentence.
    pub help: &'static str,
    /// Label names, in the order of the series' label values.
    pub labels: [&'static str; N],
    /// Buckets of its series.
    pub buckets: BucketOptions,
}

impl<const N: usize> CounterFamily<N> {
    /// The family with these series, ordered by label values. In protobuf each series has its
    /// created timestamp.
    #[must_use]
    pub fn show(&self, series: &Series<Counter, N>) -> MetricFamily {
        let metrics = series.iter().map(|(labels, counter)| {
            let mut metric = metric(&self.labels, labels);
            metric.set_counter(counter_message(counter));
            metric
        });
        family(self.name, self.help, MetricType::COUNTER, metrics)
    }
}

impl<const N: usize> HistogramFamily<N> {
    /// The family with these series, ordered by label values: classic buckets, in protobuf also
    /// native buckets and created timestamps.
    ///
    /// # Panics
    /// If a series has another number of classic bounds.
    #[must_use]
    pub fn show(&self, series: &Series<Tally, N>) -> MetricFamily {
        let metrics = series.iter().map(|(labels, tally)| {
            let mut metric = metric(&self.labels, labels);
            metric.set_histogram(histogram_message(
                &self.buckets,
                &tally.buckets,
                tally.sum_seconds(),
            ));
            metric
        });
        family(self.name, self.help, MetricType::HISTOGRAM, metrics)
    }
}

fn family(
    name: &str,
    help: &str,
    kind: MetricType,
    metrics: impl Iterator<Item = proto::Metric>,
) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics.collect());
    family
}

/// A metric with its label pairs, sorted by name like the crate's own.
fn metric(names: &[&str], values: &[String]) -> proto::Metric {
    let mut pairs: Vec<_> = names
        .iter()
        .zip(values)
        .map(|(name, value)| {
            let mut pair = proto::LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value(value.clone());
            pair
        })
        .collect();
    pairs.sort();
    proto::Metric::from_label(pairs)
}

fn counter_message(counter: &Counter) -> proto::Counter {
    let mut message = proto::Counter::default();
    message.set_value(counter.value as f64);
    wire::put_counter_created(&mut message, counter.created);
    message
}

pub(super) fn histogram_message(
    options: &BucketOptions,
    buckets: &Buckets,
    sum: f64,
) -> proto::Histogram {
    let mut message = proto::Histogram::default();
    message.set_sample_count(buckets.count);
    message.set_sample_sum(sum);
    let classic = buckets.cumulative(options).map(|(bound, count)| {
        let mut bucket = proto::Bucket::default();
        bucket.set_upper_bound(bound);
        bucket.set_cumulative_count(count);
        bucket
    });
    message.set_bucket(classic.collect());
    wire::put_histogram_created(&mut message, buckets.created);
    if let Some(native) = options.native() {
        wire::put_native(&mut message, native, buckets);
    }
    message
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};

    use super::*;
    use crate::metrics::{Format, NativeOptions, decoded, encode};

    const TOTAL: CounterFamily<2> = CounterFamily {
        name: "workspaces_total",
        help: "Workspaces.",
        labels: ["template_name", "organization_name"],
    };
    const SECONDS: HistogramFamily<2> = HistogramFamily {
        name: "creation_seconds",
        help: "How long a creation takes.",
        labels: ["template_name", "organization_name"],
        buckets: BucketOptions::new(&[1.0, 30.0], Some(NativeOptions::NEVER_RESET)),
    };

    fn labels<const N: usize>(values: [&str; N]) -> [String; N] {
        values.map(str::to_owned)
    }

    fn at(seconds: i64, nanos: u32) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, nanos).unwrap()
    }

    fn text(families: &[MetricFamily]) -> String {
        String::from_utf8(encode(families, Format::Text).unwrap().1).unwrap()
    }

    fn protobuf(families: &[MetricFamily]) -> Vec<decoded::Family> {
        decoded::families(&encode(families, Format::Protobuf).unwrap().1)
    }

    #[test]
    fn text_has_the_classic_buckets_with_infinity_last() {
        let mut series = Series::new();
        for micros in [500_000, 30_000_000, 90_000_000] {
            series.observe_micros(&SECONDS.buckets, labels(["t", "o"]), micros, at(0, 0));
        }
        assert_eq!(
            text(&[SECONDS.show(&series)]),
            "# HELP creation_seconds How long a creation takes.\n\
             # TYPE creation_seconds histogram\n\
             creation_seconds_bucket{organization_name=\"o\",template_name=\"t\",le=\"1\"} 1\n\
             creation_seconds_bucket{organization_name=\"o\",template_name=\"t\",le=\"30\"} 2\n\
             creation_seconds_bucket{organization_name=\"o\",template_name=\"t\",le=\"+Inf\"} 3\n\
             creation_seconds_sum{organization_name=\"o\",template_name=\"t\"} 120.5\n\
             creation_seconds_count{organization_name=\"o\",template_name=\"t\"} 3\n"
        );
    }

    #[test]
    fn label_values_are_escaped_in_text_and_untouched_in_protobuf() {
        let odd = "quote\" backslash\\ newline\n{},= ü";
        let mut series = Series::new();
        series.add(labels([odd, ""]), 1, at(0, 0));
        let shown = [TOTAL.show(&series)];
        assert!(
            text(&shown)
                .ends_with("workspaces_total{organization_name=\"\",template_name=\"quote\\\" backslash\\\\ newline\\n{},= ü\"} 1\n")
        );
        assert_eq!(
            protobuf(&shown)[0].metric[0].labels(),
            [
                ("organization_name".to_owned(), String::new()),
                ("template_name".to_owned(), odd.to_owned())
            ]
        );
    }

    #[test]
    fn label_values_that_run_into_each_other_are_shown_as_two_series() {
        let (mut counters, mut tallies) = (Series::new(), Series::new());
        for (values, times) in [(["a", "bc"], 1), (["ab", "c"], 2)] {
            counters.add(labels(values), times, at(0, 0));
            (0..times).for_each(|_| {
                tallies.observe_micros(&SECONDS.buckets, labels(values), 1_000_000, at(0, 0))
            });
        }
        let families = protobuf(&[TOTAL.show(&counters), SECONDS.show(&tallies)]);
        let counted: Vec<_> = families[0]
            .metric
            .iter()
            .map(|metric| metric.counter.as_ref().unwrap().value())
            .collect();
        let observed: Vec<_> = families[1]
            .metric
            .iter()
            .map(|metric| metric.histogram.as_ref().unwrap().sample_count())
            .collect();
        assert_eq!((counted, observed), (vec![1.0, 2.0], vec![1, 2]));
    }

    #[test]
    fn counters_and_histograms_have_created_timestamps() {
        for since in [at(1_700_000_000, 123_456_000), at(0, 0), at(-62_135_596_800, 1_000)] {
            let (mut counters, mut tallies) = (Series::new(), Series::new());
            counters.add(labels(["t", "o"]), 1, since);
            tallies.observe_micros(&SECONDS.buckets, labels(["t", "o"]), 1, since);
            let families = protobuf(&[TOTAL.show(&counters), SECONDS.show(&tallies)]);
            assert_eq!(
                families[0].metric[0].counter.as_ref().unwrap().created.as_ref().unwrap().at(),
                since
            );
            assert_eq!(
                families[1].metric[0].histogram.as_ref().unwrap().created.as_ref().unwrap().at(),
                since
            );
        }
    }

    #[test]
    fn the_native_buckets_of_a_shown_series_add_up_to_its_count() {
        let mut series = Series::new();
        for micros in [0, 1_000_000, 1_100_000, 7_000_000, 7_000_000] {
            series.observe_micros(&SECONDS.buckets, labels(["t", "o"]), micros, at(0, 0));
        }
        let families = protobuf(&[SECONDS.show(&series)]);
        let histogram = families[0].metric[0].histogram.as_ref().unwrap();
        assert_eq!(
            (histogram.schema, histogram.zero_threshold),
            (Some(3), Some(2.0_f64.powi(-128)))
        );
        assert_eq!(histogram.native_total(), histogram.sample_count());
    }
}

//! Builds the prometheus crate's messages from plain states, and encodes them. It writes the fields
//! that the crate does not know as unknown fields, which the crate's encoder writes. Field numbers
//! are those of `io.prometheus.client`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use prometheus::proto::{self, MetricFamily, MetricType};
use prometheus::{Encoder, ProtobufEncoder, TextEncoder};

use super::accept::Format;
use super::options::{BucketOptions, NativeOptions};
use super::series::{Buckets, Counter, Series, Tally};

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
    put_counter_created(&mut message, counter.created);
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
    put_histogram_created(&mut message, buckets.created);
    if let Some(native) = options.native() {
        put_native(&mut message, native, buckets);
    }
    message
}

/// Consecutive buckets. `offset` counts the empty buckets before them, or is the first index for
/// the first span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    offset: i32,
    length: u32,
}

/// Zero counts for a gap of one or two empty buckets are shorter than a new span.
const WIDEST_FILLED_GAP: i32 = 2;

/// The spans, and the difference of each bucket's count from the previous one.
fn spans_and_deltas(buckets: &BTreeMap<i32, u64>) -> (Vec<Span>, Vec<i64>) {
    let mut spans: Vec<Span> = Vec::new();
    let mut counts: Vec<i64> = Vec::new();
    let mut next = 0;
    for (index, count) in buckets {
        let gap = index - next;
        match spans.last_mut() {
            Some(span) if gap <= WIDEST_FILLED_GAP => {
                span.length += gap as u32 + 1;
                counts.extend(std::iter::repeat_n(0, gap as usize));
            }
            _ => spans.push(Span { offset: gap, length: 1 }),
        }
        counts.push(*count as i64);
        next = index + 1;
    }
    let deltas = counts
        .iter()
        .scan(0, |before, count| Some(count - std::mem::replace(before, *count)))
        .collect();
    (spans, deltas)
}

/// Writes the native buckets into a histogram message.
fn put_native(histogram: &mut proto::Histogram, native: &NativeOptions, buckets: &Buckets) {
    let (mut spans, deltas) = spans_and_deltas(&buckets.positive);
    if spans.is_empty() && native.zero_threshold == 0.0 && buckets.zero_count == 0 {
        // This span marks an empty native histogram: a server would otherwise treat it as classic.
        spans.push(Span { offset: 0, length: 0 });
    }
    let fields = histogram.special_fields.mut_unknown_fields();
    fields.add_varint(5, zigzag(buckets.schema.into()));
    fields.add_fixed64(6, native.zero_threshold.to_bits());
    fields.add_varint(7, buckets.zero_count);
    for span in spans {
        fields
            .add_length_delimited(12, two_varints(zigzag(span.offset.into()), span.length.into()));
    }
    if !deltas.is_empty() {
        let mut packed = Vec::with_capacity(deltas.len() * 2);
        for delta in deltas {
            put_varint(&mut packed, zigzag(delta));
        }
        fields.add_length_delimited(13, packed);
    }
}

/// Writes the created timestamp of a histogram.
fn put_histogram_created(histogram: &mut proto::Histogram, created: DateTime<Utc>) {
    histogram.special_fields.mut_unknown_fields().add_length_delimited(15, timestamp(created));
}

/// Writes the created timestamp of a counter.
fn put_counter_created(counter: &mut proto::Counter, created: DateTime<Utc>) {
    counter.special_fields.mut_unknown_fields().add_length_delimited(3, timestamp(created));
}

/// A `google.protobuf.Timestamp`. Seconds before 1970 are negative, nanoseconds never are.
fn timestamp(at: DateTime<Utc>) -> Vec<u8> {
    // chrono represents a leap second by nanoseconds beyond the maximum, which the message does not
    // allow
    let nanos = at.timestamp_subsec_nanos().min(999_999_999);
    two_varints(at.timestamp() as u64, nanos.into())
}

/// A message of two varint fields with numbers 1 and 2.
fn two_varints(first: u64, second: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(12);
    message.push(1 << 3);
    put_varint(&mut message, first);
    message.push(2 << 3);
    put_varint(&mut message, second);
    message
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

/// The content type and the body of an answer. Families without series are omitted, as in the
/// registry.
///
/// # Errors
/// If a family has no name. (The crate's text encoder panics for the type untyped, which is not
/// used here.)
pub fn encode(
    families: &[MetricFamily],
    format: Format,
) -> prometheus::Result<(&'static str, Vec<u8>)> {
    let mut body = Vec::new();
    for family in families.iter().filter(|family| !family.get_metric().is_empty()) {
        let family = std::slice::from_ref(family);
        match format {
            Format::Protobuf => ProtobufEncoder::new().encode(family, &mut body)?,
            Format::Text => TextEncoder::new().encode(family, &mut body)?,
        }
    }
    Ok((format.content_type(), body))
}

#[cfg(test)]
#[path = "exposition_tests.rs"]
mod tests;

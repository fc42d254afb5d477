//! Reads `/metrics` in protobuf with an independent runtime. Field numbers are those of
//! `io.prometheus.client`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use prost::Message;
use reqwest::header::ACCEPT;

use super::expected::{Key, Value};

#[derive(Clone, PartialEq, Message)]
struct Family {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "4")]
    metric: Vec<Metric>,
}

#[derive(Clone, PartialEq, Message)]
struct Metric {
    #[prost(message, repeated, tag = "1")]
    label: Vec<Label>,
    #[prost(message, optional, tag = "3")]
    counter: Option<Counter>,
    #[prost(message, optional, tag = "7")]
    histogram: Option<Histogram>,
}

#[derive(Clone, PartialEq, Message)]
struct Label {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, Message)]
struct Counter {
    #[prost(double, tag = "1")]
    value: f64,
    #[prost(message, optional, tag = "3")]
    created: Option<Timestamp>,
}

#[derive(Clone, PartialEq, Message)]
struct Histogram {
    #[prost(uint64, tag = "1")]
    sample_count: u64,
    #[prost(double, tag = "2")]
    sample_sum: f64,
    #[prost(message, repeated, tag = "3")]
    bucket: Vec<Bucket>,
    #[prost(sint32, optional, tag = "5")]
    schema: Option<i32>,
    #[prost(double, tag = "6")]
    zero_threshold: f64,
    #[prost(uint64, tag = "7")]
    zero_count: u64,
    #[prost(message, repeated, tag = "9")]
    negative_span: Vec<Span>,
    #[prost(message, repeated, tag = "12")]
    positive_span: Vec<Span>,
    #[prost(sint64, repeated, packed = "false", tag = "13")]
    positive_delta: Vec<i64>,
    #[prost(message, optional, tag = "15")]
    created: Option<Timestamp>,
}

#[derive(Clone, PartialEq, Message)]
struct Bucket {
    #[prost(uint64, tag = "1")]
    cumulative_count: u64,
    #[prost(double, tag = "2")]
    upper_bound: f64,
}

#[derive(Clone, PartialEq, Message)]
struct Span {
    #[prost(sint32, tag = "1")]
    offset: i32,
    #[prost(uint32, tag = "2")]
    length: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Timestamp {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

/// One series on the page.
#[derive(Debug)]
pub struct ShownSeries {
    pub value: Value,
    pub created: Option<DateTime<Utc>>,
}

/// The domain series of the protobuf page.
pub async fn scrape(metrics: &str) -> BTreeMap<Key, ShownSeries> {
    let protobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
    let answer = reqwest::Client::new()
        .get(metrics)
        .header(ACCEPT, protobuf)
        .send()
        .await
        .expect("an answer");
    assert!(
        answer.headers()["content-type"]
            .to_str()
            .expect("text")
            .starts_with("application/vnd.google.protobuf"),
        "{answer:?}"
    );
    let body = answer.bytes().await.expect("a body");
    let mut body = &body[..];
    let mut page = BTreeMap::new();
    while !body.is_empty() {
        let family = Family::decode_length_delimited(&mut body).expect("a family");
        if !family.name.starts_with("coderd_")
            && family.name != "tallyline_negative_durations_total"
        {
            continue;
        }
        for metric in family.metric {
            let labels = metric
                .label
                .iter()
                .map(|label| (label.name.clone(), label.value.clone()))
                .collect();
            let key = (family.name.clone(), labels);
            assert!(page.insert(key.clone(), read(metric)).is_none(), "{key:?} is there twice");
        }
    }
    page
}

fn read(metric: Metric) -> ShownSeries {
    match (metric.counter, metric.histogram) {
        (Some(counter), None) => ShownSeries {
            value: Value::Counter(counter.value),
            created: counter.created.map(|at| at.at()),
        },
        (None, Some(histogram)) => ShownSeries {
            created: histogram.created.as_ref().map(Timestamp::at),
            value: histogram.value(),
        },
        other => panic!("neither a counter nor a histogram: {other:?}"),
    }
}

impl Timestamp {
    fn at(&self) -> DateTime<Utc> {
        DateTime::from_timestamp(self.seconds, self.nanos.try_into().expect("not negative"))
            .expect("in range")
    }
}

impl Histogram {
    fn value(&self) -> Value {
        assert!(self.negative_span.is_empty(), "durations below zero: {self:?}");
        Value::Histogram {
            count: self.sample_count,
            sum_seconds: self.sample_sum,
            classic: self
                .bucket
                .iter()
                .map(|bucket| (bucket.upper_bound, bucket.cumulative_count))
                .collect(),
            schema: self.schema.expect("a native histogram"),
            zero_threshold: self.zero_threshold,
            zero_count: self.zero_count,
            native: self.native(),
        }
    }

    /// Counts by index, without empty buckets.
    fn native(&self) -> BTreeMap<i32, u64> {
        let (mut index, mut count, mut deltas) = (0, 0_i64, self.positive_delta.iter());
        let mut buckets = BTreeMap::new();
        for span in &self.positive_span {
            index += span.offset;
            for _ in 0..span.length {
                count += deltas.next().expect("as many deltas as the spans are long");
                buckets.insert(index, count.try_into().expect("no count below zero"));
                index += 1;
            }
        }
        assert_eq!(deltas.next(), None, "as many deltas as the spans are long");
        buckets.retain(|_, count| *count > 0);
        buckets
    }
}

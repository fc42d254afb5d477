//! Tests with reference vectors. They are points of the bucket arithmetic and cases of the Go
//! client. The cases have values from 0 up, without resets and wider zero buckets. The file
//! contains its own description.

use chrono::DateTime;
use prometheus::proto::{self, MetricFamily, MetricType};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::bounds::SCHEMA_8_BOUNDS;
use super::exposition::histogram_message;
use super::{
    BucketOptions, Buckets, DEFAULT_ZERO_THRESHOLD, Format, NativeOptions, decoded, encode, index,
};

#[derive(Deserialize)]
struct Vectors {
    default_classic_buckets: Vec<Number>,
    cases: Vec<Case>,
    upper_bounds: Vec<(i32, i8, Number)>,
    pick_schema: Vec<(Number, i8)>,
    bucket_index: Vec<(Number, i8, i32)>,
    bounds_schema_8: Vec<Number>,
}

#[derive(Deserialize)]
struct Case {
    id: String,
    options: CaseOptions,
    observations: Vec<Number>,
    expect: Expected,
}

#[derive(Deserialize)]
struct CaseOptions {
    factor: Number,
    zero_threshold: Number,
    max_buckets: usize,
    min_reset_s: u64,
    max_zero_threshold: Number,
}

#[derive(Deserialize)]
struct Expected {
    count: u64,
    sum: Number,
    created_s: i64,
    schema: Option<i32>,
    zero_threshold: Option<Number>,
    zero_count: Option<u64>,
    positive_spans: Vec<(i32, u32)>,
    positive_deltas: Vec<i64>,
    classic: Vec<(Number, u64)>,
}

/// A JSON number, or a string for values that JSON cannot represent. The standard library parses it
/// and rounds correctly.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "Box<RawValue>")]
struct Number(f64);

impl TryFrom<Box<RawValue>> for Number {
    type Error = std::num::ParseFloatError;

    fn try_from(raw: Box<RawValue>) -> Result<Self, Self::Error> {
        raw.get().trim_matches('"').parse().map(Number)
    }
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../../tests/data/native_histogram_vectors.json")).unwrap()
}

fn bucket_options(options: &CaseOptions) -> BucketOptions {
    // Cases without native buckets have the default classic buckets; the others have none.
    if options.factor.0 <= 1.0 {
        return BucketOptions::new(prometheus::DEFAULT_BUCKETS, None);
    }
    let zero_threshold = match options.zero_threshold.0 {
        0.0 => DEFAULT_ZERO_THRESHOLD,
        threshold => threshold.max(0.0),
    };
    let native = NativeOptions {
        factor: options.factor.0,
        zero_threshold,
        max_buckets: options.max_buckets,
    };
    BucketOptions::new(&[], Some(native))
}

/// Whether the product supports the case.
fn is_in_use(case: &Case) -> bool {
    let resets_or_widens = case.options.min_reset_s > 0 || case.options.max_zero_threshold.0 > 0.0;
    !resets_or_widens && !case.observations.iter().any(|value| value.0 < 0.0)
}

/// Runs a case and returns the message that a scraper decodes.
fn play(case: &Case) -> decoded::Histogram {
    let options = bucket_options(&case.options);
    let mut buckets = Buckets::new(&options, DateTime::UNIX_EPOCH);
    let mut sum = 0.0;
    for value in &case.observations {
        buckets.observe(&options, value.0);
        sum += value.0;
    }
    let mut metric = proto::Metric::default();
    metric.set_histogram(histogram_message(&options, &buckets, sum));
    let mut family = MetricFamily::default();
    family.set_name("case".to_owned());
    family.set_field_type(MetricType::HISTOGRAM);
    family.set_metric(vec![metric]);
    let (_, body) = encode(&[family], Format::Protobuf).unwrap();
    decoded::families(&body).remove(0).metric.remove(0).histogram.unwrap()
}

fn close(got: f64, wanted: f64) -> bool {
    got == wanted
        || got.is_nan() && wanted.is_nan()
        || (got - wanted).abs() <= 1e-12 * wanted.abs().max(1.0)
}

#[test]
fn every_case_in_use_gives_the_message_of_the_go_client() {
    let cases: Vec<Case> = vectors().cases.into_iter().filter(is_in_use).collect();
    assert_eq!(cases.len(), 11);
    for case in &cases {
        let (id, got, wanted) = (&case.id, play(case), &case.expect);
        let spans = |spans: &[decoded::Span]| {
            spans.iter().map(|span| (span.offset(), span.length())).collect::<Vec<_>>()
        };
        assert_eq!(got.sample_count, Some(wanted.count), "{id}");
        assert!(close(got.sample_sum(), wanted.sum.0), "{id}: sum {}", got.sample_sum());
        assert_eq!(got.created.as_ref().unwrap().at().timestamp(), wanted.created_s, "{id}");
        assert_eq!(got.schema, wanted.schema, "{id}");
        assert_eq!(got.zero_threshold, wanted.zero_threshold.map(|number| number.0), "{id}");
        assert_eq!(got.zero_count, wanted.zero_count, "{id}");
        assert_eq!(spans(&got.positive_span), wanted.positive_spans, "{id}");
        assert_eq!(got.positive_delta, wanted.positive_deltas, "{id}");
        let classic: Vec<_> = got
            .bucket
            .iter()
            .map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()))
            .collect();
        assert_eq!(
            classic,
            wanted.classic.iter().map(|(bound, count)| (bound.0, *count)).collect::<Vec<_>>(),
            "{id}"
        );
    }
}

#[test]
fn bucket_arithmetic_matches_every_reference_point() {
    let vectors = vectors();
    assert_eq!(
        (vectors.upper_bounds.len(), vectors.pick_schema.len(), vectors.bucket_index.len()),
        (15, 16, 157)
    );
    for (bucket, schema, bound) in vectors.upper_bounds {
        assert_eq!(
            index::upper_bound(bucket, schema),
            bound.0,
            "bound of {bucket} at schema {schema}"
        );
    }
    for (factor, schema) in vectors.pick_schema {
        assert_eq!(index::schema_for_factor(factor.0), schema, "schema for factor {}", factor.0);
    }
    for (value, schema, bucket) in vectors.bucket_index {
        assert_eq!(
            index::bucket_index(value.0, schema),
            bucket,
            "index of {} at schema {schema}",
            value.0
        );
    }
}

#[test]
fn the_bounds_are_bit_equal_with_the_reference() {
    let numbers =
        |list: Vec<Number>| list.into_iter().map(|number| number.0.to_bits()).collect::<Vec<_>>();
    let vectors = vectors();
    assert_eq!(numbers(vectors.bounds_schema_8), SCHEMA_8_BOUNDS.map(f64::to_bits));
    assert_eq!(
        numbers(vectors.default_classic_buckets),
        prometheus::DEFAULT_BUCKETS.map(f64::to_bits)
    );
}

#[test]
fn numbers_outside_json_are_read_from_strings() {
    let read = |json| serde_json::from_str::<Number>(json).unwrap().0;
    assert!(read("\"NaN\"").is_nan());
    assert_eq!((read("\"+Inf\""), read("\"-Inf\"")), (f64::INFINITY, f64::NEG_INFINITY));
}

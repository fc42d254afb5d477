//! Tests of the exposition.

use proptest::prelude::*;

use super::*;
use crate::metrics::decoded;

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
    let counted: Vec<_> =
        families[0].metric.iter().map(|metric| metric.counter.as_ref().unwrap().value()).collect();
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
    assert_eq!((histogram.schema, histogram.zero_threshold), (Some(3), Some(2.0_f64.powi(-128))));
    assert_eq!(histogram.native_total(), histogram.sample_count());
}

#[test]
fn families_without_series_are_left_out() {
    let mut empty = MetricFamily::default();
    empty.set_name("empty_total".to_owned());
    for format in [Format::Protobuf, Format::Text] {
        assert_eq!(
            encode(std::slice::from_ref(&empty), format).unwrap(),
            (format.content_type(), Vec::new())
        );
    }
}

/// Decodes the buckets as a server does.
fn read_back(spans: &[Span], deltas: &[i64]) -> BTreeMap<i32, u64> {
    let (mut index, mut count, mut deltas) = (0, 0, deltas.iter());
    let mut buckets = BTreeMap::new();
    for span in spans {
        index += span.offset;
        for _ in 0..span.length {
            count += deltas.next().unwrap();
            buckets.insert(index, count as u64);
            index += 1;
        }
    }
    assert_eq!(deltas.next(), None, "as many deltas as the spans are long");
    buckets.retain(|_, count| *count > 0);
    buckets
}

#[test]
fn short_gaps_are_filled_and_long_ones_open_a_span() {
    let (spans, deltas) = spans_and_deltas(&BTreeMap::from([(-3, 5), (0, 1), (4, 2)]));
    assert_eq!(spans, [Span { offset: -3, length: 4 }, Span { offset: 3, length: 1 }]);
    assert_eq!(deltas, [5, -5, 0, 1, 1]);
}

proptest! {
    #[test]
    fn a_server_reads_the_buckets_that_were_written(buckets in prop::collection::btree_map(-500_i32..500, 1_u64..1000, 0..100)) {
        let (spans, deltas) = spans_and_deltas(&buckets);
        prop_assert!(spans.iter().skip(1).all(|span| span.offset > WIDEST_FILLED_GAP));
        prop_assert_eq!(read_back(&spans, &deltas), buckets);
    }
}

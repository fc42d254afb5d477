//! Writes the fields of Prometheus' messages that the prometheus crate does not know. They become
//! unknown fields, which the crate's encoder writes. Field numbers are those of
//! `io.prometheus.client`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use prometheus::proto;

use super::options::NativeOptions;
use super::series::Buckets;

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
pub(super) fn put_native(
    histogram: &mut proto::Histogram,
    native: &NativeOptions,
    buckets: &Buckets,
) {
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
pub(super) fn put_histogram_created(histogram: &mut proto::Histogram, created: DateTime<Utc>) {
    histogram.special_fields.mut_unknown_fields().add_length_delimited(15, timestamp(created));
}

/// Writes the created timestamp of a counter.
pub(super) fn put_counter_created(counter: &mut proto::Counter, created: DateTime<Utc>) {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
}

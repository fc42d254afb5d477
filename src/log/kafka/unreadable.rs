//! Batches of Kafka that cannot be read: those that unpack to more than librdkafka allows, and
//! damaged ones.
//!
//! Any producer can append such a batch, and librdkafka fetches it again endlessly. A batch that
//! cannot be unpacked becomes one placeholder at its last offset, and reading continues after it.
//! The end of a damaged batch is unknown, so that it stops its partition.

use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use crate::event::Message;
use crate::log::{LogError, Record};

/// Whether the error means that librdkafka could not read a batch.
pub(super) fn unreadable(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(RDKafkaErrorCode::BadCompression | RDKafkaErrorCode::BadMessage)
    )
}

/// The first offset of the batch that could not be unpacked. librdkafka reports it only in its
/// text. If the text has another form, the batch is not stepped over.
pub(super) fn first_offset(reason: &str) -> Option<i64> {
    let (_, rest) = reason.strip_prefix("Decompression (codec ")?.split_once(") of message at ")?;
    rest.split_once(' ')?.0.parse().ok()
}

/// The placeholder for a batch. The batch's time is unreadable too.
pub(super) fn record(first: i64, last: i64) -> Record {
    Record {
        offset: last,
        timestamp: chrono::DateTime::UNIX_EPOCH,
        message: Message::of_unreadable_batch(first, last),
    }
}

/// The last offset before `end` that is inside the batch. `from` must be inside.
pub(super) fn last_inside(
    from: i64,
    end: i64,
    mut is_inside: impl FnMut(i64) -> Result<bool, LogError>,
) -> Result<i64, LogError> {
    let (mut inside, mut outside, mut step) = (from, end, 1);
    while inside + 1 < outside {
        let offset = inside + ((outside - inside) / 2).min(step);
        if is_inside(offset)? {
            (inside, step) = (offset, step * 2);
        } else {
            outside = offset;
        }
    }
    Ok(inside)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_offset_comes_only_from_the_known_text_of_librdkafka() {
        let text = "Decompression (codec 0x4) of message at 1234 of 48213 bytes failed: Local: Invalid compressed data";
        assert_eq!(first_offset(text), Some(1234));
        for other in [
            "",
            "Decompression (codec 0x4) of message at x of 1 bytes failed",
            "MessageSet at offset 5 (10 bytes) failed CRC32C check",
        ] {
            assert_eq!(first_offset(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn the_last_offset_of_a_batch_needs_few_checks(from in 0_i64..1000, length in 0_i64..2_000_000, behind in 1_i64..1_000_000_000) {
            let (last, mut checks) = (from + length, 0);
            let found = last_inside(from, last + behind, |offset| {
                checks += 1;
                Ok(offset <= last)
            });
            prop_assert_eq!(found, Ok(last));
            prop_assert!(checks <= 45, "{} checks", checks);
        }
    }
}

//! Bad inputs with their results and tests. `tests/it/bad_input/table.rs` checks that the tests
//! exist, and that each test of a bad record is here.

use tallyline::event::RejectCause::{self, *};
use tallyline::ledger::Disposition;

pub struct Row {
    pub input: &'static str,
    pub result: Outcome,
    /// The name of a test function.
    pub test: &'static str,
}

/// The result of a bad input.
pub enum Outcome {
    /// The record is not accepted, for one of these causes of one disposition. More about the row.
    Refused(&'static [RejectCause], &'static str),
    /// Another result.
    Other(&'static str),
}

impl Outcome {
    pub fn text(&self) -> String {
        let (causes, more) = match self {
            Outcome::Refused(causes, more) => (causes, more),
            Outcome::Other(text) => return (*text).to_owned(),
        };
        let disposition = Disposition::of(causes[0]);
        let words: Vec<String> = causes.iter().map(|cause| format!("`{cause}`")).collect();
        let gap = if more.is_empty() { "" } else { "; " };
        format!("{disposition}, {}{gap}{more}", words.join(" or "))
    }
}

const NAMED: &str = "names it";

const fn refused(
    input: &'static str,
    causes: &'static [RejectCause],
    more: &'static str,
    test: &'static str,
) -> Row {
    Row { input, result: Outcome::Refused(causes, more), test }
}

const fn other(input: &'static str, result: &'static str, test: &'static str) -> Row {
    Row { input, result: Outcome::Other(result), test }
}

pub const ROWS: &[Row] = &[
    refused("a tombstone", &[Tombstone], "", "a_tombstone_is_rejected"),
    refused(
        "a `ce_` header is missing",
        &[Attribute],
        NAMED,
        "a_record_without_a_needed_ce_header_is_rejected",
    ),
    refused(
        "a `ce_` header occurs twice, in upper or lower case",
        &[Attribute],
        NAMED,
        "a_repeated_ce_header_is_rejected",
    ),
    other(
        "structured mode",
        "accepted, the same event as in binary mode",
        "structured_mode_is_accepted",
    ),
    refused(
        "a body above its limit",
        &[Oversized],
        "its SHA-256 and its beginning are kept, so that only an edit or a discard ends it",
        "an_oversized_record_is_rejected_and_its_hash_and_beginning_are_kept",
    ),
    refused(
        "a batch of Kafka that unpacks beyond `receive.message.max.bytes`, or not at all",
        &[Oversized],
        "one row at its last offset, names its offsets",
        "a_batch_that_unpacks_beyond_the_limit_is_one_reject_and_stops_nothing",
    ),
    other(
        "a batch of Kafka with a wrong checksum",
        "stops its partition; the message gives the reason and the next step",
        "a_damaged_batch_stops_its_partition_until_it_is_removed_and_recovered",
    ),
    refused("deep nesting", &[Json], "", "deep_nesting_is_rejected"),
    refused(
        "a JSON key occurs twice, at any depth",
        &[Json],
        NAMED,
        "a_repeated_json_key_is_rejected",
    ),
    other(
        "a record key that is not UTF-8",
        "accepted: a key is any bytes, and only chooses the partition",
        "a_record_key_of_any_bytes_is_accepted",
    ),
    refused("NUL in text", &[Field], NAMED, "text_with_nul_is_rejected"),
    refused("text that is not UTF-8", &[Attribute, Json], "", "text_that_is_not_utf_8_is_rejected"),
    refused(
        "text above its limit, an id above its limit",
        &[Field],
        NAMED,
        "text_that_is_too_long_is_rejected",
    ),
    refused(
        "year 1, far future, anything outside the years of an event",
        &[Field],
        NAMED,
        "a_time_outside_the_years_1970_to_9999_is_rejected",
    ),
    refused(
        "a row of coderd with the time `infinity`, `-infinity` or outside the years of an event",
        &[Field],
        "one row, names the field; a claim is not derived from it",
        "every_row_with_an_odd_time_is_one_reject_that_names_the_field",
    ),
    other(
        "started after completed",
        "accepted; observed as 0 and counted as skew",
        "a_negative_duration_is_observed_as_0_and_counted_as_skew",
    ),
    refused(
        "a number beyond 64 bits, a fraction, a sign",
        &[Field],
        NAMED,
        "a_number_that_does_not_fit_is_rejected",
    ),
    refused("an unknown field", &[UnknownField], NAMED, "an_unknown_field_is_rejected"),
    refused("data after the event", &[Json], "", "data_after_the_event_is_rejected"),
    refused(
        "an event in another type's topic",
        &[ForeignTopic],
        "names both; a resubmission goes to the right topic",
        "an_event_in_another_types_topic_is_rejected",
    ),
    refused(
        "an event type of another product",
        &[ForeignEventType],
        NAMED,
        "an_event_type_that_is_not_metered_is_rejected",
    ),
    refused(
        "a usage type of a later version",
        &[UnknownEventType],
        "the version that knows it admits the event",
        "a_usage_type_of_a_later_version_is_held",
    ),
    refused(
        "an event of a deployment that no collector has registered",
        &[UnregisteredSource],
        "registering it admits the event",
        "forged_deployments_are_held_and_cost_the_same_however_many_there_are",
    ),
    refused(
        "no signature, beyond the cutover",
        &[Unsigned],
        "the id stays free",
        "a_rejected_unsigned_record_leaves_its_id_free_and_is_signed_when_it_is_resubmitted",
    ),
    refused(
        "a signature that does not match, or names an unknown key, beyond the cutover",
        &[BadSignature],
        "the id stays free",
        "every_part_that_is_parsed_is_signed",
    ),
    refused(
        "a known id with another content",
        &[Conflict],
        "the accepted event remains",
        "an_id_with_another_content_is_a_conflict",
    ),
    refused(
        "a record that only PostgreSQL refuses",
        &[Ledger],
        "found by halving the batch",
        "a_record_that_postgres_refuses_is_rejected_and_the_others_are_recorded",
    ),
    other(
        "a token of an unknown `kid`",
        "license refused, names the key",
        "a_token_of_an_unknown_kid_is_refused",
    ),
    other(
        "a token with `alg: none`",
        "license refused, names the algorithm",
        "a_token_with_alg_none_is_refused",
    ),
    other("a tampered token", "license refused", "a_tampered_token_is_refused"),
    other(
        "a token of other deployments",
        "license refused, names them",
        "a_token_of_other_deployments_is_refused_and_one_that_names_none_is_for_any",
    ),
    other(
        "a token of another version",
        "license refused, names the version",
        "a_token_of_another_version_is_refused",
    ),
    other(
        "a token above its limit",
        "license refused, unread",
        "an_oversized_token_is_refused_unread",
    ),
    other(
        "an unknown, repeated or wrong query parameter",
        "400 with `field`",
        "a_wrong_field_of_a_query_is_named",
    ),
    other(
        "a foreign `Host` header, where no tokens are set",
        "403, names it",
        "a_page_of_another_origin_gets_nothing_without_tokens",
    ),
];

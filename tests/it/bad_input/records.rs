//! Bad records.

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tallyline::consumer;
use tallyline::event::{
    Event, KEPT_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES, Message, Payload, Topic, UsageQuantity,
};
use uuid::Uuid;

use super::{Outcome, all_accepted, all_refused, events, recorded, recorded_as};
use crate::support::ledger::{DEPLOYMENT, build, claim, usage};

/// The binary form of `event` with this body.
fn with_body(event: &Event, body: impl AsRef<[u8]>) -> Message {
    Message { payload: Some(body.as_ref().to_vec()), ..event.to_message() }
}

/// The binary form of `event` with its data changed.
fn with_data(event: &Event, change: impl FnOnce(&mut Value)) -> Message {
    let mut data: Value = serde_json::from_slice(&event.to_message().payload.unwrap()).unwrap();
    change(&mut data);
    with_body(event, data.to_string())
}

fn with_field(event: &Event, field: &str, value: impl Into<Value>) -> Message {
    with_data(event, |data| data[field] = value.into())
}

/// Removes that header or changes its value.
fn with_header(event: &Event, name: &str, value: Option<&[u8]>) -> Message {
    let mut message = event.to_message();
    message.headers.retain(|(header, _)| header != name);
    message.headers.extend(value.map(|value| (name.to_owned(), Some(value.to_vec()))));
    message
}

fn structured(body: impl ToString) -> Message {
    let headers = vec![("content-type".to_owned(), Some(b"application/cloudevents+json".to_vec()))];
    Message { headers, payload: Some(body.to_string().into_bytes()), ..Message::default() }
}

#[tokio::test]
async fn a_tombstone_is_rejected() {
    let tombstone = Message { payload: None, ..build(DEPLOYMENT, 1).to_message() };
    let bare = Message::default();
    all_refused(vec![(tombstone, "no body"), (bare, "no body")], "rejected", "tombstone").await;
}

#[tokio::test]
async fn a_record_without_a_needed_ce_header_is_rejected() {
    let build = build(DEPLOYMENT, 1);
    let mut rows: Vec<_> = ["specversion", "id", "source", "type"]
        .map(|name| {
            (
                with_header(&build, &format!("ce_{name}"), None),
                format!("attribute {name} is missing"),
            )
        })
        .into();
    rows.push((
        with_header(&usage(DEPLOYMENT, 1), "ce_time", None),
        "attribute time is missing".to_owned(),
    ));
    rows.push((
        Message { headers: vec![], ..build.to_message() },
        "attribute specversion is missing".to_owned(),
    ));
    all_refused(
        rows.iter().map(|(message, words)| (message.clone(), words.as_str())).collect(),
        "rejected",
        "attribute",
    )
    .await;
    // the data of a build contains its times
    all_accepted(&[with_header(&build, "ce_time", None)]).await;
}

#[tokio::test]
async fn a_repeated_ce_header_is_rejected() {
    let twice = |name: &str, value: Option<&str>| {
        let mut message = build(DEPLOYMENT, 1).to_message();
        message.headers.push((name.to_owned(), value.map(|value| value.as_bytes().to_vec())));
        message
    };
    let rows = vec![
        (twice("ce_id", Some("another")), "attribute id occurs twice"),
        (twice("CE_Source", Some("/coder/x")), "attribute source occurs twice"),
        (twice("ce_type", None), "attribute type occurs twice"),
        (twice("ce_time", Some("2026-03-01T10:00:00Z")), "attribute time occurs twice"),
        (twice("Content-Type", Some("application/json")), "attribute datacontenttype occurs twice"),
    ];
    all_refused(rows, "rejected", "attribute").await;
}

#[tokio::test]
async fn structured_mode_is_accepted() {
    let sent = [build(DEPLOYMENT, 1), claim(DEPLOYMENT, 2), usage(DEPLOYMENT, 3)];
    let recording =
        all_accepted(&sent.clone().map(|event| structured(event.to_structured()))).await;
    let facts = events(&recording.ledger).await;
    assert!(sent.iter().all(|event| facts.contains(event)), "the same events as in binary mode");
    let mut twice = build(DEPLOYMENT, 4).to_structured().to_string();
    twice.insert_str(1, "\"id\":\"another\",");
    all_refused(vec![(structured(twice), "\"id\" occurs twice")], "rejected", "json").await;
    all_refused(
        vec![(structured("{}"), "attribute specversion is missing")],
        "rejected",
        "attribute",
    )
    .await;
}

#[tokio::test]
async fn an_oversized_record_is_rejected_and_its_hash_and_beginning_are_kept() {
    let event = build(DEPLOYMENT, 1);
    let rows = [MAX_PAYLOAD_BYTES + 1, 1024 * 1024].map(|bytes| {
        let message = with_body(&event, vec![b' '; bytes]);
        let cut = Message::from_log(message.key, message.headers, message.payload.as_deref());
        assert_eq!(cut.payload.as_ref().map(Vec::len), Some(KEPT_PAYLOAD_BYTES));
        let sha256 = hex::encode(Sha256::digest(vec![b' '; bytes]));
        (cut, format!("the body has {bytes} bytes, more than 262144; only its first 65536 bytes and its SHA-256 are kept, {sha256}"))
    });
    let rows = rows.iter().map(|(message, words)| (message.clone(), words.as_str())).collect();
    all_refused(rows, "rejected", "oversized").await;
}

#[tokio::test]
async fn deep_nesting_is_rejected() {
    let nested =
        |open: &str| with_body(&build(DEPLOYMENT, 1), open.repeat(MAX_PAYLOAD_BYTES / open.len()));
    let closed =
        with_body(&build(DEPLOYMENT, 1), format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)));
    let rows = vec![
        (nested("["), "recursion limit exceeded"),
        (nested("{\"a\":"), "recursion limit exceeded"),
        (closed, "recursion limit exceeded"),
        (structured("{\"data\":".repeat(30_000)), "recursion limit exceeded"),
    ];
    all_refused(rows, "rejected", "json").await;
}

#[tokio::test]
async fn a_repeated_json_key_is_rejected() {
    let event = usage(DEPLOYMENT, 1);
    let rows = vec![
        (with_body(&event, r#"{"count":1,"count":2}"#), "\"count\" occurs twice"),
        (with_body(&event, r#"{"count":1,"count":1}"#), "\"count\" occurs twice"),
        (with_body(&event, r#"{"count":1,"\u0063ount":2}"#), "\"count\" occurs twice"),
        (with_body(&event, r#"{"count":1,"other":{"a":1,"a":2}}"#), "\"a\" occurs twice"),
    ];
    all_refused(rows, "rejected", "json").await;
}

#[tokio::test]
async fn a_record_key_of_any_bytes_is_accepted() {
    let keys: [Option<&[u8]>; 4] = [None, Some(b""), Some(&[0xff, 0xfe, 0]), Some(&[0; 1000])];
    let keyed = |(n, key): (u32, &Option<&[u8]>)| Message {
        key: key.map(<[u8]>::to_vec),
        ..build(DEPLOYMENT, n).to_message()
    };
    let messages: Vec<Message> = (0..).zip(&keys).map(keyed).collect();
    all_accepted(&messages).await;
    // the key of a refused record is kept unchanged
    let tombstones = messages
        .into_iter()
        .map(|message| (Message { payload: None, ..message }, "no body"))
        .collect();
    all_refused(tombstones, "rejected", "tombstone").await;
}

#[tokio::test]
async fn text_with_nul_is_rejected() {
    let (build, usage) = (build(DEPLOYMENT, 1), usage(DEPLOYMENT, 1));
    let rows = vec![
        (with_field(&build, "owner_name", "user\0"), "field owner_name contains a NUL character"),
        (with_field(&build, "reason", "\0"), "field reason contains a NUL character"),
        (with_header(&usage, "ce_id", Some(b"us\0age")), "field id contains a NUL character"),
        (
            with_header(&usage, "ce_failuremessage", Some(b"\0")),
            "field failuremessage contains a NUL character",
        ),
        (structured(with_nul_id(&usage)), "field id contains a NUL character"),
    ];
    all_refused(rows, "rejected", "field").await;
    // in names and in quoted text, too
    all_refused(vec![(with_field(&build, "na\0me", 1), "na\\0me")], "rejected", "unknown_field")
        .await;
    all_refused(
        vec![(with_header(&build, "ce_type", Some(b"a\0b")), "a\\0b")],
        "rejected",
        "foreign_event_type",
    )
    .await;
    let mut named = usage.to_message();
    named.headers.push(("x\0y".to_owned(), Some(b"\0".to_vec())));
    all_accepted(&[named]).await;
}

fn with_nul_id(event: &Event) -> Value {
    let mut structured = event.to_structured();
    structured["id"] = json!("us\0age");
    structured
}

#[tokio::test]
async fn text_that_is_not_utf_8_is_rejected() {
    let event = usage(DEPLOYMENT, 1);
    let rows = ["specversion", "id", "source", "type", "time", "failuremessage"].map(|name| {
        (with_header(&event, &format!("ce_{name}"), Some(&[b'a', 0xff])), "is not UTF-8")
    });
    all_refused(rows.into(), "rejected", "attribute").await;
    let rows = vec![
        (with_body(&event, b"{\"count\xff\":1}"), "invalid unicode"),
        (with_body(&event, [0xff, 0xfe]), "expected value"),
        (with_body(&event, br#"{"count":1,"a":"\ud800"}"#), "hex escape"),
    ];
    all_refused(rows, "rejected", "json").await;
}

#[tokio::test]
async fn a_time_outside_the_years_1970_to_9999_is_rejected() {
    let (build, usage) = (build(DEPLOYMENT, 1), usage(DEPLOYMENT, 1));
    let outside = "outside the years 1970 to 9999";
    let no_time = "is not an RFC 3339 time";
    let rows = vec![
        (with_field(&build, "started_at", "0001-01-01T00:00:00Z"), outside),
        (with_field(&build, "created_at", "0000-01-01T00:00:00Z"), outside),
        (with_field(&build, "completed_at", "1969-12-31T23:59:59.999999Z"), outside),
        // the last instant of 9999 in that zone is in the year 10000 in UTC
        (with_field(&build, "completed_at", "9999-12-31T23:59:59-23:59"), outside),
        (with_field(&build, "completed_at", "-4714-01-01T00:00:00Z"), no_time),
        (with_field(&build, "completed_at", "+294277-01-01T00:00:00Z"), no_time),
        (with_field(&build, "completed_at", "+262143-12-31T23:59:59Z"), no_time),
        (with_field(&build, "completed_at", "99999-01-01T00:00:00Z"), no_time),
        (with_field(&build, "completed_at", "infinity"), no_time),
        (with_header(&usage, "ce_time", Some(b"0001-01-01T00:00:00Z")), outside),
        (with_header(&usage, "ce_publishedat", Some(b"0001-01-01T00:00:00Z")), outside),
    ];
    all_refused(rows, "rejected", "field").await;
    let mut edges = [self::build(DEPLOYMENT, 5), self::build(DEPLOYMENT, 6)];
    for (event, time) in
        edges.iter_mut().zip(["1970-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"])
    {
        let Payload::Build(build) = &mut event.payload else { unreachable!("it is a build") };
        (build.completed_at, build.started_at) =
            (time.parse().unwrap(), Some("1970-01-01T00:00:00Z".parse().unwrap()));
    }
    let recording = all_accepted(&edges.clone().map(|event| event.to_message())).await;
    let facts = events(&recording.ledger).await;
    assert!(edges.iter().all(|event| facts.contains(event)), "times are exact to the microsecond");
}

#[tokio::test]
async fn a_number_that_does_not_fit_is_rejected() {
    let (build, usage) = (build(DEPLOYMENT, 1), usage(DEPLOYMENT, 1));
    let count = |number: &str| with_body(&usage, format!("{{\"count\":{number}}}"));
    let rows = vec![
        (count("18446744073709551616"), "field count must be a whole number of 64 bits"),
        (count("99999999999999999999999999"), "field count must be a whole number of 64 bits"),
        (count("-1"), "field count must be a whole number of 64 bits"),
        (count("1.0"), "field count must be a whole number of 64 bits"),
        (count("1e3"), "field count must be a whole number of 64 bits"),
        (count("\"1\""), "field count must be a whole number of 64 bits"),
        (count("0"), "field count must be above 0"),
        (
            with_field(&build, "build_number", 1_i64 << 31),
            "field build_number must be between 1 and 2147483647",
        ),
        (
            with_field(&build, "build_number", i64::MIN),
            "field build_number must be between 1 and 2147483647",
        ),
        (
            with_field(&build, "build_number", 1.5),
            "field build_number must be a whole number of 64 bits",
        ),
        (
            with_field(&build, "daily_cost", u64::MAX),
            "field daily_cost must be a whole number of 64 bits",
        ),
    ];
    all_refused(rows, "rejected", "field").await;
    all_refused(vec![(count("1e999"), "number out of range")], "rejected", "json").await;
    // all 64 bits are valid, as in coderd's own uint64
    let mut most = self::usage(DEPLOYMENT, 4);
    let Payload::Usage(event) = &mut most.payload else { unreachable!("it is usage") };
    event.quantity = UsageQuantity::ManagedAgents(u64::MAX);
    let recording = all_accepted(&[most.to_message()]).await;
    assert!(events(&recording.ledger).await.contains(&most));
}

#[tokio::test]
async fn an_unknown_field_is_rejected() {
    let rows = vec![
        (with_field(&build(DEPLOYMENT, 1), "colour", "blue"), "unknown field \"colour\""),
        (with_field(&build(DEPLOYMENT, 1), "Status", "succeeded"), "unknown field \"Status\""),
        (with_field(&usage(DEPLOYMENT, 1), "runtime_ms", 1), "unknown field \"runtime_ms\""),
    ];
    all_refused(rows, "rejected", "unknown_field").await;
    // another CloudEvents attribute does not belong to the event's fields
    let mut traced = build(DEPLOYMENT, 1).to_message();
    traced.headers.push((
        "ce_traceparent".to_owned(),
        Some(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_vec()),
    ));
    all_accepted(&[traced]).await;
}

#[tokio::test]
async fn data_after_the_event_is_rejected() {
    let behind = |event: &Event, more: &str| {
        let mut message = event.to_message();
        message.payload.as_mut().unwrap().extend_from_slice(more.as_bytes());
        message
    };
    let event = usage(DEPLOYMENT, 1);
    let rows = ["{}", " null", "x", "\0"].map(|more| (behind(&event, more), "trailing characters"));
    all_refused(rows.into(), "rejected", "json").await;
    all_accepted(&[behind(&event, " \r\n\t")]).await;
}

#[tokio::test]
async fn a_usage_type_of_a_later_version_is_held() {
    let typed = |event_type: &str, n: u32| {
        with_header(&usage(DEPLOYMENT, n), "ce_type", Some(event_type.as_bytes()))
    };
    let rows = vec![
        (typed("dc_gpu_hours_v1", 1), "unknown event type \"dc_gpu_hours_v1\""),
        (typed("hb_ai_seats_v2", 2), "unknown event type \"hb_ai_seats_v2\""),
    ];
    all_refused(rows, "held", "unknown_event_type").await;
}

#[tokio::test]
async fn an_event_type_that_is_not_metered_is_rejected() {
    let foreign = with_header(&usage(DEPLOYMENT, 3), "ce_type", Some(b"gpu_hours_v1"));
    all_refused(vec![(foreign, "is not metered")], "rejected", "foreign_event_type").await;
}

#[tokio::test]
async fn an_id_with_another_content_is_a_conflict() {
    let first = usage(DEPLOYMENT, 1);
    let mut other = first.clone();
    let Payload::Usage(event) = &mut other.payload else { unreachable!("it is usage") };
    event.quantity = UsageQuantity::ManagedAgents(77);
    let recording = recorded(&[first.to_message(), other.to_message(), first.to_message()]).await;
    assert!(
        matches!(&recording.outcomes[1], Outcome::Refused(disposition, _, detail) if disposition == "conflict" && detail.contains("usage-1"))
    );
    assert_eq!(
        (&recording.outcomes[0], &recording.outcomes[2]),
        (&Outcome::Accepted, &Outcome::Duplicate)
    );
    assert_eq!(
        events(&recording.ledger).await.into_iter().filter(|event| *event == first).count(),
        1,
        "the first remains"
    );
}

#[tokio::test]
async fn text_that_is_too_long_is_rejected() {
    let (build, usage) = (build(DEPLOYMENT, 1), usage(DEPLOYMENT, 1));
    let rows = vec![
        (
            with_field(&build, "template_name", noise(4097)),
            "field template_name is longer than 4096 bytes",
        ),
        (
            with_header(&usage, "ce_failuremessage", Some(noise(4097).as_bytes())),
            "field failuremessage is longer than 4096 bytes",
        ),
        (
            with_header(&usage, "ce_id", Some(noise(1025).as_bytes())),
            "field id is longer than 1024 bytes",
        ),
        (
            with_header(&usage, "ce_id", Some(noise(4096).as_bytes())),
            "field id is longer than 1024 bytes",
        ),
    ];
    all_refused(rows, "rejected", "field").await;
    // the longest accepted values fit the ledger's indexes, even if they cannot be compressed
    let longest = with_header(&usage, "ce_id", Some(noise(1024).as_bytes()));
    all_accepted(&[with_field(&build, "template_name", noise(4096)), longest]).await;
}

/// Text that cannot be compressed.
fn noise(bytes: usize) -> String {
    let mut text = String::new();
    while text.len() < bytes {
        text += &Uuid::new_v4().simple().to_string();
    }
    text.truncate(bytes);
    text
}

#[tokio::test]
async fn an_event_in_another_types_topic_is_rejected() {
    let strays = [claim(DEPLOYMENT, 1), usage(DEPLOYMENT, 2)];
    let messages = strays.map(|event| event.to_message());
    let recording =
        recorded_as(&messages, |record| consumer::read_from(Topic::WorkspaceBuilds, record)).await;
    let detail = |event_type: &str, own: &str| {
        format!(
            "event type \"{event_type}\" belongs in {own}, not in tallyline.workspace-builds.v1"
        )
    };
    let refused =
        |detail| Outcome::Refused("rejected".to_owned(), "foreign_topic".to_owned(), detail);
    let expected = [
        refused(detail("prebuild_claimed_v1", "tallyline.prebuild-claims.v1")),
        refused(detail("dc_managed_agents_v1", "tallyline.agent-usage.v1")),
    ];
    assert_eq!(recording.outcomes, expected);
}

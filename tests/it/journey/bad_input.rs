//! Invalid records go through a real consumer: each becomes a row with its reason, and the
//! partition moves on.

use tallyline::event::{Event, Message, Payload, Topic, UsageQuantity};

use super::site::{Backend, Site};
use super::story::SOON;
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, build, register, usage};

#[tokio::test]
async fn bad_input_becomes_rows_and_later_records_are_recorded_on_kafka() {
    bad_input_becomes_rows_and_later_records_are_recorded(Backend::Kafka).await;
}

#[tokio::test]
async fn bad_input_becomes_rows_and_later_records_are_recorded_on_the_postgres_log() {
    bad_input_becomes_rows_and_later_records_are_recorded(Backend::Postgres).await;
}

/// A record that is not an accepted event.
#[derive(sqlx::FromRow)]
struct Refused {
    topic: String,
    log_offset: i64,
    disposition: String,
    cause: String,
    event_id: Option<String>,
    payload: Option<Vec<u8>>,
}

/// Uses one key, so that all are in one partition in this order.
fn keyed(message: Message) -> Message {
    Message { key: Some(b"one".to_vec()), ..message }
}

/// The event with this type or this body.
fn changed(event: &Event, event_type: Option<&str>, body: Option<&[u8]>) -> Message {
    let mut message = event.to_message();
    if let Some(event_type) = event_type {
        let header =
            message.headers.iter_mut().find(|(name, _)| name == "ce_type").expect("a type");
        header.1 = Some(event_type.as_bytes().to_vec());
    }
    message.payload = body.map(<[u8]>::to_vec);
    message
}

fn usage_records() -> Vec<Message> {
    let event = usage(DEPLOYMENT, 0);
    let mut other_body = event.clone();
    let Payload::Usage(other) = &mut other_body.payload else { unreachable!("it is usage") };
    other.quantity = UsageQuantity::ManagedAgents(77);
    let body = br#"{"count":1}"#;
    vec![
        event.to_message(),
        changed(&usage(DEPLOYMENT, 1), None, Some(b"{\"count\":1} and more")),
        changed(&usage(DEPLOYMENT, 2), None, Some(br#"{"count":1,"colour":"blue"}"#)),
        changed(&usage(DEPLOYMENT, 3), Some("dc_gpu_hours_v1"), Some(body)),
        changed(&usage(DEPLOYMENT, 4), Some("something_else_v1"), Some(body)),
        changed(&usage(DEPLOYMENT, 5), None, None),
        other_body.to_message(),
        event.to_message(),
        usage(DEPLOYMENT, 6).to_message(),
    ]
}

fn build_records() -> Vec<Message> {
    let event = build(DEPLOYMENT, 1);
    let (mut renamed, mut longer) = (event.clone(), event.clone());
    let (Payload::Build(name), Payload::Build(time)) = (&mut renamed.payload, &mut longer.payload)
    else {
        unreachable!("it is a build")
    };
    name.template_name = "another name is the same event".to_owned();
    time.completed_at += chrono::TimeDelta::microseconds(1);
    vec![
        event.to_message(),
        changed(&build(DEPLOYMENT, 2), None, Some(b"\0 no JSON")),
        changed(&build(DEPLOYMENT, 3), None, None),
        longer.to_message(),
        renamed.to_message(),
        usage(DEPLOYMENT, 7).to_message(),
        build(DEPLOYMENT, 4).to_message(),
    ]
}

async fn bad_input_becomes_rows_and_later_records_are_recorded(backend: Backend) {
    let site = Site::new(backend, "roles = ['consume']\n").await;
    register(&site.ledger, &[DEPLOYMENT]).await;
    let mut consumer = site.start("consume", &[]);
    for (topic, records) in
        [(Topic::AgentUsage, usage_records()), (Topic::WorkspaceBuilds, build_records())]
    {
        let places =
            site.log.append(topic, records.into_iter().map(keyed).collect()).await.unwrap();
        assert!(
            places.windows(2).all(|pair| pair[0].0 == pair[1].0 && pair[0].1 < pair[1].1),
            "one partition, in order: {places:?}"
        );
    }
    eventually(SOON, "the log is read to its ends", || site.has_read_all()).await;

    let rows: Vec<Refused> =
        sqlx::query_as("select topic, log_offset, disposition, cause, event_id, payload from reject order by topic desc, log_offset")
            .fetch_all(&site.database.pool)
            .await
            .unwrap();
    let summary: Vec<(&str, i64, &str, &str)> = rows
        .iter()
        .map(|row| {
            (row.topic.as_str(), row.log_offset, row.disposition.as_str(), row.cause.as_str())
        })
        .collect();
    let (builds, usages) = (Topic::WorkspaceBuilds.name(), Topic::AgentUsage.name());
    let expected = [
        (builds, 1, "rejected", "json"),
        (builds, 2, "rejected", "tombstone"),
        (builds, 3, "conflict", "conflict"),
        (builds, 5, "rejected", "foreign_topic"),
        (usages, 1, "rejected", "json"),
        (usages, 2, "rejected", "unknown_field"),
        (usages, 3, "held", "unknown_event_type"),
        (usages, 4, "rejected", "foreign_event_type"),
        (usages, 5, "rejected", "tombstone"),
        (usages, 6, "conflict", "conflict"),
    ];
    assert_eq!(summary, expected);
    assert_eq!(rows[0].payload.as_deref(), Some(&b"\0 no JSON"[..]), "kept as found");
    assert_eq!((rows[6].event_id.as_deref(), rows[8].payload.is_none()), (Some("usage-3"), true));

    // the first of each id remains, and so do the good ones after all these
    let accepted: Vec<(String, String)> = sqlx::query_as(
        "select id, quantity::text from usage_event union all select build_id::text, template_name from workspace_build order by 1",
    )
    .fetch_all(&site.database.pool)
    .await
    .unwrap();
    let name = |n: u32| uuid::Uuid::from_u128(0xb000_0000 + u128::from(n)).to_string();
    let expected = [
        (name(1), "template-1"),
        (name(4), "template-0"),
        ("usage-0".to_owned(), "1"),
        ("usage-6".to_owned(), "1"),
    ];
    assert_eq!(accepted, expected.map(|(id, value)| (id, value.to_owned())));

    let audit = site.command(&["audit", "--deep", "--output", "json"]).await;
    assert!(audit.status.success(), "{audit:?}");
    let report: serde_json::Value = serde_json::from_str(&audit.stdout).unwrap();
    let numbers = &report["joints"]
        .as_array()
        .unwrap()
        .iter()
        .find(|joint| joint["name"] == "log and ledger")
        .unwrap()["numbers"];
    let counts = ["records", "accepted", "duplicates", "conflicts", "rejects", "held"]
        .map(|name| numbers[name].as_i64().unwrap());
    assert_eq!(counts, [16, 4, 2, 2, 7, 1], "{report}");
    let status = site.command(&["status"]).await;
    for word in ["rejected", "held", "conflict", "tombstone", "unknown_event_type"] {
        assert!(status.stdout.contains(word), "{word} is not in {status:?}");
    }
    assert!(consumer.terminate(SOON).await.success(), "{}", consumer.stderr());
}

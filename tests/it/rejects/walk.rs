//! An operator's commands: a bad record is found, corrected, resubmitted, counted once and
//! published once. Held usage is admitted by the version that knows it.

use std::time::Duration;

use chrono::TimeDelta;
use serde_json::{Value, json};
use tallyline::clock::Clock;
use tallyline::coderd;
use tallyline::collectors::{Collector, Settings};
use tallyline::event::{Event, Message, Payload, PublishMarks, Topic, Usage, UsageQuantity};
use tallyline::ledger::{Ledger, books};
use tallyline::license::PublicKeys;
use tallyline::log::{Log, PostgresLogSettings};
use tallyline_sim::coderd::SchemaVersion;
use tempfile::NamedTempFile;

use super::{held_by_an_earlier_version, operations, operator, with, with_body};
use crate::journey::site::{Backend, Site};
use crate::publisher::world::{self, World};
use crate::support::coderd::Coderd;
use crate::support::eventually;
use crate::support::ledger::act;
use crate::support::process::Ended;

const SOON: Duration = Duration::from_secs(60);

/// The answer as JSON; it must end with that code.
fn answer(ended: &Ended, code: i32) -> Value {
    assert_eq!(ended.status.code(), Some(code), "{ended:?}");
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

/// Checks for exit code 4, these words, and an empty stdout.
fn assert_refused(ended: &Ended, words: &str) {
    assert_eq!((ended.status.code(), ended.stdout.as_str()), (Some(4), ""), "{ended:?}");
    assert!(ended.stderr.contains(words), "{words:?} is not in {ended:?}");
}

/// Kind and id of the differences, open entries and remarks between source and ledger.
fn source_joint(report: &Value) -> [Vec<(&str, &str)>; 3] {
    let joint = report["joints"]
        .as_array()
        .unwrap()
        .iter()
        .find(|joint| joint["name"] == "source and ledger")
        .unwrap();
    ["differences", "open", "remarks"].map(|kind| {
        joint[kind]
            .as_array()
            .unwrap()
            .iter()
            .map(|row| (row["kind"].as_str().unwrap(), row["id"].as_str().unwrap()))
            .collect()
    })
}

#[tokio::test]
async fn a_bad_record_is_corrected_and_counted_once_on_kafka() {
    a_bad_record_is_corrected_and_counted_once(Backend::Kafka).await;
}

#[tokio::test]
async fn a_bad_record_is_corrected_and_counted_once_on_the_postgres_log() {
    a_bad_record_is_corrected_and_counted_once(Backend::Postgres).await;
}

async fn a_bad_record_is_corrected_and_counted_once(backend: Backend) {
    let coderd = Coderd::new(SchemaVersion::Sep2026).await;
    let at = coderd.now().await;
    for id in ["usage-1", "usage-2"] {
        coderd.usage(id, "dc_managed_agents_v1", json!({"count": 3}), at).await;
    }
    let more = format!(
        "roles = ['consume']\nsource.coderd_url = '{}'\nsource.deployment_id = '{}'\n",
        coderd.database.url, coderd.deployment
    );
    let site = Site::new(backend, &more).await;
    let mut consumer = site.start("consume", &[]);
    // a foreign producer writes coderd's rows with an unknown field
    let bad = ["usage-1", "usage-2"]
        .map(|id| with_body(&agents(&coderd, id, at), r#"{"count": 3, "colour": "blue"}"#));
    site.log.append(Topic::AgentUsage, bad.to_vec()).await.unwrap();
    eventually(SOON, "the log is read to its end", || site.has_read_all()).await;

    // the collector does not append rows that are among the rejects
    let mut collector = collector(&coderd, &site).await;
    let pass = collector.pass().await.unwrap();
    assert_eq!(pass.usage, 0, "{pass:?}");
    eventually(SOON, "the pass is read", || site.has_read_all()).await;
    let audit = ["audit", "--patience", "0", "--output", "json"];
    let report = answer(&site.command(&audit).await, 0);
    assert_eq!(
        source_joint(&report),
        [vec![], vec![("rejected", "usage-1"), ("rejected", "usage-2")], vec![]]
    );

    let list = answer(&site.command(&["rejects", "list", "--output", "json"]).await, 0);
    let [first, second] = list["rejects"].as_array().unwrap().as_slice() else { panic!("{list}") };
    let numbers: Vec<String> = [first, second].map(|row| row["id"].to_string()).to_vec();
    let corrected = if first["event_id"] == "usage-1" { 0 } else { 1 };
    let row = &list["rejects"][corrected];
    assert_eq!(
        json!([row["disposition"], row["cause"], row["units"], row["unit"]]),
        json!(["rejected", "unknown_field", 3, "agents"])
    );
    assert_eq!(row["payload"]["text"], r#"{"count": 3, "colour": "blue"}"#);
    let groups =
        answer(&site.command(&["rejects", "list", "--by", "cause", "--output", "json"]).await, 0);
    let group = &groups["groups"][0];
    assert_eq!(
        json!([group["value"], group["records"], group["units"]]),
        json!(["unknown_field", 2, {"agents": 6}])
    );
    let table = site.command(&["rejects", "list"]).await.stdout;
    for word in ["usage-1", "unknown_field", "3 agents", "tallyline.agent-usage.v1/"] {
        assert!(table.contains(word), "{word} is not in {table}");
    }

    let id = &numbers[corrected];
    let page = site.command(&["rejects", "show", id]).await.stdout;
    for word in [
        "unknown field \"colour\"",
        "ce_id",
        "if resubmitted",
        "\n{\"count\": 3, \"colour\": \"blue\"}\n",
    ] {
        assert!(page.contains(word), "{word} is not in {page}");
    }
    assert_refused(&site.command(&["rejects", "resubmit", id]).await, "would be rejected again");
    let dry = answer(
        &site.command(&["rejects", "resubmit", id, "--dry-run", "--output", "json"]).await,
        0,
    );
    assert_eq!(json!([dry["dry_run"], dry["records"][0]["predicted"]]), json!([true, "rejected"]));

    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "{\"count\": 3}\n").unwrap();
    let edit = file.path().to_str().unwrap();
    let words = [
        "rejects",
        "resubmit",
        id,
        "--edit",
        edit,
        "--as",
        "operator-1",
        "--reason",
        "a field too many",
        "--output",
        "json",
    ];
    let resubmitted = answer(&site.command(&words).await, 0);
    let record = &resubmitted["records"][0];
    assert_eq!(
        json!([record["event_id"], record["predicted"], record["ended"]]),
        json!(["usage-1", "accepted", true])
    );
    eventually(SOON, "the event is accepted", || async { site.accepted().await == 1 }).await;

    let detail = answer(&site.command(&["rejects", "show", id, "--output", "json"]).await, 0);
    let act = &detail["acts"][0];
    assert_eq!(
        json!([detail["state"], detail["acts"].as_array().unwrap().len()]),
        json!(["resubmitted", 1])
    );
    assert_eq!(
        json!([act["act"], act["actor"], act["reason"], act["ended_it"]]),
        json!(["resubmit", "operator-1", "a field too many", true])
    );
    assert_eq!(
        (act["detail"]["edit"].as_str(), detail["accepted_sequence"].is_string()),
        (Some("{\"count\": 3}\n"), true)
    );
    assert_refused(&site.command(&words).await, "is not open");
    assert_refused(&site.command(&["rejects", "show", "99"]).await, "reject 99 does not exist");

    // the other one is discarded: the audit reports it, without a difference
    let other = &numbers[1 - corrected];
    let nameless = site.command(&["rejects", "discard", other]).await;
    assert!(
        nameless.status.code() == Some(2) && nameless.stderr.contains("reason"),
        "{nameless:?}"
    );
    assert_eq!(
        site.command(&["rejects", "discard", other, "--reason", "not needed"]).await.status.code(),
        Some(0)
    );
    assert_eq!(site.command(&["rejects", "list"]).await.stdout, "none\n");
    let report = answer(&site.command(&audit).await, 0);
    assert_eq!(source_joint(&report), [vec![], vec![], vec![("discarded", "usage-2")]]);
    // the discarded record was not coderd's own row: that one comes with the next pass
    assert_eq!(collector.pass().await.unwrap().usage, 1);
    eventually(SOON, "the pass is read", || site.has_read_all()).await;
    assert_eq!(source_joint(&answer(&site.command(&audit).await, 0)), [vec![], vec![], vec![]]);
    let counted: (i64, i64, i64) = sqlx::query_as(
        "select (select count(*) from usage_event where quantity = 3), (select count(*) from publication where state = 'pending'),
             (select sum(duplicates) from batch)::bigint",
    )
    .fetch_one(&site.database.pool)
    .await
    .unwrap();
    assert_eq!(counted, (2, 2, 0));
    assert!(consumer.terminate(SOON).await.success(), "{}", consumer.stderr());
}

fn agents(coderd: &Coderd, id: &str, created_at: chrono::DateTime<chrono::Utc>) -> Event {
    let usage = Usage {
        id: id.to_owned(),
        quantity: UsageQuantity::ManagedAgents(3),
        created_at,
        marks: PublishMarks::default(),
    };
    Event { deployment: coderd.deployment, payload: Payload::Usage(usage) }
}

async fn collector(coderd: &Coderd, site: &Site) -> Collector {
    let settings = Settings {
        margin: TimeDelta::zero(),
        deployment_id: Some(coderd.deployment),
        ..Settings::new("test")
    };
    let source = coderd::Database::new(&coderd.database.url, Duration::from_secs(30)).unwrap();
    let opened = Collector::open(
        settings,
        source,
        PublicKeys::new(),
        site.log.clone(),
        site.ledger.clone(),
        Clock::system(),
    )
    .await;
    opened.unwrap().expect("the source is free")
}

#[tokio::test]
async fn a_consumer_that_knows_the_type_admits_held_usage_at_its_start_on_kafka() {
    a_consumer_that_knows_the_type_admits_held_usage_at_its_start(Backend::Kafka).await;
}

#[tokio::test]
async fn a_consumer_that_knows_the_type_admits_held_usage_at_its_start_on_the_postgres_log() {
    a_consumer_that_knows_the_type_admits_held_usage_at_its_start(Backend::Postgres).await;
}

async fn a_consumer_that_knows_the_type_admits_held_usage_at_its_start(backend: Backend) {
    let site = Site::new(backend, "roles = ['consume']\n").await;
    crate::support::ledger::register(&site.ledger, &[crate::support::ledger::DEPLOYMENT]).await;
    let event = crate::support::ledger::usage(crate::support::ledger::DEPLOYMENT, 1);
    let operators = super::Site {
        operations: operations(&site.ledger, &site.log),
        database: crate::support::database().await,
    };
    // all with one key, so all in one partition
    let placed = site.log.append(Topic::AgentUsage, vec![event.to_message()]).await.unwrap();
    held_by_an_earlier_version(&operators, placed[0].0).await;
    let mut consumers = [site.start("consume", &[]), site.start("consume", &[])];
    eventually(SOON, "the event is accepted", || async { site.accepted().await == 1 }).await;
    eventually(SOON, "it is read to the end", || site.has_read_all()).await;
    let rows = operators.list("all").await;
    let acts: Vec<_> = rows[0]
        .acts
        .iter()
        .map(|act| (act.act.as_str(), act.actor.as_str(), act.ended_it))
        .collect();
    assert_eq!((rows.len(), rows[0].state.as_str()), (1, "admitted"));
    assert_eq!(acts, [("admit", concat!("tallyline ", env!("CARGO_PKG_VERSION")), true)]);
    let audit = site.command(&["audit"]).await;
    assert!(audit.status.success(), "{audit:?}");
    for consumer in &mut consumers {
        assert!(consumer.terminate(SOON).await.success(), "{}", consumer.stderr());
    }
    let by_hand = answer(&site.command(&["rejects", "admit", "--output", "json"]).await, 0);
    assert_eq!(by_hand, json!({"records": 0, "refused": 0, "left": 0}));
}

#[tokio::test]
async fn corrected_usage_is_published_and_billed_once() {
    let world = World::new().await;
    let log = Log::postgres(world.ledger.pool.clone(), PostgresLogSettings::default());
    log.create_topics(1).await.unwrap();
    let site = super::Site {
        operations: operations(&world.ledger, &log),
        database: crate::support::database().await,
    };
    let usage = world::usage("agent-1", world::start_time());
    sqlx::query(
        "insert into usage_events (id, event_type, event_data, created_at) values ($1, $2, $3, $4)",
    )
    .bind(&usage.id)
    .bind(usage.quantity.usage_type().as_str())
    .bind(usage.quantity.to_data())
    .bind(usage.created_at)
    .execute(&world.coderd)
    .await
    .unwrap();
    let event = Event { deployment: world::DEPLOYMENT, payload: Payload::Usage(usage) };
    let bad: Message = with_body(&event, "{\"count\": 1");
    assert_eq!(site.take(vec![bad]).await.rejects, 1);
    world.cycle().await;
    assert_eq!(world.times_billed("agent-1"), 0);

    let id = site.list("open").await[0].id;
    let ledger: &Ledger = &world.ledger;
    act(&site.operations, &with(id, "{\"count\": 1}"), &operator()).await.unwrap();
    assert_eq!(site.consume().await.accepted, 1);
    world.cycle().await;
    assert_eq!(
        (world.state("agent-1").await.0.as_str(), world.times_billed("agent-1")),
        ("published", 1)
    );
    world.cycle().await;
    assert_eq!(world.times_billed("agent-1"), 1);
    assert_eq!(ledger.run(books::add_up).await.unwrap().differences, []);
}

//! The deep audit on both logs. It names every change, removal or addition by hand; an unchanged
//! ledger has no difference.

use std::time::Duration;

use tallyline::audit::{Audit, AuditReport};
use tallyline::clock::Clock;
use tallyline::consumer;
use tallyline::event::{Event, Message, Payload, RejectCause, Topic, TopicPartition};
use tallyline::ledger::{
    Arrival, Chain, Disposition, Ledger, LedgerSettings, Refusal, ReplayRange, Settlement,
    publications, replays,
};
use tallyline::log::{KafkaSettings, Log, PostgresLogSettings, Record};
use tallyline::operations::{Actor, LogRange, ReplayExecution, Resubmit, Step};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::export::publish;
use crate::support::ledger::{
    DEPLOYMENT, OTHER_DEPLOYMENT, act, ask, event, lease_partition, migrated, noon, operations,
    record_batch, register,
};
use crate::support::{self, Database};

/// A log with events of each type, one of them twice, a conflict, a reject and a held record. It
/// has no ledger.
struct Written {
    log: Log,
    _database: Option<Database>,
}

/// A ledger that has read the whole log.
struct Books {
    ledger: Ledger,
    log: Log,
    database: Database,
}

const EVENTS: u32 = 12;

/// The same id with other content.
fn conflicting(event: &Event) -> Event {
    let mut event = event.clone();
    let Payload::Build(build) = &mut event.payload else { panic!("a build") };
    build.build_number += 1000;
    event
}

fn held() -> Message {
    let text = |text: &str| Some(text.as_bytes().to_vec());
    let headers = [
        ("ce_specversion", "1.0"),
        ("ce_id", "gpu"),
        ("ce_source", &format!("/coder/{DEPLOYMENT}")),
        ("ce_type", "dc_gpu_v1"),
        ("ce_time", "2025-08-01T12:00:00Z"),
        ("content-type", "application/json"),
    ];
    let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), text(value))).collect();
    Message { key: text("k"), headers, payload: text("{}"), ..Message::default() }
}

impl Written {
    async fn kafka() -> Written {
        let kafka = support::kafka();
        let settings = KafkaSettings {
            topic_prefix: kafka.prefix.clone(),
            ..KafkaSettings::new(&kafka.brokers)
        };
        Written::on(Log::kafka(settings).unwrap(), None).await
    }

    async fn postgres() -> Written {
        let database = migrated().await;
        Written::on(
            Log::postgres(database.pool.clone(), PostgresLogSettings::default()),
            Some(database),
        )
        .await
    }

    async fn on(log: Log, database: Option<Database>) -> Written {
        log.create_topics(1).await.unwrap();
        for topic in Topic::ALL {
            let mut messages: Vec<Message> =
                (0..EVENTS).map(|n| event(topic, n).to_message()).collect();
            messages.push(event(topic, 3).to_message());
            messages.push(Message { payload: Some(b"no event".to_vec()), ..messages[0].clone() });
            match topic {
                Topic::WorkspaceBuilds => messages.push(conflicting(&event(topic, 4)).to_message()),
                Topic::PrebuildClaims => {}
                Topic::AgentUsage => messages.push(held()),
            }
            log.append(topic, messages).await.unwrap();
        }
        Written { log, _database: database }
    }

    /// Reads the log into a new ledger, in two batches a topic. Publishes one event, and settles
    /// another as published by coderd.
    async fn books(&self) -> Books {
        let books = self.unread().await;
        let ledger = &books.ledger;
        for topic in Topic::ALL {
            books.read(topic, 7, consumer::read).await;
            books.read(topic, 1000, consumer::read).await;
        }
        let source_id: i16 = sqlx::query_scalar("select id from source where deployment_id = $1")
            .bind(DEPLOYMENT)
            .fetch_one(&ledger.pool)
            .await
            .unwrap();
        publish(ledger, source_id, "usage-1").await;
        let settled = ledger
            .run(async |conn| {
                publications::settle(
                    conn,
                    source_id,
                    "me",
                    &["usage-2".to_owned()],
                    Settlement::NotOurs,
                    ledger.clock.now(),
                )
                .await
            })
            .await
            .unwrap();
        assert_eq!(settled.not_ours, 1);
        books
    }

    async fn unread(&self) -> Books {
        let books = Books::on(migrated().await, self.log.clone());
        register(&books.ledger, &[DEPLOYMENT, OTHER_DEPLOYMENT]).await;
        books
    }
}

impl Books {
    fn on(database: Database, log: Log) -> Books {
        let ledger = Ledger::open(
            &LedgerSettings { url: database.url.clone(), connections: 4 },
            Clock::manual(noon()),
        )
        .unwrap();
        Books { ledger, log, database }
    }

    /// Ends all connections, so that the ledger can be copied.
    async fn close(&self) {
        self.ledger.pool.close().await;
        self.database.pool.close().await;
    }

    async fn copy(&self) -> Books {
        let server = support::setting("TALLYLINE_TEST_POSTGRES");
        let database = support::database_like(&server, &self.database.name).await;
        Books::on(database, self.log.clone())
    }

    /// Records the topic's next records, as parsed by `read`.
    async fn read(&self, topic: Topic, limit: usize, read: impl Fn(Record) -> Arrival) {
        let claim =
            lease_partition(&self.ledger, TopicPartition { topic, partition: 0 }, 0).await.unwrap();
        let records = self.log.read(claim.partition, claim.next_offset, limit).await.unwrap();
        let next_offset = records.last().unwrap().offset + 1;
        let arrivals: Vec<_> = records.into_iter().map(read).collect();
        record_batch(&self.ledger, &Chain::Live(claim), &arrivals, next_offset).await.unwrap();
    }

    async fn audit(&self) -> AuditReport {
        let audit = Audit {
            ledger: self.ledger.clone(),
            log: self.log.clone(),
            source: None,
            patience: Duration::ZERO,
        };
        let ranges = audit.rereadable().await.unwrap();
        let done = std::cell::Cell::new(0);
        let joint = audit.deep(&ranges, |offsets| done.set(done.get() + offsets)).await.unwrap();
        let all: i64 = ranges.iter().map(|range| range.until - range.from).sum();
        assert_eq!(i64::try_from(done.get()).unwrap(), all, "progress reaches the end");
        let until = audit.head().await.unwrap();
        let chain = audit.chained(until, None, |_| ()).await.unwrap();
        audit.run().await.unwrap().with(chain).with(joint)
    }

    async fn tamper(&self, statement: &'static str) {
        sqlx::raw_sql(statement)
            .execute(&self.ledger.pool)
            .await
            .unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

/// Kind, id and detail of every difference.
fn differences(report: &AuditReport) -> Vec<(&str, &str, &str)> {
    let rows = report.joints.iter().flat_map(|joint| &joint.differences);
    let rows: Vec<_> = rows.map(|row| (&*row.kind, row.id.as_str(), row.detail.as_str())).collect();
    assert_eq!(report.balanced, rows.is_empty());
    rows
}

/// A change of the ledger, the kind of difference, the start of its id, and words of its detail.
type Row = (&'static str, &'static str, String, &'static str);

fn rows() -> Vec<Row> {
    let build = |n| event(Topic::WorkspaceBuilds, n).id();
    let claim = |n| event(Topic::PrebuildClaims, n).id();
    let usage = |n| event(Topic::AgentUsage, n).id();
    let any = |text: &str| text.to_owned();
    vec![
        // a column of each event table, in the digest or not
        ("update workspace_build set owner_name = 'x' where log_offset = 0", "event_changed", build(0), "owner_name: differs from"),
        ("update workspace_build set daily_cost = 77 where log_offset = 8", "event_changed", build(8), "daily_cost: differs from"),
        (
            "update workspace_build set completed_at = completed_at + interval '1 microsecond' where log_offset = 1",
            "event_changed",
            build(1),
            "completed_at: differs from",
        ),
        ("update workspace_build set transition = 'delete' where log_offset = 1", "event_changed", build(1), "transition"),
        ("update workspace_build set stage = 'create' where log_offset = 1", "event_changed", build(1), "stage"),
        ("update workspace_build set digest = decode(repeat('00', 32), 'hex') where log_offset = 2", "event_changed", build(2), "digest"),
        ("update workspace_build set log_offset = 5 where log_offset = 2", "event_without_record", build(2), "another event"),
        ("update workspace_build set log_offset = 500 where log_offset = 2", "event_outside_its_batch", build(2), "offset 500"),
        ("update workspace_build set source_id = 99 where log_offset = 2", "event_unreadable", build(2), "names source 99"),
        ("update prebuild_claim set claimed_by = gen_random_uuid() where log_offset = 0", "event_changed", claim(0), "claimed_by: differs from"),
        ("update usage_event set quantity = quantity + 1 where log_offset = 0", "event_changed", usage(0), "quantity"),
        ("update usage_event set created_at = created_at - interval '1 day' where log_offset = 0", "event_changed", usage(0), "created_at"),
        ("update usage_event set event_type = 'hb_agent_runtime_v1' where log_offset = 0", "event_changed", usage(0), "event_type"),
        ("update usage_event set published_at = now() where log_offset = 0", "event_changed", usage(0), "published_at: differs from"),
        // a missing row of each
        ("delete from workspace_build where log_offset = 3", "event_missing", build(3), "neither"),
        ("delete from prebuild_claim where log_offset = 1", "event_missing", claim(1), "neither"),
        ("delete from usage_event where log_offset = 1", "event_missing", usage(1), "neither"),
        ("delete from usage_event where log_offset = 1", "batch_without_its_events", any("batch "), "accepted"),
        // a forged row of each
        (
            "update workspace_build set build_id = 'ffffffff-0000-0000-0000-000000000000' where log_offset = 3",
            "event_without_record",
            any("workspace_build_completed:ffffffff-0000"),
            "another event",
        ),
        (
            "insert into prebuild_claim (source_id, build_id, batch_id, log_offset, digest, workspace_id, organization_id, template_id,
                 template_version_id, claimed_by, initiator_id, build_number, status, created_at, completed_at, organization_name,
                 template_name, preset_name)
             select source_id, 'ffffffff-0000-0000-0000-000000000000', batch_id, log_offset, digest, workspace_id, organization_id, template_id,
                 template_version_id, claimed_by, initiator_id, build_number, status, created_at, completed_at, organization_name,
                 template_name, preset_name from prebuild_claim where log_offset = 2",
            "event_without_record",
            any("prebuild_claimed:ffffffff-0000"),
            "another event",
        ),
        (
            "insert into usage_event (source_id, id, batch_id, log_offset, digest, event_type, quantity, created_at)
             select source_id, 'forged', batch_id, log_offset, digest, event_type, quantity, created_at from usage_event where log_offset = 2",
            "event_without_record",
            any("forged"),
            "another event",
        ),
        (
            "insert into usage_event (source_id, id, batch_id, log_offset, digest, event_type, quantity, created_at)
             select source_id, 'forged', 9999, 9999, digest, event_type, quantity, created_at from usage_event where log_offset = 2",
            "digest_differs",
            any("forged"),
            "do not match the digest",
        ),
        // rejects, conflicts and held records
        ("update reject set payload = 'other' where disposition = 'rejected'", "reject_changed", any("reject "), "payload: differs from"),
        ("update reject set headers = '[]' where disposition = 'held'", "reject_changed", any("reject "), "headers: differs from"),
        ("update reject set disposition = 'conflict' where disposition = 'rejected'", "reject_changed", any("reject "), "the reject has conflict"),
        ("update reject set event_id = 'x' where disposition = 'held'", "reject_changed", any("reject "), "event_id: differs from"),
        ("update reject set record_timestamp = now() where disposition = 'conflict'", "reject_changed", any("reject "), "record_timestamp"),
        ("delete from reject where disposition = 'rejected' and topic like '%claims%'", "reject_missing", any("tallyline.prebuild-claims"), "not a valid event"),
        ("delete from reject where disposition = 'held'", "reject_missing", any("tallyline.agent-usage"), "not a valid event"),
        ("delete from reject where disposition = 'conflict'", "conflict_missing", build(4), "has other content"),
        ("update reject set log_offset = 0 where disposition = 'conflict'", "reject_of_an_event", any("reject "), "is accepted as"),
        ("update reject set log_offset = 0 where disposition = 'held'", "reject_of_an_event", any("reject "), "is accepted as"),
        ("update reject set log_offset = 12 where disposition = 'conflict'", "conflict_with_the_same", build(3), "has the same content"),
        // rows that refer to events
        ("delete from workspace_first_start", "build_without_its_first_start", any("workspace_build_completed:"), "first start"),
        ("update workspace_first_start set build_id = gen_random_uuid()", "first_start_without_its_build", any("workspace_build_"), "no such accepted build"),
        (
            "update publication set event_created_at = now() where event_id = 'usage-0'",
            "publication_changed",
            usage(0),
            "event_created_at: differs from",
        ),
        (
            "update publication set state = 'expired' where event_id = 'usage-0'",
            "publication_off_its_settlement",
            usage(0),
            "state is expired, but its newest settlement has pending",
        ),
        ("delete from settlement where state = 'published'", "publication_off_its_settlement", usage(1), "newest settlement has pending"),
        (
            "insert into settlement (source_id, event_id, batch_id, state) select 1, 'usage-0', id, 'expired' from batch where settled = 1;
             update publication set state = 'expired' where event_id = 'usage-0'",
            "batch_off_its_settlements",
            any("batch "),
            "the batch counts 1 settled without the vendor, rows 2",
        ),
        ("update settlement set batch_id = 1 where state = 'published'", "batch_off_its_settlements", any("batch 1"), "counts 0 settled"),
        (
            "insert into settlement (source_id, event_id, batch_id, state) select 1, 'forged', id, 'published' from batch where settled = 1",
            "settlement_of_no_publication",
            any("forged"),
            "not queued",
        ),
        ("update publication set attempts = 7 where event_id = 'usage-0'", "publication_off_its_attempts", usage(0), "counted 7, rows 0"),
        ("update publication set state = 'expired' where state = 'published'", "publication_without_its_answer", usage(1), "no recorded answer"),
        ("delete from publication where event_id = 'usage-0'", "usage_without_publication", usage(0), "not queued"),
        (
            "insert into publication (source_id, event_id, event_created_at, queued_batch_id, next_attempt_at)
             values (1, 'forged', now(), 1, now())",
            "usage_without_publication",
            any("forged"),
            "not accepted",
        ),
        ("delete from publication_attempt", "publication_off_its_attempts", usage(1), "counted 1, rows 0"),
        ("update publication_attempt set verdict = null", "request_off_its_attempts", any("request "), "verdict"),
        ("update publication_request set events = 5", "request_off_its_attempts", any("request "), "counted 5, rows 1"),
        // the books of the chain
        ("update batch set accepted = accepted + 1, duplicates = duplicates - 1 where duplicates > 0", "batch_without_its_events", any("batch "), "accepted"),
        ("delete from batch where topic like '%claims%' and first_offset > 0", "event_without_its_batch", claim(11), "does not exist"),
        ("update position set last_offset = last_offset - 1 where topic like '%claims%'", "another_record", any("tallyline.prebuild-claims"), "offset"),
    ]
}

async fn each_is_named(written: Written) {
    let books = written.books().await;
    let untouched = books.audit().await;
    assert_eq!(differences(&untouched), []);
    let deep = untouched.joints.last().unwrap();
    for (number, expected) in [
        ("records_read_again", 3 * 14 + 2),
        ("builds_checked_by_their_digests", 12),
        ("claims_checked_by_their_digests", 12),
        ("usage_checked_by_its_digests", 12),
    ] {
        assert_eq!(deep.numbers[number], expected, "{number}");
    }
    books.close().await;
    let mut missed = Vec::new();
    for (statement, kind, id, words) in rows() {
        let books = books.copy().await;
        books.tamper(statement).await;
        let report = books.audit().await;
        let actual = differences(&report);
        let named = actual
            .iter()
            .any(|row| row.0 == kind && row.1.starts_with(&id) && row.2.contains(words));
        if !named {
            missed.push(format!("{statement}: expected {kind} {id} {words:?}, found {actual:#?}"));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[tokio::test]
async fn every_manual_change_is_named_on_kafka() {
    each_is_named(Written::kafka().await).await;
}

#[tokio::test]
async fn every_manual_change_is_named_on_the_postgres_log() {
    each_is_named(Written::postgres().await).await;
}

#[tokio::test]
async fn events_without_a_record_are_checked_by_digest_and_others_by_record() {
    let written = Written::postgres().await;
    let books = written.books().await;
    let log = &written._database.as_ref().unwrap().pool;
    sqlx::raw_sql(
        "delete from log_record where record_offset < 6; update log_partition set start_offset = 6",
    )
    .execute(log)
    .await
    .unwrap();
    let report = books.audit().await;
    assert_eq!(differences(&report), []);
    assert_eq!(report.joints.last().unwrap().numbers["records_read_again"], 3 * (14 - 6) + 2);
    books
        .tamper(
            "update workspace_build set owner_name = 'x' where log_offset = 7; update usage_event set quantity = 99 where log_offset = 0",
        )
        .await;
    let report = books.audit().await;
    let actual: Vec<_> =
        differences(&report).into_iter().map(|(kind, id, _)| (kind, id.to_owned())).collect();
    let build = event(Topic::WorkspaceBuilds, 7).id();
    let changed = [("row_changed", build.clone()), ("event_changed", build)];
    assert_eq!(actual[..2], changed);
    assert_eq!(actual[2..], [("digest_differs", event(Topic::AgentUsage, 0).id())]);
}

/// A version that holds the first record and refuses the second.
fn earlier(record: Record) -> Arrival {
    let (disposition, cause) = match record.offset {
        0 => (Disposition::Held, RejectCause::UnknownEventType),
        1 => (Disposition::Rejected, RejectCause::Field),
        _ => return consumer::read(record),
    };
    Arrival {
        event: Err(Refusal { disposition, cause, detail: "an earlier version".into() }),
        ..consumer::read(record)
    }
}

/// Kind and id of the open entries in the ledger's rows.
fn open(report: &AuditReport) -> Vec<(&str, &str)> {
    report.joints.last().unwrap().open.iter().map(|row| (&*row.kind, row.id.as_str())).collect()
}

async fn rejects(books: &Books) -> Vec<i64> {
    sqlx::query_scalar(
        "select id from reject where detail = 'an earlier version' order by log_offset",
    )
    .fetch_all(&books.ledger.pool)
    .await
    .unwrap()
}

const USAGE: TopicPartition = TopicPartition { topic: Topic::AgentUsage, partition: 0 };

#[tokio::test]
async fn a_reject_whose_event_a_replay_accepted_is_open_work_and_not_a_difference() {
    let written = Written::postgres().await;
    let books = written.unread().await;
    books.read(Topic::AgentUsage, 1000, earlier).await;
    assert_eq!((differences(&books.audit().await), open(&books.audit().await)), (vec![], vec![]));

    let operations = operations(&books.ledger, &books.log);
    let (stop, actor) =
        (CancellationToken::new(), Actor { name: "sre-1".into(), reason: "an upgrade".into() });
    let range = LogRange {
        topics: vec![USAGE.topic.name().into()],
        from: "earliest".into(),
        until: "latest".into(),
    };
    let plan = ask(&operations, &range).await.unwrap();
    let execution = ReplayExecution { hash: plan.hash, records_per_second: None };
    assert_eq!(
        operations.execute_replay(&execution, &actor, &|_: Step| {}, &stop).await.unwrap().accepted,
        2
    );
    let ids = rejects(&books).await;
    let named: Vec<String> = ids.iter().map(|id| format!("reject {id}")).collect();
    let report = books.audit().await;
    assert_eq!(differences(&report), []);
    assert_eq!(
        open(&report),
        [("accepted_after_all", named[0].as_str()), ("accepted_after_all", named[1].as_str())]
    );

    let resubmit = Resubmit { ids, ..Resubmit::default() };
    let done = act(&operations, &resubmit, &actor).await.unwrap();
    assert!(done.records.iter().all(|record| record.ended && record.place.is_none()), "{done:?}");
    let report = books.audit().await;
    assert_eq!((differences(&report), open(&report)), (vec![], vec![]));

    // a change by hand is never excused: an event's conflict is not the event
    books
        .tamper("update reject set disposition = 'conflict' where detail = 'an earlier version'")
        .await;
    let report = books.audit().await;
    let named =
        differences(&report).into_iter().filter(|(kind, ..)| *kind == "reject_of_an_event").count();
    assert_eq!(named, 2, "{report:?}");
}

#[tokio::test]
async fn a_reject_of_a_replay_that_ran_ahead_of_a_later_version_is_not_a_difference() {
    let written = Written::postgres().await;
    let books = written.unread().await;
    let range = ReplayRange {
        partition: USAGE,
        generation: 1,
        first_offset: 0,
        next_offset: 0,
        end_offset: 5,
    };
    let id = Uuid::new_v4();
    books
        .ledger
        .run(async |conn| {
            replays::save(
                conn,
                id,
                "a hash",
                &serde_json::json!({}),
                &serde_json::json!({}),
                &[range],
                books.ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap();
    let arrivals: Vec<_> =
        books.log.read(USAGE, 0, 5).await.unwrap().into_iter().map(earlier).collect();
    let chain = Chain::Replay { id, partition: USAGE, generation: 1, next_offset: 0 };
    assert_eq!(record_batch(&books.ledger, &chain, &arrivals, 5).await.unwrap().accepted, 3);
    books.read(USAGE.topic, 1000, consumer::read).await;
    let report = books.audit().await;
    assert_eq!(differences(&report), []);
    assert_eq!((open(&report).len(), rejects(&books).await.len()), (2, 2));
}

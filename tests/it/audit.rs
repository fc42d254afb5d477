//! The audit on real databases: balanced books, and each way to unbalance them, reported by its id.

use std::time::Duration;

use chrono::TimeDelta;
use serde_json::json;
use tallyline::audit::{Audit, AuditReport, AuditTelemetry, Continuous};
use tallyline::clock::Clock;
use tallyline::coderd;
use tallyline::collectors::{Collector, Settings};
use tallyline::consumer;
use tallyline::event::{
    Event, Message, PREBUILDS_USER, Payload, PrebuildClaimed, Topic, TopicPartition, parse,
};
use tallyline::ledger::{Chain, Finding, Ledger, LedgerSettings, findings};
use tallyline::license::PublicKeys;
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::{
    Actor, LogRange, OperationError, Operations, ReplayExecution, RunAudit, Step,
};
use tallyline_sim::coderd::SchemaVersion;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::support::coderd::{Build, Coderd};
use crate::support::ledger::{
    ask, discard_all, lease_partition, migrated, operations, record_batch,
};
use crate::support::{Database, eventually};

/// A deployment with a creation, a claimed prebuild and a usage event, collected and consumed.
pub struct Site {
    pub coderd: Coderd,
    pub collector: Collector,
    pub ledger: Ledger,
    pub log: Log,
    pub creation: Uuid,
    pub claim: Uuid,
    pub database: Database,
}

impl Site {
    pub async fn new() -> Site {
        let (coderd, database) = (Coderd::new(SchemaVersion::Sep2026).await, migrated().await);
        let ledger = Ledger::open(
            &LedgerSettings { url: database.url.clone(), connections: 4 },
            Clock::system(),
        )
        .unwrap();
        let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
        log.create_topics(1).await.unwrap();
        let creation = coderd.creation().await;
        let pool = coderd.workspace().await;
        coderd
            .build(&Build { initiator: PREBUILDS_USER, stage: 1, ..coderd.first_start(pool).await })
            .await;
        let claim =
            coderd.build(&Build { number: 2, stage: 2, ..coderd.first_start(pool).await }).await;
        let now = coderd.now().await;
        coderd.usage("usage-1", "dc_managed_agents_v1", json!({"count": 1}), now).await;
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
            log.clone(),
            ledger.clone(),
            Clock::system(),
        )
        .await;
        let collector = opened.unwrap().expect("the source is free");
        let mut site = Site { coderd, collector, ledger, log, creation, claim, database };
        site.collect().await;
        site
    }

    /// The prebuild claims in the log.
    pub async fn claims(&self) -> Vec<PrebuildClaimed> {
        let partition = TopicPartition { topic: Topic::PrebuildClaims, partition: 0 };
        let records = self.log.read(partition, 0, 100).await.unwrap();
        let claim = |payload| if let Payload::Claim(claim) = payload { Some(*claim) } else { None };
        records
            .into_iter()
            .filter_map(|record| claim(parse(&record.message).unwrap().payload))
            .collect()
    }

    /// Runs one pass and records everything that it appended.
    pub async fn collect(&mut self) {
        self.append().await;
        self.consume().await;
    }

    pub async fn append(&mut self) {
        self.collector.pass().await.unwrap();
    }

    pub async fn consume(&self) {
        for topic in Topic::ALL {
            let partition = TopicPartition { topic, partition: 0 };
            let claim = lease_partition(&self.ledger, partition, 0).await.unwrap();
            let records = self.log.read(partition, claim.next_offset, 10_000).await.unwrap();
            let Some(last) = records.last() else { continue };
            let next_offset = last.offset + 1;
            let arrivals: Vec<_> = records.into_iter().map(consumer::read).collect();
            record_batch(&self.ledger, &Chain::Live(claim), &arrivals, next_offset).await.unwrap();
        }
    }

    pub async fn audit(&self) -> AuditReport {
        self.audit_with(Duration::ZERO).await
    }

    pub async fn audit_with(&self, patience: Duration) -> AuditReport {
        let database =
            coderd::Database::new(&self.coderd.database.url, Duration::from_secs(30)).unwrap();
        let source = Some((database, self.coderd.deployment));
        Audit { ledger: self.ledger.clone(), log: self.log.clone(), source, patience }
            .run()
            .await
            .unwrap()
    }

    /// Changes the ledger directly, without Tallyline's code.
    pub async fn tamper(&self, statement: &'static str) {
        sqlx::raw_sql(statement).execute(&self.ledger.pool).await.unwrap();
    }

    pub async fn tamper_source(&self, statement: &'static str, id: Uuid) {
        sqlx::query(statement).bind(id).execute(&self.coderd.database.pool).await.unwrap();
    }
}

/// Joint, kind and id of every difference.
pub fn differences(report: &AuditReport) -> Vec<(&str, &str, &str)> {
    let rows = report.joints.iter().flat_map(|joint| {
        joint.differences.iter().map(|row| (&*joint.name, &*row.kind, row.id.as_str()))
    });
    let rows: Vec<_> = rows.collect();
    assert_eq!(report.balanced, rows.is_empty());
    rows
}

pub fn remarks(report: &AuditReport) -> Vec<(&str, &str)> {
    report
        .joints
        .iter()
        .flat_map(|joint| joint.remarks.iter().map(|row| (&*row.kind, row.id.as_str())))
        .collect()
}

pub fn open(report: &AuditReport) -> Vec<(&str, &str)> {
    report
        .joints
        .iter()
        .flat_map(|joint| joint.open.iter().map(|row| (&*row.kind, row.id.as_str())))
        .collect()
}

pub fn number(report: &AuditReport, joint: &str, name: &str) -> i64 {
    report.joints.iter().find(|actual| actual.name == joint).unwrap().numbers[name]
}

pub const SOURCE: &str = "source and ledger";
pub const LOG: &str = "log and ledger";
const VENDOR: &str = "ledger and vendor";

#[tokio::test]
async fn unchanged_books_balance() {
    let site = Site::new().await;
    let report = site.audit().await;
    assert_eq!(differences(&report), []);
    assert_eq!(remarks(&report), []);
    for (joint, name, expected) in [
        (SOURCE, "source_builds", 3),
        (SOURCE, "ledger_builds", 3),
        (SOURCE, "source_usage", 1),
        (SOURCE, "ledger_usage", 1),
        (LOG, "records", 5),
        (LOG, "accepted", 5),
        (LOG, "records_waiting_in_the_log", 0),
        (VENDOR, "accepted_usage", 1),
        (VENDOR, "pending", 1),
    ] {
        assert_eq!(number(&report, joint, name), expected, "{joint}: {name}");
    }
}

#[tokio::test]
async fn a_row_of_coderd_without_its_event_is_missing() {
    let site = Site::new().await;
    let build = site.coderd.creation().await;
    let now = site.coderd.now().await;
    site.coderd.usage("usage-2", "dc_managed_agents_v1", json!({"count": 1}), now).await;
    let report = site.audit().await;
    let id = format!("workspace_build_completed:{build}");
    assert_eq!(
        differences(&report),
        [(SOURCE, "missing", id.as_str()), (SOURCE, "missing", "usage-2")]
    );
}

#[tokio::test]
async fn a_row_in_flight_is_not_a_difference_once_a_later_pass_is_recorded() {
    let mut site = Site::new().await;
    site.coderd.creation().await;
    let database =
        coderd::Database::new(&site.coderd.database.url, Duration::from_secs(30)).unwrap();
    let source = Some((database, site.coderd.deployment));
    let audit = Audit {
        ledger: site.ledger.clone(),
        log: site.log.clone(),
        source,
        patience: Duration::from_secs(60),
    };
    let auditing = tokio::spawn(async move { audit.run().await.unwrap() });
    while !auditing.is_finished() {
        site.collect().await;
    }
    assert_eq!(differences(&auditing.await.unwrap()), []);
}

#[tokio::test]
async fn a_rewritten_row_is_a_remark_unless_coderd_may_rewrite_the_field() {
    let site = Site::new().await;
    let rename = "update workspaces set name = 'renamed' where id = (select workspace_id from workspace_builds where id = $1)";
    site.tamper_source(rename, site.creation).await;
    assert_eq!(remarks(&site.audit().await), []);
    let rewrite = "update provisioner_jobs set started_at = started_at - interval '1 second'
                   where id = (select job_id from workspace_builds where id = $1)";
    site.tamper_source(rewrite, site.creation).await;
    let report = site.audit().await;
    let id = format!("workspace_build_completed:{}", site.creation);
    assert_eq!(differences(&report), []);
    assert_eq!(remarks(&report), [("source_changed", id.as_str())]);
}

#[tokio::test]
async fn a_claim_without_its_event_is_missing_though_its_build_is_there() {
    let site = Site::new().await;
    site.tamper("delete from prebuild_claim").await;
    let report = site.audit().await;
    let id = format!("prebuild_claimed:{}", site.claim);
    assert!(differences(&report).contains(&(SOURCE, "missing", &id)), "{report:?}");
}

#[tokio::test]
async fn a_claim_that_coderd_never_had_is_a_difference() {
    let site = Site::new().await;
    let known: PrebuildClaimed = site.claims().await.remove(0);
    let forged = PrebuildClaimed { build_id: Uuid::new_v4(), ..known.clone() };
    let of_a_creation = PrebuildClaimed { build_id: site.creation, ..known };
    for claim in [&forged, &of_a_creation] {
        let event = Event {
            deployment: site.coderd.deployment,
            payload: Payload::Claim(Box::new(claim.clone())),
        };
        site.log.append(Topic::PrebuildClaims, vec![event.to_message()]).await.unwrap();
    }
    site.consume().await;
    let report = site.audit().await;
    let mut expected = [forged.build_id, site.creation].map(|id| format!("prebuild_claimed:{id}"));
    let mut actual: Vec<_> = differences(&report)
        .into_iter()
        .map(|(joint, kind, id)| (joint, kind, id.to_owned()))
        .collect();
    expected.sort();
    actual.sort();
    assert_eq!(actual, expected.map(|id| (SOURCE, "not_in_source", id)));
}

#[tokio::test]
async fn usage_that_differs_from_coderds_row_is_a_difference() {
    let site = Site::new().await;
    site.tamper_source(
        "update usage_events set event_data = '{\"count\": 2}' where $1::uuid is not null",
        site.creation,
    )
    .await;
    assert_eq!(differences(&site.audit().await), [(SOURCE, "differs", "usage-1")]);
}

#[tokio::test]
async fn a_replay_that_runs_ahead_of_the_consumer_leaves_balanced_books() {
    let site = Site::new().await;
    site.log
        .append(
            Topic::AgentUsage,
            vec![Message { payload: Some(b"{}".to_vec()), ..Message::default() }],
        )
        .await
        .unwrap();
    let operations = operations(&site.ledger, &site.log);
    let range = LogRange {
        topics: vec![Topic::AgentUsage.name().to_owned()],
        from: "earliest".into(),
        until: "latest".into(),
    };
    let (stop, actor) =
        (CancellationToken::new(), Actor { name: "sre-1".into(), reason: String::new() });
    let plan = ask(&operations, &range).await.unwrap();
    assert_eq!(plan.partitions[0].new_refused, 1);
    let request = ReplayExecution { hash: plan.hash, records_per_second: None };
    operations.execute_replay(&request, &actor, &|_: Step| {}, &stop).await.unwrap();
    assert_eq!(differences(&site.audit().await), []);
    site.consume().await;
    let report = site.audit().await;
    assert_eq!(differences(&report), []);
    assert_eq!(number(&report, LOG, "rejects"), 1);
}

#[tokio::test]
async fn rejected_and_held_records_are_open_work_and_balance_until_they_are_discarded() {
    let mut site = Site::new().await;
    let now = site.coderd.now().await;
    site.coderd.usage("usage-bad", "dc_managed_agents_v1", json!({"count": 0}), now).await;
    sqlx::raw_sql(
        "alter table usage_events drop constraint usage_event_type_check; alter table usage_events disable trigger all;
         insert into usage_events (id, event_type, event_data, created_at) values ('usage-new', 'dc_something_v1', '{}', now())",
    )
    .execute(&site.coderd.database.pool)
    .await
    .unwrap();
    site.collect().await;
    let report = site.audit().await;
    assert_eq!(open(&report), [("rejected", "usage-bad"), ("held", "usage-new")]);
    assert_eq!((differences(&report), remarks(&report)), (vec![], vec![]));
    assert_eq!((number(&report, LOG, "rejects"), number(&report, LOG, "held")), (1, 1));

    discard_all(&site.ledger).await;
    let report = site.audit().await;
    assert_eq!(remarks(&report), [("discarded", "usage-bad"), ("discarded", "usage-new")]);
    assert_eq!((differences(&report), open(&report)), (vec![], vec![]));
}

/// A build with values of a newer coderd.
#[tokio::test]
async fn a_build_that_this_version_cannot_read_is_open_work() {
    let mut site = Site::new().await;
    let build = site.coderd.creation().await;
    let stage = "update provisioner_jobs set input = input || '{\"prebuilt_workspace_stage\": 9}'
                 where id = (select job_id from workspace_builds where id = $1)";
    site.tamper_source(stage, build).await;
    site.collect().await;
    let report = site.audit().await;
    let id = format!("workspace_build_completed:{build}");
    assert_eq!(open(&report), [("unreadable", id.as_str())]);
    assert_eq!(differences(&report), []);
}

/// Each row: a change to the ledger by hand, and the difference that the audit reports.
#[tokio::test]
async fn every_manual_change_in_the_ledger_is_named() {
    let rows: [(&str, &str, &str, &str); 9] = [
        ("delete from usage_event", LOG, "batch_without_its_events", "batch "),
        ("delete from usage_event", VENDOR, "usage_without_publication", "usage-1"),
        ("delete from publication", VENDOR, "usage_without_publication", "usage-1"),
        (
            "update publication set state = 'published'",
            VENDOR,
            "publication_without_its_answer",
            "usage-1",
        ),
        (
            "update batch set first_offset = first_offset + 1 where topic like '%usage%'",
            LOG,
            "chain_broken",
            "tallyline.agent-usage.v1/0@1",
        ),
        (
            "update position set next_offset = 0 where topic like '%usage%'",
            LOG,
            "position_off_its_chain",
            "tallyline.agent-usage.v1/0",
        ),
        (
            "update position set next_offset = 99 where topic like '%usage%'",
            LOG,
            "position_outside_the_log",
            "tallyline.agent-usage.v1/0",
        ),
        ("delete from batch where topic like '%usage%'", LOG, "event_without_its_batch", "usage-1"),
        (
            "update batch set sequence = sequence + 10 where sequence = (select max(sequence) from batch)",
            LOG,
            "sequence_broken",
            "sequence",
        ),
    ];
    for (statement, joint, kind, id) in rows {
        let site = Site::new().await;
        site.tamper(statement).await;
        let report = site.audit().await;
        let actual = differences(&report);
        assert!(
            actual.iter().any(|row| row.0 == joint && row.1 == kind && row.2.starts_with(id)),
            "{statement}: {actual:?}"
        );
    }
}

#[tokio::test]
async fn another_record_under_a_read_offset_is_named() {
    let site = Site::new().await;
    site.tamper("update position set last_record = decode(repeat('00', 32), 'hex') where topic like '%usage%'").await;
    assert_eq!(
        differences(&site.audit().await),
        [(LOG, "another_record", "tallyline.agent-usage.v1/0")]
    );
}

#[tokio::test]
async fn unread_records_are_backlog_and_not_a_difference() {
    let site = Site::new().await;
    site.log
        .append(
            Topic::AgentUsage,
            vec![Message { payload: Some(b"{}".to_vec()), ..Message::default() }],
        )
        .await
        .unwrap();
    let report = site.audit().await;
    assert_eq!(differences(&report), []);
    assert_eq!(number(&report, LOG, "records_waiting_in_the_log"), 1);
}

/// The finding of a continuous audit for the source, once there is one.
async fn source_finding(site: &Site) -> Option<Finding> {
    site.ledger
        .run(findings::list)
        .await
        .unwrap()
        .into_iter()
        .find(|finding| finding.joint == SOURCE)
}

#[tokio::test]
async fn a_missing_row_is_a_finding_only_after_a_later_pass_confirms_it() {
    let mut site = Site::new().await;
    let database =
        coderd::Database::new(&site.coderd.database.url, Duration::from_secs(30)).unwrap();
    let source = Some((database, site.coderd.deployment));
    let audit = Audit {
        ledger: site.ledger.clone(),
        log: site.log.clone(),
        source,
        // the other joints wait for no pass
        patience: Duration::from_secs(3600),
    };
    let telemetry = AuditTelemetry::register(&prometheus::Registry::new(), true).unwrap();
    let (every, late_after) = (Duration::from_millis(200), 1_000);
    let continuous = Continuous { audit, every, late_after, holder: "test".into(), telemetry };
    let missing = site.creation;
    sqlx::query("delete from workspace_build where build_id = $1")
        .bind(missing)
        .execute(&site.ledger.pool)
        .await
        .unwrap();
    let stop = CancellationToken::new();
    let signal = stop.clone();
    let running = tokio::spawn(async move { continuous.run(&signal).await });
    let seconds = Duration::from_secs(30);
    let logs = || async {
        let findings = site.ledger.run(findings::list).await.unwrap();
        findings
            .iter()
            .filter(|finding| finding.joint == LOG)
            .map(|finding| finding.audited_at)
            .collect::<Vec<_>>()
    };
    let mut times = Vec::new();
    for _ in 0..3 {
        eventually(seconds, "another audit", || async {
            logs().await.iter().any(|time| !times.contains(time))
        })
        .await;
        times.extend(logs().await);
        assert_eq!(source_finding(&site).await, None, "no pass has come since");
    }
    // Passes come. They do not bring the row back: the audit requests it from the collector.
    let until = tokio::time::Instant::now() + seconds;
    while source_finding(&site).await.is_none_or(|finding| finding.differences > 0) {
        assert!(tokio::time::Instant::now() < until, "{:?}", source_finding(&site).await);
        site.collect().await;
    }
    let back: i64 = sqlx::query_scalar("select count(*) from workspace_build where build_id = $1")
        .bind(missing)
        .fetch_one(&site.ledger.pool)
        .await
        .unwrap();
    assert_eq!(back, 1);
    stop.cancel();
    tokio::time::timeout(seconds, running).await.expect("it ends").unwrap();
}

#[tokio::test]
async fn an_audit_that_cannot_reach_coderd_says_so_and_reports_no_fault_of_tallyline() {
    let site = Site::new().await;
    let away = coderd::Database::new("postgres://unknown@127.0.0.1:1/none", Duration::from_secs(1));
    let operations = Operations {
        coderd: Some(away.unwrap()),
        deployment: Some(site.coderd.deployment),
        ..operations(&site.ledger, &site.log)
    };
    let error = ask(&operations, &RunAudit::default()).await.unwrap_err();
    assert!(matches!(error, OperationError::Coderd(_)), "{error:?}");
}

//! Replays that are interrupted, or whose log is recreated.

use std::time::Duration;

use tallyline::audit::Audit;
use tallyline::clock::Clock;
use tallyline::event::{Message, Topic};
use tallyline::ledger::{Ledger, LedgerSettings, sources};
use tallyline::log::{KafkaSettings, Log, PostgresLogSettings};
use tallyline::operations::{LogRange, OperationError};

use crate::support::ledger::{DEPLOYMENT, ask, migrated, noon, operations, usage};
use crate::support::process::{Process, tallyline};
use crate::support::{self, Database, eventually};

use super::{SOON, Site, license, sum};

#[tokio::test]
async fn a_partition_recreated_during_a_replay_ends_it() {
    let site = Site::new().await;
    license(&site.operations.ledger).await;
    site.append(Topic::AgentUsage, &(0..40).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>())
        .await;
    site.begin_at_the_ends().await;
    let plan = site.plan(&["tallyline.agent-usage.v1"]).await;
    site.interrupt(&plan).await;
    let pool = &site.operations.ledger.pool;
    let accepted = async || {
        sqlx::query_scalar::<_, i64>("select count(*) from usage_event")
            .fetch_one(pool)
            .await
            .unwrap()
    };
    assert_eq!(accepted().await, 10);
    sqlx::query("update position set generation = 2").execute(pool).await.unwrap();
    assert!(matches!(site.execute(&plan).await, Err(OperationError::Forbidden(_))));
    assert_eq!(accepted().await, 10);
    sqlx::query("update position set generation = 1").execute(pool).await.unwrap();
    let done = site.execute(&plan).await.unwrap();
    assert_eq!((done.resumed_after, done.accepted), (Some(10), 40), "it goes on where it was");
}

#[tokio::test]
async fn a_batch_whose_commit_got_no_answer_is_recorded_once() {
    let mut site = Site::new().await;
    site.append(Topic::AgentUsage, &(0..40).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>())
        .await;
    site.begin_at_the_ends().await;
    let plan = site.plan(&["tallyline.agent-usage.v1"]).await;
    site.interrupt(&plan).await;
    let pool = site.operations.ledger.pool.clone();
    let accepted = async || {
        sqlx::query_scalar::<_, i64>("select count(*) from usage_event")
            .fetch_one(&pool)
            .await
            .unwrap()
    };
    let before = accepted().await;
    // its commit waits for the sequence
    let mut other = pool.begin().await.unwrap();
    sqlx::query("select from ledger for update").execute(&mut *other).await.unwrap();
    site.operations.ledger.deadline = Duration::from_secs(1);
    let unanswered = site.execute(&plan).await;
    assert!(matches!(unanswered, Err(OperationError::Ledger(_))), "{unanswered:?}");
    assert_eq!(accepted().await, before);
    other.rollback().await.unwrap();
    eventually(SOON, "the commit is done", || async { accepted().await > before }).await;
    site.operations.ledger.deadline = SOON;
    let done = site.execute(&plan).await.unwrap();
    assert_eq!([done.records, done.accepted, done.duplicates], [40, 40, 0]);
}

/// New events, some twice, and an invalid one; at ten a second the first part is one batch of ten.
#[tokio::test]
async fn a_resumed_replay_reports_the_total_of_the_plan() {
    let site = Site::new().await;
    let usage: Vec<_> = (0..20).chain(0..5).map(|n| usage(DEPLOYMENT, n)).collect();
    site.append(Topic::AgentUsage, &usage).await;
    site.operations
        .log
        .append(
            Topic::AgentUsage,
            vec![Message { payload: Some(b"{}".to_vec()), ..Message::default() }],
        )
        .await
        .unwrap();
    let plan = site.plan(&["tallyline.agent-usage.v1"]).await;
    let of = |count: fn(&tallyline::operations::PlannedPartition) -> i32| sum(&plan, count);
    let planned = [
        of(|one| one.records),
        of(|one| one.new_events),
        of(|one| one.duplicates),
        of(|one| one.rejects),
    ];
    assert_eq!(planned, [26, 20, 5, 1]);

    site.interrupt(&plan).await;
    let done = site.execute(&plan).await.unwrap();
    assert!(done.resumed_after.is_some_and(|before| (1..=10).contains(&before)), "{done:?}");
    assert_eq!([done.records, done.accepted, done.duplicates, done.rejects], planned);
}

/// A pipeline file for this database, with these additional lines.
fn pipeline(database: &Database, more: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("pipeline.toml");
    let lines = format!(
        "roles = ['consume']\nledger.url = '{}'\nledger.connections = 4\nlog.partitions = 2\n{more}",
        database.url
    );
    std::fs::write(&path, lines).unwrap();
    let file = path.to_str().unwrap().to_owned();
    (folder, file)
}

async fn killed_in_the_middle(log: impl FnOnce(&Ledger) -> (Log, String)) {
    let database = migrated().await;
    let ledger = Ledger::open(
        &LedgerSettings { url: database.url.clone(), connections: 4 },
        Clock::system(),
    )
    .unwrap();
    let (log, more) = log(&ledger);
    log.create_topics(2).await.unwrap();
    let site = Site { operations: operations(&ledger, &log), _database: database };
    site.operations
        .ledger
        .run(async |conn| {
            sources::register(conn, DEPLOYMENT, noon(), None, site.operations.ledger.clock.now())
                .await
        })
        .await
        .unwrap();
    let missing: Vec<_> = (0..1000).map(|n| usage(DEPLOYMENT, n)).collect();
    site.append(Topic::AgentUsage, &missing).await;
    site.begin_at_the_ends().await;
    let (_folder, file) = pipeline(&site._database, &more);
    let mut consumer = tallyline(&["run", "--pipeline", &file], &[]);
    let plan = site.plan(&[]).await;
    assert_eq!(sum(&plan, |one| one.new_events), 1000);

    let pool = &site.operations.ledger.pool;
    let count = async |query: &'static str| {
        sqlx::query_scalar::<_, i64>(query).fetch_one(pool).await.unwrap()
    };
    let replayed = "select coalesce(sum(accepted), 0)::bigint from batch where kind = 'replay'";
    let live = "select coalesce(sum(accepted), 0)::bigint from batch where kind = 'log'";
    let execute = |rate: &str| {
        tallyline(
            &[
                "replay",
                "execute",
                "--pipeline",
                &file,
                "--plan",
                &plan.hash,
                "--rate",
                rate,
                "--output",
                "json",
            ],
            &[],
        )
    };
    let mut replay: Process = execute("60");
    eventually(SOON, "some of it is replayed", || async { count(replayed).await > 0 }).await;
    // live events come in while it runs
    site.append(Topic::AgentUsage, &(5000..5200).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>())
        .await;
    eventually(SOON, "live events are recorded beside it", || async { count(live).await == 200 })
        .await;
    assert!(replay.runs() && count(replayed).await < 1000, "they were not beside it");
    replay.kill();
    let done = count(replayed).await;
    assert!((1..1000).contains(&done), "{done}");

    let mut again = execute("100000");
    assert!(again.ends_within(SOON).await.success(), "{}", again.stderr());
    let answer: serde_json::Value = serde_json::from_str(&again.stdout()).unwrap();
    let before = answer["resumed_after"].as_i64().unwrap();
    assert_eq!(
        (answer["records"].as_i64(), answer["accepted"].as_i64()),
        (Some(1000), Some(1000)),
        "the whole plan: {answer}"
    );
    // its unfinished work at the kill may have been recorded since
    assert!(before >= done && before < 1000, "{done}, then {before}");
    assert_eq!(
        (count(replayed).await, count("select count(*) from usage_event").await),
        (1000, 1200)
    );
    assert_eq!(
        count("select count(*) from operator_act where act = 'replay'").await,
        1,
        "one act, however often it was begun"
    );
    assert!(consumer.terminate(SOON).await.success());
    let (ledger, log) = (site.operations.ledger.clone(), site.operations.log.clone());
    let report = Audit { ledger, log, source: None, patience: Duration::ZERO }.run().await.unwrap();
    assert!(report.balanced, "{report:?}");
    assert_eq!(count("select count(*) from publication where state = 'pending'").await, 1200);
    assert_eq!(count("select count(*) from publication").await, 1200);
}

#[tokio::test]
async fn a_killed_replay_resumes_and_live_events_are_recorded_beside_it() {
    killed_in_the_middle(|ledger| {
        (Log::postgres(ledger.pool.clone(), PostgresLogSettings::default()), String::new())
    })
    .await;
}

#[tokio::test]
async fn a_killed_replay_resumes_on_kafka() {
    killed_in_the_middle(|_| {
        let kafka = support::kafka();
        let log = Log::kafka(KafkaSettings {
            topic_prefix: kafka.prefix.clone(),
            ..KafkaSettings::new(&kafka.brokers)
        })
        .unwrap();
        let lines = format!(
            "log.kind = 'kafka'\nkafka.brokers = '{}'\nkafka.topic_prefix = '{}'\n",
            kafka.brokers, kafka.prefix
        );
        (log, lines)
    })
    .await;
}

#[tokio::test]
async fn another_log_than_the_planned_one_is_not_replayed() {
    let site = Site::new().await;
    site.append(Topic::AgentUsage, &(0..40).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>())
        .await;
    site.consume().await;
    let plan = site.plan(&[]).await;
    // as if the topic had been recreated: the same offsets have other records
    sqlx::query("update log_record set payload = '{}' where payload is not null")
        .execute(&site.operations.ledger.pool)
        .await
        .unwrap();
    let executed = site.execute(&plan).await.unwrap_err();
    assert!(
        matches!(&executed, OperationError::Forbidden(message) if message.contains("recover")),
        "{executed:?}"
    );
    let range = LogRange { topics: vec![], from: "earliest".into(), until: "latest".into() };
    let planned = ask(&site.operations, &range).await;
    assert!(matches!(planned, Err(OperationError::Forbidden(_))), "{planned:?}");
}

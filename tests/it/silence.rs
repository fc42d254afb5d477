//! The ledger's host disappears silently while it owes an answer. No call waits for ever, and no
//! place in the pool is lost.

use std::io;
use std::pin::Pin;
use std::time::Duration;

use prometheus::Registry;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, PgPool};
use tallyline::clock::Clock;
use tallyline::event::Topic;
use tallyline::ledger::{Chain, Ledger, LedgerSettings, RecordError, snapshots};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::recover::RecoverRequest;
use tallyline::operations::{ListActs, ListRejects, OperationError, Operations, ShowReject};
use tallyline::projection::{Projection, ProjectionSettings};
use tallyline::publisher::{Condition, Publisher, PublisherTelemetry};
use tallyline::stages::MetricsState;
use tokio_util::sync::CancellationToken;

use crate::operate::proxy::Proxy;
use crate::publisher::world::{DEPLOYMENT as COLLECTED, World, start_time, usage};
use crate::support::eventually;
use crate::support::ledger::{
    DEPLOYMENT, arrival, ask, build, caught_up_to, lease_partition, noon, operations, partition,
    record_batch, registered_ledger,
};

const SOON: Duration = Duration::from_secs(30);
/// Long enough to remove a host while a call waits.
const DEADLINE: Duration = Duration::from_secs(3);

/// The same ledger, reached through a proxy.
async fn through_proxy(direct: &Ledger, connections: u32) -> (Proxy, Ledger) {
    let at = direct.pool.connect_options();
    let url = format!(
        "postgres://{}@{}:{}/{}",
        at.get_username(),
        at.get_host(),
        at.get_port(),
        at.get_database().unwrap()
    );
    let (mut proxy, url) = Proxy::to_database(&url);
    proxy.open().await;
    let mut ledger =
        Ledger::open(&LedgerSettings { url, connections }, direct.clock.clone()).unwrap();
    ledger.deadline = DEADLINE;
    (proxy, ledger)
}

/// Runs `call`, which waits for the table, and removes the server's host. The table is free then,
/// but the answer does not come.
async fn lost<T>(pool: &PgPool, table: &str, proxy: &Proxy, call: impl Future<Output = T>) -> T {
    let mut lock = pool.begin().await.unwrap();
    sqlx::query(AssertSqlSafe(format!("lock table {table} in access exclusive mode")))
        .execute(&mut *lock)
        .await
        .unwrap();
    let taking_away = async {
        eventually(SOON, "the call waits", || async { waiting(pool).await > 0 }).await;
        proxy.lose();
        lock.rollback().await.unwrap();
    };
    let in_time = tokio::time::timeout(SOON, async { tokio::join!(call, taking_away) });
    in_time.await.expect("the call ends").0
}

async fn waiting(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'")
        .fetch_one(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_call_ends_in_time_and_its_connection_is_not_used_again() {
    let (database, direct) = registered_ledger().await;
    let (proxy, ledger) = through_proxy(&direct, 1).await;
    ledger.run(snapshots::head).await.unwrap();
    let answer = lost(&database.pool, "ledger", &proxy, ledger.run(snapshots::head)).await;
    assert!(
        matches!(&answer, Err(sqlx::Error::Io(error)) if error.kind() == io::ErrorKind::TimedOut),
        "{answer:?}"
    );
    // The pool has one place. Its next user waits for it for ten seconds at most.
    ledger.run(snapshots::head).await.expect("another connection");
}

#[tokio::test]
async fn a_call_that_drops_its_transaction_keeps_no_lock() {
    let (database, ledger) = registered_ledger().await;
    for _ in 0..100 {
        let locks = ledger.run(async |conn| {
            let mut tx = conn.begin().await?;
            sqlx::query("select from ledger for update").execute(&mut *tx).await
        });
        assert_eq!(locks.await.unwrap().rows_affected(), 1);
        let free = sqlx::query("select from ledger for update skip locked");
        assert_eq!(free.execute(&database.pool).await.unwrap().rows_affected(), 1);
    }
}

#[tokio::test]
async fn a_call_may_take_longer_than_the_server_lets_a_statement_run() {
    let database = crate::support::database().await;
    let settings = LedgerSettings { url: database.url.clone(), connections: 1 };
    let ledger = Ledger::open(&settings, Clock::manual(noon())).unwrap();
    let query = "select setting::bigint from pg_settings where name = 'statement_timeout'";
    let statement_timeout: i64 = sqlx::query_scalar(query).fetch_one(&ledger.pool).await.unwrap();
    let longest = ledger.deadline.as_millis();
    assert!(
        (1..i64::try_from(longest).unwrap()).contains(&statement_timeout),
        "{statement_timeout} ms in {longest} ms"
    );
}

#[tokio::test]
async fn a_batch_is_recorded_once_although_its_answer_never_came() {
    let (database, direct) = registered_ledger().await;
    let (proxy, ledger) = through_proxy(&direct, 2).await;
    let claim = lease_partition(&ledger, partition(Topic::WorkspaceBuilds, 0), 0).await.unwrap();
    let arrivals = [arrival(0, build(DEPLOYMENT, 1))];
    let chain = Chain::Live(claim);
    let answer = lost(
        &database.pool,
        "workspace_build",
        &proxy,
        record_batch(&ledger, &chain, &arrivals, 1),
    )
    .await;
    assert!(matches!(&answer, Err(RecordError::Slow(_))), "{answer:?}");
    // The server ends the work of its lost client.
    eventually(SOON, "the batch is recorded", || async {
        record_batch(&ledger, &chain, &arrivals, 1).await.is_ok()
    })
    .await;
    let builds: i64 = sqlx::query_scalar("select count(*) from workspace_build")
        .fetch_one(&database.pool)
        .await
        .unwrap();
    assert_eq!(builds, 1);
}

/// One batch of one build.
async fn record(ledger: &Ledger, offset: i64) {
    let claim = lease_partition(ledger, partition(Topic::WorkspaceBuilds, 0), 0).await.unwrap();
    let arrivals = [arrival(offset, build(DEPLOYMENT, u32::try_from(offset).unwrap()))];
    record_batch(ledger, &Chain::Live(claim), &arrivals, offset + 1).await.unwrap();
}

#[tokio::test]
async fn a_fold_resumes() {
    let (database, direct) = registered_ledger().await;
    let (proxy, ledger) = through_proxy(&direct, 4).await;
    let settings =
        ProjectionSettings { poll: Duration::from_millis(50), ..ProjectionSettings::default() };
    let projection = Projection::<MetricsState>::new(ledger, settings);
    let (view, stop) = (projection.view(), CancellationToken::new());
    let signal = stop.clone();
    let folding = tokio::spawn(async move { projection.run(&signal).await });
    let goes_on = async || {
        let end = direct.run(snapshots::head).await.unwrap().number;
        eventually(SOON, "the fold reaches the ledger's end", || async {
            caught_up_to(&view) >= end
        })
        .await;
    };
    record(&direct, 0).await;
    goes_on().await;
    lost(&database.pool, "ledger", &proxy, std::future::ready(())).await;
    record(&direct, 1).await;
    goes_on().await;
    // read with each page of batches, and not written with a build
    lost(&database.pool, "license", &proxy, record(&direct, 2)).await;
    goes_on().await;
    stop.cancel();
    folding.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_publisher_reports_the_silence_and_resumes() {
    let world = World::new().await;
    let (proxy, ledger) = through_proxy(&world.ledger, 4).await;
    let telemetry = PublisherTelemetry::register(&Registry::new()).unwrap();
    let mut publisher = Publisher::new(ledger, world.settings.clone(), telemetry).unwrap();
    for table in ["source", "publication", "publication_request"] {
        world.add(&[usage(table, start_time())]).await;
        let cycle = lost(&world.ledger.pool, table, &proxy, publisher.cycle(&world.stop)).await;
        let fault = format!("{:#}", cycle.unwrap_err());
        assert!(fault.contains("no answer within 3 s"), "{table}: {fault}");
        assert!(matches!(publisher.condition().get(), Condition::Failing(_)), "{table}");
        assert_eq!(world.times_billed(table), 0, "{table}");
        world.end_leases().await;
        // The server ends the work of its lost client.
        let published = async {
            while !publisher.cycle(&world.stop).await.is_ok_and(|cycle| cycle.accepted == 1) {}
        };
        tokio::time::timeout(SOON, published).await.expect(table);
        assert_eq!(world.times_billed(table), 1, "{table}");
    }
}

/// A call of an operation.
type Call<'a> = Pin<Box<dyn Future<Output = Result<(), OperationError>> + 'a>>;

/// The command line does it in one go, and no other process would end it.
#[tokio::test]
async fn an_operation_reports_the_silence() {
    let world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    // the log's own deadline does not apply here
    let log = Log::postgres(world.ledger.pool.clone(), PostgresLogSettings::default());
    log.create_topics(1).await.unwrap();
    let everything: ListRejects = serde_json::from_value(json!({ "state": "all" })).unwrap();
    for (table, operation) in [
        ("operator_act", "acts"),
        ("reject", "list"),
        ("reject", "show"),
        ("recovery", "ledger"),
        ("publication", "ledger"),
        ("position", "log"),
        ("usage_event", "coderd"),
    ] {
        let (proxy, ledger) = through_proxy(&world.ledger, 4).await;
        let (coderd, keys) = (world.settings.coderd.clone(), world.settings.license_keys.clone());
        let operations =
            Operations { coderd, deployment: Some(COLLECTED), keys, ..operations(&ledger, &log) };
        let call: Call<'_> = match operation {
            "acts" => Box::pin(async { ask(&operations, &ListActs::default()).await.map(drop) }),
            "list" => Box::pin(async { ask(&operations, &everything).await.map(drop) }),
            "show" => Box::pin(async { ask(&operations, &ShowReject { id: 1 }).await.map(drop) }),
            lost => {
                let (request, operations) = (
                    serde_json::from_value::<RecoverRequest>(json!({ "lost": lost })).unwrap(),
                    &operations,
                );
                Box::pin(async move { ask(operations, &request).await.map(drop) })
            }
        };
        let refusal = lost(&world.ledger.pool, table, &proxy, call).await.unwrap_err();
        assert!(
            matches!(&refusal, OperationError::Ledger(sqlx::Error::Io(error)) if error.kind() == io::ErrorKind::TimedOut),
            "{operation} of {table}: {refusal}"
        );
    }
}

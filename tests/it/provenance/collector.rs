//! Collectors whose records consumers would reject: without a signing key, or with a key that
//! consumers lack.

use std::time::Duration;
use tallyline::ledger::{collector_requests, passes};

use chrono::TimeDelta;
use serde_json::json;
use tallyline::clock::Clock;
use tallyline::collectors::{self, CollectError, Collector, Settings};
use tallyline::event::Signatures;
use tallyline::license::PublicKeys;
use tallyline::operations::DiscardRejects;
use tallyline_sim::coderd::SchemaVersion;
use tokio_util::sync::CancellationToken;

use super::world::{SOON, World, keys, operator};
use crate::support::coderd::{Build, Coderd};
use crate::support::eventually;
use crate::support::ledger::{act, completeness_of};

const REJECTS: &str = "select count(*) from reject";
const PASSES: &str = "select coalesce(max(pass_id), 0) from collector_progress";
const ACCEPTED: &str = "select count(*) from workspace_build where confirmed_at is not null";

fn key() -> Signatures {
    keys(&["2026"], "2026")
}

fn settings(coderd: &Coderd, holder: &str) -> Settings {
    let (margin, overlap) = (TimeDelta::zero(), TimeDelta::zero());
    Settings { deployment_id: Some(coderd.deployment), margin, overlap, ..Settings::new(holder) }
}

async fn open(
    world: &World,
    coderd: &Coderd,
    signatures: Signatures,
) -> Result<Option<Collector>, CollectError> {
    let database = tallyline::coderd::Database::new(&coderd.database.url, SOON).unwrap();
    Collector::open(
        settings(coderd, "test"),
        database,
        PublicKeys::new(),
        world.log(signatures),
        world.ledger.clone(),
        Clock::system(),
    )
    .await
}

async fn opened(world: &World, coderd: &Coderd, signatures: Signatures) -> Collector {
    open(world, coderd, signatures).await.unwrap().expect("the source is free")
}

async fn complete(world: &World, collector: &Collector) -> bool {
    completeness_of(&world.ledger, collector.source().id).await.unwrap().complete_until.is_some()
}

/// Runs passes until the ledger has the proof and the source is complete.
async fn completes(world: &World, collector: &mut Collector, signatures: Signatures) {
    for _ in 0..2 {
        collector.pass().await.unwrap();
        world.consume(signatures.clone()).await;
    }
    assert!(complete(world, collector).await);
    assert!(
        world
            .ledger
            .run(async |conn| passes::is_backfilled(conn, collector.source().id).await)
            .await
            .unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_without_a_signing_key_appends_nothing_once_a_consumer_has_recorded_the_cutover()
 {
    let (world, coderd) = (World::new().await, Coderd::new(SchemaVersion::Sep2026).await);
    let mut collector = opened(&world, &coderd, Signatures::default()).await;
    coderd.creation().await;
    assert_eq!(collector.pass().await.unwrap().builds, 1);
    world.consume(Signatures::default()).await;
    assert!(complete(&world, &collector).await);

    world.consume(key()).await;
    coderd.creation().await;
    let (records, passes) = (world.records().await.len(), world.count(PASSES).await);
    let refused = collector.pass().await.unwrap_err();
    assert!(matches!(refused, CollectError::LeaseLost | CollectError::NoSigningKey), "{refused}");
    collector.close().await;
    let refused = open(&world, &coderd, Signatures::default()).await.err().expect("refused");
    assert!(matches!(refused, CollectError::NoSigningKey), "{refused}");
    assert!(refused.to_string().contains("log.signing_key is not set"), "{refused}");
    assert_eq!((world.records().await.len(), world.count(PASSES).await), (records, passes));

    let mut collector = opened(&world, &coderd, key()).await;
    completes(&world, &mut collector, key()).await;
    assert_eq!(
        (world.count("select count(*) from workspace_build").await, world.count(REJECTS).await),
        (2, 0)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pass_in_which_the_cutover_is_recorded_reports_nothing_as_complete() {
    let (world, coderd) = (World::new().await, Coderd::new(SchemaVersion::Sep2026).await);
    let mut collector = opened(&world, &coderd, Signatures::default()).await;
    coderd.creation().await;
    // when the pass waits for the licenses, it has appended its rows
    let mut lock = coderd.database.pool.begin().await.unwrap();
    sqlx::query("lock table licenses in access exclusive mode").execute(&mut *lock).await.unwrap();
    let pass = tokio::spawn(async move {
        let answer = collector.pass().await;
        (collector, answer)
    });
    eventually(SOON, "the row is appended", || async { world.records().await.len() == 1 }).await;
    world.consume(key()).await;
    lock.rollback().await.unwrap();
    let (collector, answer) = pass.await.unwrap();
    assert!(matches!(answer, Err(CollectError::LeaseLost)), "{answer:?}");
    assert_eq!(world.count(PASSES).await, 0);
    assert!(!complete(&world, &collector).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_requested_sweep_waits_until_consumers_have_accepted_a_signature() {
    let (world, coderd) = (World::new().await, Coderd::new(SchemaVersion::Sep2026).await);
    world.consume(key()).await;
    let mut collector = opened(&world, &coderd, key()).await;
    let source = collector.source().id;
    coderd.creation().await;
    assert!(collector.pass().await.unwrap().full_sweep);
    world.ledger.run(async |conn| collector_requests::add_sweep(conn, source).await).await.unwrap();
    for _ in 0..2 {
        assert!(
            !collector.pass().await.unwrap().full_sweep,
            "coderd is not read whole in each pass"
        );
    }
    world.consume(key()).await;
    let swept = collector.pass().await.unwrap();
    assert!(swept.full_sweep);
    assert_eq!(
        world
            .ledger
            .run(async |conn| collector_requests::sweep(conn, source).await)
            .await
            .unwrap()
            .unwrap()
            .pass_id,
        Some(swept.pass_id)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_signed_with_a_key_that_consumers_do_not_have_are_appended_once_and_nothing_is_complete()
 {
    let (world, coderd) = (World::new().await, Coderd::new(SchemaVersion::Sep2026).await);
    world.consume(key()).await;
    for _ in 0..3 {
        coderd.creation().await;
    }
    let mut collector = opened(&world, &coderd, keys(&["2027"], "2027")).await;
    assert_eq!(
        collector.pass().await.unwrap().complete_until,
        None,
        "no record has proved the key"
    );
    world.consume(key()).await;
    assert_eq!(
        (world.causes().await, world.count(REJECTS).await),
        (vec!["bad_signature".to_owned()], 3)
    );
    for _ in 0..3 {
        let build = coderd.creation().await;
        world
            .ledger
            .run(async |conn| {
                collector_requests::add_fetch(
                    conn,
                    collector.source().id,
                    &[format!("build-{build}")],
                )
                .await
            })
            .await
            .unwrap();
        let refused = collector.pass().await.unwrap_err();
        assert!(refused.to_string().contains("log.verification_keys"), "{refused}");
        world.consume(key()).await;
    }
    assert_eq!(world.count(REJECTS).await, 3, "the rejects do not grow");
    assert!(
        !complete(&world, &collector).await
            && !world
                .ledger
                .run(async |conn| passes::is_backfilled(conn, collector.source().id).await)
                .await
                .unwrap()
    );

    collector.close().await;
    let both = || keys(&["2026", "2027"], "2027");
    let mut collector = opened(&world, &coderd, both()).await;
    completes(&world, &mut collector, both()).await;
    assert_eq!((world.count(ACCEPTED).await, world.count(REJECTS).await), (6, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passes_since_consumers_lost_the_key_report_no_completeness_any_more() {
    let (world, coderd) = (World::new().await, Coderd::new(SchemaVersion::Sep2026).await);
    let both = || keys(&["2026", "2027"], "2027");
    world.consume(both()).await;
    coderd.creation().await;
    let mut collector = opened(&world, &coderd, both()).await;
    completes(&world, &mut collector, both()).await;
    let before = completeness_of(&world.ledger, collector.source().id).await.unwrap();
    coderd.creation().await;
    assert!(collector.pass().await.unwrap().complete_until.is_some(), "the key was proved");
    world.consume(key()).await;
    let refused = collector.pass().await.unwrap_err();
    assert!(matches!(refused, CollectError::SignaturesRejected), "{refused}");
    assert_eq!(completeness_of(&world.ledger, collector.source().id).await.unwrap(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_rejects_of_its_deployment_do_not_stop_a_collector() {
    let (world, coderd) = (World::new().await, Coderd::new(SchemaVersion::Sep2026).await);
    world.consume(key()).await;
    let mut collector = opened(&world, &coderd, key()).await;
    let forged = (0..5).map(|n| crate::support::ledger::usage(coderd.deployment, n));
    world.produce(forged.map(|event| (event.topic(), event.to_message()))).await;
    coderd.creation().await;
    completes(&world, &mut collector, key()).await;
    assert_eq!((world.count(ACCEPTED).await, world.count(REJECTS).await), (1, 5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_oversized_row_is_one_reject_and_collection_of_its_source_continues() {
    let (world, coderd) = (World::new().await, Coderd::new(SchemaVersion::Sep2026).await);
    world.consume(key()).await;
    let large = json!({"count": 1, "note": "x".repeat(300_000)});
    coderd.usage("large", "dc_managed_agents_v1", large, coderd.now().await).await;
    for restarts in 0..2 {
        let mut collector = opened(&world, &coderd, key()).await;
        coderd.creation().await;
        completes(&world, &mut collector, key()).await;
        collector.close().await;
        assert_eq!(
            (world.causes().await, world.count(REJECTS).await),
            (vec!["oversized".to_owned()], 1)
        );
        assert_eq!(world.count(ACCEPTED).await, restarts + 1);
    }
    // a discarded row is not appended again either
    let id = world.count("select id from reject").await;
    act(&world.operations(key()), &DiscardRejects { ids: vec![id] }, &operator()).await.unwrap();
    let mut collector = opened(&world, &coderd, key()).await;
    assert_eq!(collector.pass().await.unwrap().usage, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passes_whose_rows_the_cutover_rejects_report_no_completeness_any_more() {
    let (world, coderd) = (World::new().await, Coderd::new(SchemaVersion::Sep2026).await);
    let mut collector = opened(&world, &coderd, Signatures::default()).await;
    // older than a later pass reads, so that none collects them again, signed
    let completed_at = coderd.now().await - TimeDelta::hours(2);
    for _ in 0..3 {
        let build = coderd.first_start(coderd.workspace().await).await;
        coderd.build(&Build { completed_at, ..build }).await;
    }
    assert!(collector.pass().await.unwrap().complete_until.is_some());
    collector.close().await;
    // it restarts with keys, and no consumer has read a record
    let mut collector = opened(&world, &coderd, key()).await;
    assert!(collector.pass().await.unwrap().complete_until.is_some());
    world.consume(key()).await;
    assert_eq!(
        (world.causes().await, world.count(REJECTS).await),
        (vec!["unsigned".to_owned()], 3)
    );
    assert!(
        !complete(&world, &collector).await
            && !world
                .ledger
                .run(async |conn| passes::is_backfilled(conn, collector.source().id).await)
                .await
                .unwrap()
    );
    let lost = collector.pass().await.unwrap_err();
    assert!(matches!(lost, CollectError::LeaseLost), "{lost}");

    let mut collector = opened(&world, &coderd, key()).await;
    assert_eq!(collector.pass().await.unwrap().complete_until, None);
    assert!(
        !complete(&world, &collector).await
            && !world
                .ledger
                .run(async |conn| passes::is_backfilled(conn, collector.source().id).await)
                .await
                .unwrap()
    );
    world.consume(key()).await;
    completes(&world, &mut collector, key()).await;
    assert_eq!((world.count(ACCEPTED).await, world.count(REJECTS).await), (3, 3));
}

/// A collector with accepted records ends while one is in flight, which consumers reject. The next
/// one signs with the key of this name.
async fn rejected_in_flight(signing: &str) -> CollectError {
    let (world, coderd) = (World::new().await, Coderd::new(SchemaVersion::Sep2026).await);
    let both = |signing: &str| keys(&["2026", "2027"], signing);
    world.consume(both("2027")).await;
    coderd.creation().await;
    let mut collector = opened(&world, &coderd, both("2027")).await;
    completes(&world, &mut collector, both("2027")).await;
    let before = completeness_of(&world.ledger, collector.source().id).await.unwrap();
    coderd.creation().await;
    assert!(collector.pass().await.unwrap().complete_until.is_some(), "the key was proved");
    collector.close().await;

    let mut collector = opened(&world, &coderd, both(signing)).await;
    assert_eq!(
        collector.pass().await.unwrap().complete_until,
        None,
        "the record in flight is not proved"
    );
    world.consume(key()).await;
    let refused = collector.pass().await.unwrap_err();
    assert_eq!(completeness_of(&world.ledger, collector.source().id).await.unwrap(), before);
    collector.close().await;
    let mut collector = opened(&world, &coderd, both("2026")).await;
    completes(&world, &mut collector, key()).await;
    assert_eq!((world.count(ACCEPTED).await, world.count(REJECTS).await), (2, 1));
    refused
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_an_earlier_process_that_consumers_reject_void_the_passes_since() {
    let own_key = rejected_in_flight("2027").await;
    assert!(matches!(own_key, CollectError::SignaturesRejected), "{own_key}");
    let other_key = rejected_in_flight("2026").await;
    assert!(matches!(other_key, CollectError::OtherKeyRejected), "{other_key}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_whose_signatures_are_rejected_leaves_the_source_to_another() {
    let (world, coderd) = (World::new().await, Coderd::new(SchemaVersion::Sep2026).await);
    world.consume(key()).await;
    coderd.creation().await;
    let stop = CancellationToken::new();
    let collect = |holder: &str, signatures: Signatures| {
        let settings =
            Settings { poll_interval: Duration::from_millis(100), ..settings(&coderd, holder) };
        let (database, standing) = (
            tallyline::coderd::Database::new(&coderd.database.url, SOON).unwrap(),
            settings.status.clone(),
        );
        let (log, ledger) = (world.log(signatures), world.ledger.clone());
        let task = tokio::spawn(collectors::run(
            settings,
            database,
            PublicKeys::new(),
            log,
            ledger,
            Clock::system(),
            stop.clone(),
        ));
        (task, standing)
    };
    let (wrong, standing) = collect("wrong", keys(&["2027"], "2027"));
    eventually(SOON, "the row is appended", || async { world.records().await.len() == 1 }).await;
    let (right, _) = collect("right", key());
    world.consume(key()).await;
    eventually(SOON, "the rejects are noticed", || async {
        standing.get().contains("log.verification_keys")
    })
    .await;
    eventually(SOON, "the row is appended by the other", || async {
        world.records().await.len() == 2
    })
    .await;
    world.consume(key()).await;
    assert_eq!((world.count(ACCEPTED).await, world.count(REJECTS).await), (1, 1));
    stop.cancel();
    for task in [wrong, right] {
        task.await.unwrap();
    }
    assert_eq!(world.records().await.len(), 2, "neither of them appends it again");
    assert!(standing.get().contains("log.verification_keys"), "{}", standing.get());
}

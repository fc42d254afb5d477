//! The collector of a source, the start of its collection, and its licenses.

use std::time::Duration;

use chrono::TimeDelta;
use tallyline::clock::Clock;
use tallyline::coderd::CoderdError;
use tallyline::collectors::{CollectError, Settings, run};
use tallyline::event::{Event, Fact, PREBUILDS_USER, Payload};
use tallyline::ledger::{LicenseState, entries, licenses};
use tallyline::license::PublicKeys;
use tallyline_sim::coderd::SchemaVersion;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{produced, settings, source_of, store};
use crate::support::coderd::{Build, Coderd};
use crate::support::eventually;

#[tokio::test]
async fn one_collector_at_a_time() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let first = store.collector(settings(), &coderd).await;
    let other = Settings { holder: "other".into(), ..settings() };
    assert!(store.open(other.clone(), &coderd.database.url).await.unwrap().is_none());
    first.close().await;
    let mut second = store.open(other, &coderd.database.url).await.unwrap().expect("given back");
    second.pass().await.unwrap();
    second.close().await;
}

#[tokio::test]
async fn a_collector_keeps_its_source_through_a_pause_longer_than_the_lease() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let mut first = store
        .collector(Settings { lease_length: Duration::from_millis(600), ..settings() }, &coderd)
        .await;
    let ended = "select clock_timestamp() > $1 + interval '2 seconds'";
    let begun = coderd.now().await;
    eventually(Duration::from_secs(30), "two seconds are over", async || {
        sqlx::query_scalar::<_, bool>(ended)
            .bind(begun)
            .fetch_one(&coderd.database.pool)
            .await
            .unwrap()
    })
    .await;
    let other = Settings { holder: "other".into(), ..settings() };
    assert!(store.open(other, &coderd.database.url).await.unwrap().is_none());
    first.pass().await.unwrap();
    first.close().await;
}

#[tokio::test]
async fn a_collector_that_lost_its_lease_records_nothing_more() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    // By its own clock the first need not renew its lease for minutes, but the database gave the
    // lease to another.
    let mut first = store
        .collector(Settings { lease_length: Duration::from_secs(600), ..settings() }, &coderd)
        .await;
    first.pass().await.unwrap();
    sqlx::query("update lease set expires_at = clock_timestamp()")
        .execute(&store.ledger.pool)
        .await
        .unwrap();
    let other = Settings { holder: "other".into(), ..settings() };
    let _second =
        store.open(other, &coderd.database.url).await.unwrap().expect("the lease has ended");
    assert!(matches!(first.pass().await, Err(CollectError::LeaseLost)));
    let passes: i64 = sqlx::query_scalar("select pass_id from collector_progress")
        .fetch_one(&store.ledger.pool)
        .await
        .unwrap();
    assert_eq!(passes, 1);
}

#[tokio::test]
async fn collecting_from_an_instant_starts_the_counters_with_coderds_own_count() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let now = coderd.now().await;
    let from = now - TimeDelta::hours(1);
    for (hours, preset) in [(3, None), (2, Some(coderd.preset)), (2, Some(coderd.preset))] {
        let workspace = coderd.workspace().await;
        let completed_at = now - TimeDelta::hours(hours);
        coderd.build(&Build { completed_at, preset, ..coderd.first_start(workspace).await }).await;
    }
    let pool_build = Build {
        initiator: PREBUILDS_USER,
        completed_at: now - TimeDelta::hours(2),
        ..coderd.first_start(coderd.workspace().await).await
    };
    coderd.build(&pool_build).await;
    sqlx::query("update templates set deleted = true")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    let after = coderd.creation().await;
    let too_recent = Settings { from: Some(now + TimeDelta::hours(1)), ..settings() };
    assert!(matches!(
        store.open(too_recent, &coderd.database.url).await,
        Err(CollectError::FromTooRecent { .. })
    ));
    let mut collector = store.collector(Settings { from: Some(from), ..settings() }, &coderd).await;
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
    assert_eq!(store.builds().await.into_keys().collect::<Vec<_>>(), [after]);
    let source = collector.source().clone();
    assert_eq!(
        source.baseline_until.map(|at| at.timestamp_micros()),
        Some(from.timestamp_micros())
    );
    let query = "select organization_name, template_name, preset_name, creations from creation_baseline order by 1, 2, 3";
    let counts: Vec<(String, String, String, i64)> =
        sqlx::query_as(query).fetch_all(&store.ledger.pool).await.unwrap();
    let row = |preset: &str, creations| {
        ("acme".to_owned(), "docker".to_owned(), preset.to_owned(), creations)
    };
    assert_eq!(counts, [row("", 1), row("large", 2)]);
    // The start of collection never changes.
    collector.close().await;
    let again = store.collector(settings(), &coderd).await;
    assert_eq!(*again.source(), source);
}

/// coderd removes old builds, and then reports the first remaining one as the first successful
/// start.
#[tokio::test]
async fn a_workspace_that_was_started_before_the_baseline_is_not_created_again() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let now = coderd.now().await;
    let mut workspaces = Vec::new();
    for initiator in [coderd.owner, PREBUILDS_USER] {
        let workspace = coderd.workspace().await;
        let completed_at = now - TimeDelta::hours(2);
        coderd
            .build(&Build { completed_at, initiator, ..coderd.first_start(workspace).await })
            .await;
        workspaces.push(workspace);
    }
    let mut collector = store
        .collector(Settings { from: Some(now - TimeDelta::hours(1)), ..settings() }, &coderd)
        .await;
    collector.pass().await.unwrap();
    sqlx::raw_sql("delete from provisioner_jobs").execute(&coderd.database.pool).await.unwrap();
    for workspace in workspaces {
        coderd.build(&Build { number: 2, ..coderd.first_start(workspace).await }).await;
    }
    coderd.creation().await;
    collector.pass().await.unwrap();
    store.consume().await;
    let counted: Vec<bool> = store
        .ledger
        .run(async |conn| entries::after(conn, 0, i64::MAX, 0).await)
        .await
        .unwrap()
        .into_iter()
        .flat_map(|entry| entry.facts)
        .filter_map(|fact| match fact {
            Fact::Event(Event { payload: Payload::Build(build), .. }) => {
                Some(build.first_successful_start)
            }
            _ => None,
        })
        .collect();
    assert_eq!(
        (counted.len(), counted.iter().filter(|first| **first).count()),
        (3, 1),
        "only the new workspace"
    );
}

#[tokio::test]
async fn license_uploads_and_removals_are_recorded() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let mut collector = store.collector(settings(), &coderd).await;
    let source = collector.source().id;
    sqlx::query("insert into licenses (uploaded_at, jwt, exp, uuid) values (now(), 'not.a.token', now(), gen_random_uuid())")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    for _ in 0..2 {
        collector.pass().await.unwrap();
        let present =
            store.ledger.run(async |conn| licenses::present(conn, source).await).await.unwrap();
        assert!(
            matches!(present.as_slice(), [license] if matches!(&license.state, LicenseState::Refused(_))),
            "{present:?}"
        );
    }
    sqlx::query("delete from licenses").execute(&coderd.database.pool).await.unwrap();
    collector.pass().await.unwrap();
    assert!(
        store
            .ledger
            .run(async |conn| licenses::present(conn, source).await)
            .await
            .unwrap()
            .is_empty()
    );
    let rows: i64 = sqlx::query_scalar("select count(*) from license")
        .fetch_one(&store.ledger.pool)
        .await
        .unwrap();
    assert_eq!(rows, 2, "one change when it came, one when it went");
}

#[tokio::test]
async fn an_unreachable_coderd_is_retried() {
    let store = store().await;
    let coderd = Coderd::new(SchemaVersion::Sep2026).await;
    let nowhere =
        coderd.database.url.rsplit_once('/').unwrap().0.rsplit_once(':').unwrap().0.to_owned()
            + ":1/coder";
    let error = store.open(settings(), &nowhere).await.err().unwrap();
    assert!(matches!(&error, CollectError::Coderd(CoderdError::Unreachable { .. })), "{error}");
    assert!(error.to_string().contains("127.0.0.1:1/coder"), "{error}");
    // A database that does not exist yet: the loop goes on until it does.
    let name = format!("later_{}", Uuid::new_v4().simple());
    let later = format!("{}/{name}", coderd.database.url.rsplit_once('/').unwrap().0);
    let stop = CancellationToken::new();
    let fast = Settings {
        poll_interval: Duration::from_millis(50),
        deployment_id: Some(coderd.deployment),
        ..settings()
    };
    let running = tokio::spawn(run(
        fast,
        source_of(&later),
        PublicKeys::new(),
        store.log.clone(),
        store.ledger.clone(),
        Clock::system(),
        stop.clone(),
    ));
    coderd.creation().await;
    coderd.database.pool.close().await;
    let admin =
        sqlx::PgPool::connect(&crate::support::setting("TALLYLINE_TEST_POSTGRES")).await.unwrap();
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "create database {name} template {}",
        coderd.database.name
    )))
    .execute(&admin)
    .await
    .unwrap();
    eventually(Duration::from_secs(20), "the build is collected", async || {
        store.builds().await.len() == 1
    })
    .await;
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(10), running).await.expect("it stops").unwrap();
    let held: bool = sqlx::query_scalar(
        "select exists (select from lease where expires_at > clock_timestamp())",
    )
    .fetch_one(&store.ledger.pool)
    .await
    .unwrap();
    assert!(!held, "the lease is given back");
}

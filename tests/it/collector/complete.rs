//! How far the source is complete, and when completeness is not reported.

use std::collections::BTreeSet;
use tallyline::ledger::passes;

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::clock::Clock;
use tallyline::collectors::{Collector, Settings};
use tallyline::event::Topic;
use tallyline::license::PublicKeys;
use tallyline_sim::coderd::SchemaVersion;

use super::{produced, recreate_topic, settings, source_of, store};
use crate::support::coderd::{Build, Coderd};
use crate::support::ledger::completeness_of;

#[tokio::test]
async fn a_pass_counts_once_the_ledger_is_past_its_offsets() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    coderd.creation().await;
    let mut collector = store.collector(settings(), &coderd).await;
    let source = collector.source().id;
    let first = collector.pass().await.unwrap();
    assert_eq!(completeness_of(&store.ledger, source).await.unwrap().complete_until, None);
    assert!(
        !store.ledger.run(async |conn| passes::is_backfilled(conn, source).await).await.unwrap()
    );
    store.consume().await;
    let completeness = completeness_of(&store.ledger, source).await.unwrap();
    assert_eq!(
        (completeness.complete_until, completeness.runtime_complete_until),
        (first.complete_until, first.runtime_complete_until)
    );
    assert!(
        store.ledger.run(async |conn| passes::is_backfilled(conn, source).await).await.unwrap()
    );
    coderd.creation().await;
    let second = collector.pass().await.unwrap();
    assert_eq!(
        completeness_of(&store.ledger, source).await.unwrap().complete_until,
        first.complete_until
    );
    store.consume().await;
    assert_eq!(
        completeness_of(&store.ledger, source).await.unwrap().complete_until,
        second.complete_until
    );
    collector.pass().await.unwrap();
    let remaining: i64 = sqlx::query_scalar("select count(*) from collector_pass")
        .fetch_one(&store.ledger.pool)
        .await
        .unwrap();
    assert_eq!(remaining, 0, "passes that were reached are not kept");
    assert!(
        store
            .ledger
            .run(async |conn| passes::is_confirmed(conn, source, first.pass_id).await)
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn completeness_is_not_reported_while_the_log_ends_before_the_ledgers_position() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    for _ in 0..12 {
        coderd.creation().await;
    }
    let mut collector = store.collector(settings(), &coderd).await;
    let source = collector.source().id;
    let first = collector.pass().await.unwrap();
    store.consume().await;
    let lost = coderd.creation().await;
    assert_eq!(collector.pass().await.unwrap().builds, 1);
    recreate_topic(&store, Topic::WorkspaceBuilds).await;
    let later_build = coderd.creation().await;
    for builds in [1, 0] {
        let report = collector.pass().await.unwrap();
        assert_eq!(
            (report.builds, report.complete_until, report.runtime_complete_until),
            (builds, None, None)
        );
        assert_eq!(
            completeness_of(&store.ledger, source).await.unwrap().complete_until,
            first.complete_until
        );
    }
    // A source whose first passes are in that time is not shown as backfilled.
    let other = Coderd::new(SchemaVersion::Sep2026).await;
    let others = other.creation().await;
    let mut newcomer = store.collector(settings(), &other).await;
    assert!(newcomer.pass().await.unwrap().full_sweep);
    newcomer.pass().await.unwrap();
    assert!(
        !store
            .ledger
            .run(async |conn| passes::is_backfilled(conn, newcomer.source().id).await)
            .await
            .unwrap()
    );
    // As after a recovery: the ledger reads the new topic from its start.
    sqlx::query("update position set next_offset = 0, last_offset = null, last_record = null where topic like '%workspace-builds%'")
        .execute(&store.ledger.pool)
        .await
        .unwrap();
    assert_eq!(
        collector.pass().await.unwrap().complete_until,
        None,
        "this pass still relied on records of the old topic"
    );
    let report = collector.pass().await.unwrap();
    assert_eq!((report.full_sweep, report.builds), (true, 1), "unread rows are appended again");
    assert!(report.complete_until > first.complete_until);
    assert_eq!(
        store.builds().await.into_keys().collect::<BTreeSet<_>>(),
        BTreeSet::from([lost, later_build, others])
    );
}

#[tokio::test]
async fn a_collector_starts_beside_a_recreated_topic() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    for _ in 0..12 {
        coderd.creation().await;
    }
    let mut first = store.collector(settings(), &coderd).await;
    first.pass().await.unwrap();
    store.consume().await;
    recreate_topic(&store, Topic::WorkspaceBuilds).await;
    coderd.creation().await;
    assert_eq!(first.pass().await.unwrap().builds, 1);
    drop(first);
    let mut second = store.collector(settings(), &coderd).await;
    let report = second.pass().await.unwrap();
    assert_eq!(
        (report.full_sweep, report.builds, report.complete_until),
        (true, 0, None),
        "known from the new topic"
    );
}

#[tokio::test]
async fn rows_older_than_the_reported_completeness_are_counted() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let mut collector = store.collector(settings(), &coderd).await;
    collector.pass().await.unwrap();
    let build = Build {
        completed_at: coderd.now().await - TimeDelta::hours(5),
        ..coderd.first_start(coderd.workspace().await).await
    };
    coderd.build(&build).await;
    coderd.creation().await;
    let report = store.sweep(&mut collector).await;
    assert_eq!((report.builds, report.late), (2, 1));
}

#[tokio::test]
async fn an_unreadable_build_delays_completeness_only_while_it_exists() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let id = coderd
        .build(&Build { stage: 3, ..coderd.first_start(coderd.workspace().await).await })
        .await;
    let mut collector = store.collector(settings(), &coderd).await;
    for _ in 0..2 {
        let report = collector.pass().await.unwrap();
        assert_eq!((produced(&report), report.complete_until), ((0, 0, 0), None));
    }
    sqlx::query("delete from workspace_builds where id = $1")
        .bind(id)
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    assert!(collector.pass().await.unwrap().complete_until.is_some());
}

#[tokio::test]
async fn on_a_given_clock_the_source_is_complete_by_that_clock() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let begin = "2026-01-10T12:00:00Z".parse::<DateTime<Utc>>().unwrap();
    let clock = Clock::manual(begin);
    let settings = Settings { margin: TimeDelta::seconds(60), ..settings() };
    let (source, log, ledger) =
        (source_of(&coderd.database.url), store.log.clone(), store.ledger.clone());
    let mut collector =
        Collector::open(settings, source, PublicKeys::new(), log, ledger, clock.clone())
            .await
            .unwrap()
            .unwrap();
    let report = collector.pass().await.unwrap();
    assert_eq!(report.complete_until, Some(begin - TimeDelta::seconds(60)));
    assert_eq!(collector.source().introduced_at, begin);
    for minutes in 1..4 {
        let now = begin + TimeDelta::minutes(minutes);
        clock.set(now);
        let build = Build {
            completed_at: now - TimeDelta::seconds(90),
            ..coderd.first_start(coderd.workspace().await).await
        };
        coderd.build(&build).await;
        let report = collector.pass().await.unwrap();
        assert_eq!((report.builds, report.late, report.full_sweep), (1, 0, false));
        assert_eq!(report.complete_until, Some(now - TimeDelta::seconds(60)));
    }
}

#[tokio::test]
async fn a_collector_that_starts_again_after_weeks_sweeps_nothing() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    coderd.creation().await;
    let mut collector = store.collector(settings(), &coderd).await;
    assert!(collector.pass().await.unwrap().full_sweep);
    store.consume().await;
    collector.close().await;
    let weeks = "update collector_progress set swept_at = swept_at - interval '20 days', started_at = started_at - interval '20 days'";
    sqlx::query(weeks).execute(&store.ledger.pool).await.unwrap();
    let mut collector = store.collector(settings(), &coderd).await;
    let build = Build {
        completed_at: coderd.now().await - TimeDelta::hours(5),
        ..coderd.first_start(coderd.workspace().await).await
    };
    coderd.build(&build).await;
    for _ in 0..2 {
        let report = collector.pass().await.unwrap();
        assert_eq!((produced(&report), report.full_sweep), ((0, 0, 0), false));
    }
}

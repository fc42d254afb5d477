//! Which rows of coderd a pass finds, and their events in the log.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use tallyline::clock::Clock;
use tallyline::collectors::{Collector, Settings};
use tallyline::event::{InputStage, PREBUILDS_USER};
use tallyline::ledger::{LicenseState, known, licenses};
use tallyline::license::PublicKeys;
use tallyline_sim::coderd::{Config, SchemaVersion, Simulation};

use super::{produced, settings, source_of, store};
use crate::support::coderd::{Build, Coderd};
use crate::support::database;

#[tokio::test]
async fn a_build_that_commits_after_the_time_it_wrote_is_found() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let early = coderd.creation().await;
    let mut collector = store.collector(settings(), &coderd).await;
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
    let workspace = coderd.workspace().await;
    let mut open = coderd.database.pool.begin().await.unwrap();
    let begun: DateTime<Utc> =
        sqlx::query_scalar("select now()").fetch_one(&mut *open).await.unwrap();
    let build = Build { completed_at: begun, ..coderd.first_start(workspace).await };
    let late = coderd.build_in(&mut open, &build).await;
    for _ in 0..2 {
        let report = collector.pass().await.unwrap();
        assert_eq!(produced(&report), (0, 0, 0));
        assert!(!report.full_sweep);
        assert!(
            report.complete_until.unwrap() <= begun,
            "nothing beyond the open transaction is claimed"
        );
    }
    open.commit().await.unwrap();
    let report = collector.pass().await.unwrap();
    assert_eq!((produced(&report), report.late), ((1, 0, 0), 0));
    assert!(report.complete_until.unwrap() > begun);
    assert_eq!(
        store.builds().await.into_keys().collect::<BTreeSet<_>>(),
        BTreeSet::from([early, late])
    );
}

#[tokio::test]
async fn usage_dated_days_back_is_found_in_every_state() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let mut collector = store.collector(settings(), &coderd).await;
    collector.pass().await.unwrap();
    let now = coderd.now().await;
    let hour = DateTime::from_timestamp((now.timestamp() / 3600 - 120) * 3600, 0).unwrap();
    coderd.usage("pending", "hb_agent_runtime_v1", json!({"runtime_ms": 5}), hour).await;
    coderd
        .usage("claimed", "dc_managed_agents_v1", json!({"count": 1}), now - TimeDelta::days(29))
        .await;
    coderd
        .usage("published", "dc_managed_agents_v1", json!({"count": 1}), now - TimeDelta::days(40))
        .await;
    sqlx::query("update usage_events set publish_started_at = now() where id = 'claimed'")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    sqlx::query("update usage_events set published_at = now() where id = 'published'")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    let report = collector.pass().await.unwrap();
    assert!(!report.full_sweep);
    assert_eq!(store.usage_ids().await, ["claimed", "pending", "published"]);
    // Unmarked and dated beyond the window: the comparison of days, the audit or a sweep finds it.
    coderd
        .usage("ancient", "dc_managed_agents_v1", json!({"count": 1}), now - TimeDelta::days(20))
        .await;
    assert_eq!(collector.pass().await.unwrap().usage, 0);
    let report = store.sweep(&mut collector).await;
    assert_eq!((report.full_sweep, report.usage), (true, 1));
    assert_eq!(store.usage_ids().await, ["ancient", "claimed", "pending", "published"]);
}

#[tokio::test]
async fn a_build_canceled_while_pending_is_found() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let mut collector = store.collector(settings(), &coderd).await;
    collector.pass().await.unwrap();
    let workspace = coderd.workspace().await;
    let id = coderd
        .build(&Build { worker: None, canceled: true, ..coderd.first_start(workspace).await })
        .await;
    let report = collector.pass().await.unwrap();
    assert_eq!((produced(&report), report.full_sweep), ((1, 0, 0), false));
    let build = store.builds().await.remove(&id).unwrap();
    assert_eq!(
        (build.started_at, build.status.as_str(), build.first_successful_start),
        (None, "canceled", false)
    );
}

#[tokio::test]
async fn a_claim_is_known_by_its_stage_and_without_one_by_the_fallback() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let mut expected = BTreeMap::new();
    for (stage, initiator) in [(2, coderd.owner), (2, PREBUILDS_USER), (0, PREBUILDS_USER)] {
        let workspace = coderd.workspace().await;
        let first = Build {
            initiator: PREBUILDS_USER,
            stage: stage / 2,
            ..coderd.first_start(workspace).await
        };
        coderd.build(&first).await;
        let claim = Build { number: 2, initiator, stage, ..coderd.first_start(workspace).await };
        expected.insert(coderd.build(&claim).await, (stage == 2).then_some(InputStage::Claim));
    }
    let workspace = coderd.workspace().await;
    coderd.build(&coderd.first_start(workspace).await).await;
    coderd.build(&Build { number: 2, ..coderd.first_start(workspace).await }).await;
    let report = store.collector(settings(), &coderd).await.pass().await.unwrap();
    assert_eq!(produced(&report), (8, 3, 0));
    let claims = store.claims().await;
    assert!(claims.iter().all(|claim| claim.claimed_by == coderd.owner));
    assert_eq!(
        claims.into_iter().map(|claim| (claim.build_id, claim.stage)).collect::<BTreeMap<_, _>>(),
        expected
    );
    let first_starts =
        store.builds().await.into_values().filter(|build| build.first_successful_start);
    assert!(
        first_starts.map(|build| build.build_number).eq([1, 1, 1, 1]),
        "each workspace's first start is its own, a claim's is the pool's"
    );
}

#[tokio::test]
async fn an_administrators_start_or_retry_of_a_pool_workspace_is_not_a_claim() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let mut claims = BTreeSet::new();
    // claimed at once; started by an administrator, then claimed; retried by an administrator after
    // a failure, then claimed
    for (failed, before) in [(false, 0), (false, 1), (true, 1)] {
        let workspace = coderd.workspace().await;
        let start = coderd.first_start(workspace).await;
        let error = failed.then_some("no quota");
        coderd.build(&Build { initiator: PREBUILDS_USER, stage: 1, error, ..start.clone() }).await;
        for number in 2..2 + before {
            coderd.build(&Build { number, ..start.clone() }).await;
        }
        claims.insert(coderd.build(&Build { number: 2 + before, stage: 2, ..start }).await);
    }
    let mut collector = store.collector(settings(), &coderd).await;
    assert_eq!(produced(&collector.pass().await.unwrap()), (8, 3, 0));
    assert_eq!(
        store.claims().await.into_iter().map(|claim| claim.build_id).collect::<BTreeSet<_>>(),
        claims
    );
    store.consume().await;
    let ids: Vec<_> = store.builds().await.into_keys().collect();
    assert!(
        store
            .ledger
            .run(async |conn| known::builds_without_claim(conn, collector.source().id, &ids).await)
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn a_first_build_that_fails_leaves_the_first_successful_start_to_the_second() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let workspace = coderd.workspace().await;
    let failed = coderd
        .build(&Build { error: Some("no quota"), ..coderd.first_start(workspace).await })
        .await;
    let second = coderd
        .build(&Build {
            number: 2,
            preset: Some(coderd.preset),
            ..coderd.first_start(workspace).await
        })
        .await;
    let third = coderd.build(&Build { number: 3, ..coderd.first_start(workspace).await }).await;
    store.collector(settings(), &coderd).await.pass().await.unwrap();
    let builds = store.builds().await;
    let firsts: Vec<bool> =
        [failed, second, third].iter().map(|id| builds[id].first_successful_start).collect();
    assert_eq!(firsts, [false, true, false]);
    assert_eq!(
        (builds[&second].preset_name.as_str(), builds[&failed].status.as_str()),
        ("large", "failed")
    );
}

#[tokio::test]
async fn a_removed_preset_leaves_the_build_without_one() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let workspace = coderd.workspace().await;
    let id = coderd
        .build(&Build { preset: Some(coderd.preset), ..coderd.first_start(workspace).await })
        .await;
    sqlx::query("delete from template_version_presets")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    store.collector(settings(), &coderd).await.pass().await.unwrap();
    let build = store.builds().await.remove(&id).unwrap();
    assert_eq!((build.preset_id, build.preset_name.as_str()), (None, ""));
}

#[tokio::test]
async fn a_simulated_history_arrives_whole() {
    for schema in [SchemaVersion::TasksEra, SchemaVersion::Sep2026] {
        let (coderd, store) = (database().await, store().await);
        let start = "2026-01-01T00:00:00Z".parse::<DateTime<Utc>>().unwrap();
        let config = Config::history(7, schema, start, start + TimeDelta::days(30), 600);
        let mut simulation = Simulation::start(config, &coderd.url).await.unwrap();
        simulation.finish().await.unwrap();
        let truth = simulation.truth();
        let mut keys = PublicKeys::new();
        keys.add(&truth.license_key.kid, &truth.license_key.public_key_pem).unwrap();
        let settings = Settings { page: 100, ..settings() };
        let (source, log, ledger) =
            (source_of(&coderd.url), store.log.clone(), store.ledger.clone());
        let mut collector = Collector::open(settings, source, keys, log, ledger, Clock::system())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(collector.source().deployment_id, truth.deployment_id);
        let report = collector.pass().await.unwrap();
        assert_eq!(i32::try_from(truth.builds.len()).unwrap(), report.builds);
        let builds = store.builds().await;
        for expected in &truth.builds {
            let build = &builds[&expected.id];
            assert_eq!(
                build.first_successful_start, expected.first_successful_start,
                "{expected:?}"
            );
            assert_eq!(
                (build.build_number, build.started_at, build.completed_at),
                (expected.build_number, expected.started_at, expected.completed_at)
            );
            let micros = build.duration().map(|duration| duration.num_microseconds().unwrap());
            assert_eq!(micros, expected.duration_micros);
        }
        let mut ids: Vec<String> = truth.usage.iter().map(|usage| usage.id.clone()).collect();
        ids.sort();
        assert_eq!(store.usage_ids().await, ids);
        let licenses = store
            .ledger
            .run(async |conn| licenses::present(conn, collector.source().id).await)
            .await
            .unwrap();
        assert_eq!(licenses.len(), truth.licenses.len());
        for (license, expected) in licenses.iter().zip(&truth.licenses) {
            assert_eq!(
                matches!(license.state, LicenseState::Verified(_)),
                expected.verifiable,
                "{license:?}"
            );
        }
        assert!(licenses.iter().any(|license| matches!(license.state, LicenseState::Verified(_))));
        assert_eq!(produced(&collector.pass().await.unwrap()), (0, 0, 0));
    }
}

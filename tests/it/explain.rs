//! The life of one event, from coderd's row to its export files. The tests compute the expected
//! explanation from their own acts.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use tallyline::coderd;
use tallyline::event::{Event, Message, Payload, PublishMarks, Topic, Usage, UsageQuantity};
use tallyline::ledger::{
    AttemptVerdict, BatchKind, Ledger, LicenseChange, LicenseState, NewExport, RejectState,
    Sequence, UsageRange, event_history, licenses, snapshots, sources,
};
use tallyline::operations::{
    ExplainRequest, Explanation, LogState, OperationError, Operations, SourceState,
};
use uuid::Uuid;

use crate::audit::Site;
use crate::export::publish;
use crate::support;
use crate::support::ledger::{ask, choose_license_rules, discard_all, take_lease};
use crate::support::process::run_tallyline;

fn operations(site: &Site) -> Operations {
    let coderd = coderd::Database::new(&site.coderd.database.url, Duration::from_secs(30)).unwrap();
    Operations {
        coderd: Some(coderd),
        deployment: Some(site.coderd.deployment),
        ..support::ledger::operations(&site.ledger, &site.log)
    }
}

async fn explain(
    site: &Site,
    event_id: &str,
    source: Option<Uuid>,
) -> Result<Explanation, OperationError> {
    ask(&operations(site), &ExplainRequest { event_id: event_id.to_owned(), source }).await
}

async fn explained(site: &Site, event_id: &str) -> Explanation {
    explain(site, event_id, None).await.unwrap()
}

/// Family, label values and observed seconds of each series.
fn series(explained: &Explanation) -> Vec<(&str, Vec<&str>, Option<f64>)> {
    let metrics = &explained.accepted.as_ref().unwrap().metrics;
    metrics
        .iter()
        .map(|one| {
            (
                one.family.as_str(),
                one.labels.iter().map(|label| label.value.as_str()).collect(),
                one.observed_seconds,
            )
        })
        .collect()
}

fn reasons(explained: &Explanation) -> Vec<(&str, &str)> {
    explained
        .accepted
        .as_ref()
        .unwrap()
        .not_in_metrics
        .iter()
        .map(|one| (one.family.as_str(), one.why.as_str()))
        .collect()
}

/// As if the deployment had been introduced long ago.
async fn introduced_long_ago(site: &Site) {
    site.tamper("update source set introduced_at = '2020-01-01T00:00:00Z'").await;
}

#[tokio::test]
async fn a_creation_is_followed_from_coderds_row_to_its_series() {
    let site = Site::new().await;
    let id = format!("workspace_build_completed:{}", site.creation);
    let before = explained(&site, &id).await;
    let total = "coderd_workspace_creation_total";
    let seconds = "coderd_workspace_creation_duration_seconds";
    assert_eq!(series(&before).iter().map(|one| one.0).collect::<Vec<_>>(), [total]);
    assert_eq!(
        reasons(&before),
        [(seconds, "it was completed before the introduction of its deployment")]
    );

    introduced_long_ago(&site).await;
    let explained = explained(&site, &id).await;
    assert_eq!(
        (explained.event_id.as_str(), explained.deployment_id),
        (id.as_str(), Some(site.coderd.deployment))
    );
    assert_eq!(explained.as_of_sequence, site.ledger.run(snapshots::head).await.unwrap());
    assert_eq!(explained.source.state, SourceState::Same, "{:?}", explained.source);
    assert_eq!(explained.refusals, []);
    let names: (String, String) =
        sqlx::query_as("select (select name from organizations), (select name from templates)")
            .fetch_one(&site.coderd.database.pool)
            .await
            .unwrap();
    let labels = vec![names.0.as_str(), names.1.as_str(), ""];
    // builds of these tests take a second
    assert_eq!(
        series(&explained),
        [(total, labels.clone(), None), (seconds, [labels, vec!["regular"]].concat(), Some(1.0))]
    );
    let accepted = explained.accepted.as_ref().unwrap();
    let stored: (i64, Sequence, i64, DateTime<Utc>, i64) = sqlx::query_as(
        "select b.id, named_sequence(b.sequence), b.epoch, b.recorded_at, e.log_offset from workspace_build e join batch b on b.id = e.batch_id
         where build_id = $1",
    )
    .bind(site.creation)
    .fetch_one(&site.ledger.pool)
    .await
    .unwrap();
    let batch = &accepted.batch;
    assert_eq!(
        (batch.id, batch.sequence, batch.epoch, batch.recorded_at),
        (stored.0, Some(stored.1), Some(stored.2), Some(stored.3))
    );
    assert_eq!(batch.kind, Some(BatchKind::Log));
    let log = &accepted.log;
    assert_eq!(
        (log.topic.as_str(), log.partition, log.generation),
        ("tallyline.workspace-builds.v1", Some(0), Some(1))
    );
    assert_eq!((log.offset, log.state), (stored.4, LogState::Same));
    assert!(accepted.digest_holds && accepted.digest.len() == 64);
    assert_eq!(accepted.event["data"]["build_id"], site.creation.to_string());
    assert!(
        accepted.publication.is_none()
            && accepted.license_windows.is_empty()
            && accepted.exports.is_empty()
    );
}

#[tokio::test]
async fn a_claim_and_its_build_are_two_events_and_only_the_claim_is_timed() {
    let site = Site::new().await;
    introduced_long_ago(&site).await;
    let claim = explained(&site, &format!("prebuild_claimed:{}", site.claim)).await;
    assert_eq!(claim.source.state, SourceState::Same);
    let series = series(&claim);
    assert_eq!(
        (series.len(), series[0].0, series[0].2),
        (1, "coderd_prebuilt_workspace_claim_duration_seconds", Some(1.0))
    );
    let build = explained(&site, &format!("workspace_build_completed:{}", site.claim)).await;
    let expected = [
        ("coderd_workspace_creation_total", "it is not its workspace's first successful start"),
        ("coderd_workspace_creation_duration_seconds", "it is not a creation of a workspace"),
    ];
    assert_eq!(
        (build.accepted.as_ref().unwrap().metrics.len(), reasons(&build)),
        (0, expected.to_vec())
    );
}

#[tokio::test]
async fn later_changes_in_coderd_the_log_and_the_ledger_are_reported() {
    let site = Site::new().await;
    let id = format!("workspace_build_completed:{}", site.creation);
    let rewrite = "update provisioner_jobs set started_at = started_at - interval '1 second'
                   where id = (select job_id from workspace_builds where id = $1)";
    site.tamper_source(rewrite, site.creation).await;
    assert_eq!(explained(&site, &id).await.source.state, SourceState::Changed);
    site.tamper_source("delete from workspace_builds where id = $1", site.creation).await;
    assert_eq!(explained(&site, &id).await.source.state, SourceState::Gone);

    site.tamper("update workspace_build set build_number = build_number + 7").await;
    assert!(!explained(&site, &id).await.accepted.unwrap().digest_holds);
    site.tamper("update log_record set payload = 'other'").await;
    assert_eq!(explained(&site, &id).await.accepted.unwrap().log.state, LogState::Other);
    site.tamper("delete from log_record; update log_partition set start_offset = next_offset")
        .await;
    assert_eq!(explained(&site, &id).await.accepted.unwrap().log.state, LogState::Gone);

    // a side that is away leaves the rest of the explanation
    let unreachable =
        coderd::Database::new("postgres://unknown@127.0.0.1:1/none", Duration::from_secs(1))
            .unwrap();
    let request = ExplainRequest { event_id: id, source: None };
    for coderd in [Some(unreachable), None] {
        let explained = ask(&Operations { coderd, ..operations(&site) }, &request).await.unwrap();
        assert_eq!(
            (explained.source.state, explained.accepted.is_some()),
            (SourceState::NotAsked, true)
        );
    }
}

/// A license in the ledger's form, with separate limits; `end` is that of its usage period.
fn license(id: i32, start: DateTime<Utc>, end: DateTime<Utc>) -> LicenseChange {
    let at = |time: DateTime<Utc>| time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
    let claims = json!({
        "issued_at": at(start), "not_before": at(start), "license_expires": at(end), "expires_at": at(end), "account_type": "salesforce",
        "account_id": "account-1", "features": {"managed_agent_limit_soft": 10, "managed_agent_limit_hard": 20},
    });
    let jwt_sha256 = [u8::try_from(id).unwrap(); 32];
    LicenseChange {
        license_id: id,
        jwt_sha256,
        uploaded_at: None,
        state: LicenseState::Verified(claims),
    }
}

/// The id of the only source, and the time of the only usage event.
async fn source_and_time_of_usage(ledger: &Ledger) -> (i16, DateTime<Utc>) {
    sqlx::query_as("select source_id, created_at from usage_event")
        .fetch_one(&ledger.pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn usage_is_followed_into_its_license_windows_its_requests_and_its_files() {
    let site = Site::new().await;
    let (source_id, at) = source_and_time_of_usage(&site.ledger).await;
    let (tick, week) = (TimeDelta::microseconds(1), TimeDelta::weeks(1));
    let lease =
        take_lease(&site.ledger, "test", "test", Duration::from_secs(60)).await.unwrap().unwrap();
    // half-open windows; the third one was issued last of those that are valid now, a moment after
    // the usage
    let licenses =
        [license(1, at, at + week), license(2, at - week, at), license(3, at + tick, at + week)];
    site.ledger
        .run(async |conn| {
            licenses::record(conn, &lease, source_id, &licenses, site.ledger.clock.now()).await
        })
        .await
        .unwrap();
    let pending = explained(&site, "usage-1").await.accepted.unwrap();
    assert_eq!(
        pending.publication.as_ref().map(|life| (life.state.as_str(), life.attempts.len())),
        Some(("pending", 0))
    );
    assert!(pending.publication.unwrap().next_attempt_at.is_some());
    let windows: Vec<_> = pending
        .license_windows
        .iter()
        .map(|one| (one.license_id, one.counts, one.agents, one.in_force))
        .collect();
    assert_eq!(windows, [(1, true, 1, false), (2, false, 0, false), (3, false, 0, true)]);
    assert_eq!((pending.license_windows[0].start, pending.license_windows[0].end), (at, at + week));
    assert!(pending.metrics.is_empty() && pending.not_in_metrics.is_empty());

    let accepted_at = pending.batch.sequence.unwrap();
    let request = publish(&site.ledger, source_id, "usage-1").await;
    let later = |by| Sequence { number: accepted_at.number + by, ..accepted_at };
    let hour = TimeDelta::hours(1);
    let range = |from, to, source, as_of| UsageRange { from, to, source, as_of };
    let (own, all) = (Some(site.coderd.deployment), None);
    let written = [
        (range(at - hour, at + hour, all, accepted_at), true),
        (range(at, at + hour, own, later(1)), true),
        (range(at - hour, at, all, accepted_at), false),
        (range(at - hour, at + hour, all, later(-1)), false),
    ];
    let mut expected = Vec::new();
    for (range, holds) in &written {
        let export = NewExport {
            actor: "user-001",
            reason: "June",
            range,
            format: "csv",
            events: 1,
            sha256: [7; 32],
        };
        let id = site
            .ledger
            .run(async |conn| {
                event_history::record_export(conn, &export, site.ledger.clock.now()).await
            })
            .await
            .unwrap();
        expected.extend(holds.then_some(id));
    }
    let accepted = explained(&site, "usage-1").await.accepted.unwrap();
    let life = accepted.publication.unwrap();
    assert_eq!(
        (life.state.as_str(), life.next_attempt_at, life.attempts.len()),
        ("published", None, 1)
    );
    let attempt = &life.attempts[0];
    assert_eq!(
        (attempt.request_id, attempt.status, attempt.verdict),
        (request, Some(200), Some(AttemptVerdict::Accepted))
    );
    assert_eq!(
        (attempt.license_sha256.as_str(), attempt.sequence),
        ("01".repeat(32).as_str(), life.settled_sequence)
    );
    assert_eq!(accepted.exports.iter().map(|export| export.id).collect::<Vec<_>>(), expected);
    assert_eq!(
        (accepted.exports[0].sha256.as_str(), accepted.exports[0].actor.as_str()),
        ("07".repeat(32).as_str(), "user-001")
    );
}

#[tokio::test]
async fn license_windows_go_by_the_chosen_rules_and_outlive_their_licenses() {
    let site = Site::new().await;
    let (source_id, at) = source_and_time_of_usage(&site.ledger).await;
    let week = TimeDelta::weeks(1);
    // a hard limit below the soft one grants nothing in 2025-07; in 2026-02 only the soft one
    // exists
    let mut of_2026 = license(2, at - week, at + week);
    let LicenseState::Verified(claims) = &mut of_2026.state else { panic!("it is verified") };
    claims["features"] = json!({"managed_agent_limit_soft": 50, "managed_agent_limit_hard": 45});
    let lease =
        take_lease(&site.ledger, "test", "test", Duration::from_secs(60)).await.unwrap().unwrap();
    let both = [license(1, at, at + week), of_2026];
    site.ledger
        .run(async |conn| {
            licenses::record(conn, &lease, source_id, &both, site.ledger.clock.now()).await
        })
        .await
        .unwrap();
    let windows = async || {
        let windows = explained(&site, "usage-1").await.accepted.unwrap().license_windows;
        windows
            .into_iter()
            .map(|one| (one.license_id, one.agents, one.in_force, one.gone_at))
            .collect::<Vec<_>>()
    };
    assert_eq!(windows().await, [(1, 1, true, None)], "by the pipeline's rules");

    choose_license_rules(&site.ledger, "2026-02").await;
    // the first one was issued later
    assert_eq!(windows().await, [(1, 1, true, None), (2, 1, false, None)], "by the chosen rules");

    let gone = LicenseChange { state: LicenseState::Gone, ..both[0].clone() };
    site.ledger
        .run(async |conn| {
            licenses::record(conn, &lease, source_id, &[gone], site.ledger.clock.now()).await
        })
        .await
        .unwrap();
    let gone_at: DateTime<Utc> = sqlx::query_scalar(
        "select recorded_at from batch where kind = 'licenses' order by sequence desc limit 1",
    )
    .fetch_one(&site.ledger.pool)
    .await
    .unwrap();
    assert_eq!(windows().await, [(1, 1, false, Some(gone_at)), (2, 1, true, None)]);
    // a license that returned is present again
    site.ledger
        .run(async |conn| {
            licenses::record(conn, &lease, source_id, &both[..1], site.ledger.clock.now()).await
        })
        .await
        .unwrap();
    assert_eq!(windows().await, [(1, 1, true, None), (2, 1, false, None)]);
}

fn usage_of(deployment: Uuid, id: &str, at: DateTime<Utc>) -> Message {
    let usage = Usage {
        id: id.to_owned(),
        quantity: UsageQuantity::ManagedAgents(1),
        created_at: at,
        marks: PublishMarks::default(),
    };
    Event { deployment, payload: Payload::Usage(usage) }.to_message()
}

#[tokio::test]
async fn an_id_of_several_deployments_needs_its_source() {
    let site = Site::new().await;
    let (other, now) = (Uuid::from_u128(0xd2), site.coderd.now().await);
    site.ledger
        .run(async |conn| sources::register(conn, other, now, None, site.ledger.clock.now()).await)
        .await
        .unwrap();
    site.log.append(Topic::AgentUsage, vec![usage_of(other, "usage-1", now)]).await.unwrap();
    site.consume().await;
    let several = explain(&site, "usage-1", None).await.unwrap_err();
    assert!(
        matches!(&several, OperationError::Invalid { field: "source", message } if message.contains(&other.to_string())),
        "{several}"
    );
    let own = explain(&site, "usage-1", Some(site.coderd.deployment)).await.unwrap();
    assert_eq!(
        (own.deployment_id, own.source.state),
        (Some(site.coderd.deployment), SourceState::Same)
    );
    let foreign = explain(&site, "usage-1", Some(other)).await.unwrap();
    assert_eq!((foreign.deployment_id, foreign.source.state), (Some(other), SourceState::NotAsked));
    assert_eq!(foreign.accepted.unwrap().log.state, LogState::Same);
}

#[tokio::test]
async fn an_event_that_is_only_a_reject_has_the_history_of_a_reject() {
    let mut site = Site::new().await;
    let now = site.coderd.now().await;
    site.coderd.usage("usage-bad", "dc_managed_agents_v1", json!({"count": 0}), now).await;
    site.collect().await;
    let open = explained(&site, "usage-bad").await;
    assert_eq!(
        (open.source.state, open.accepted.is_none(), open.refusals.len()),
        (SourceState::Unreadable, true, 1)
    );
    let refusal = &open.refusals[0];
    assert_eq!(
        (refusal.disposition.as_str(), refusal.state.as_str(), refusal.acts.len()),
        ("rejected", "open", 0)
    );
    assert!(refusal.detail.contains("count") && refusal.sequence.is_some(), "{refusal:?}");

    discard_all(&site.ledger).await;
    let discarded = explained(&site, "usage-bad").await.refusals.remove(0);
    assert_eq!(discarded.state, RejectState::Discarded);
    let acts: Vec<_> = discarded
        .acts
        .iter()
        .map(|act| (act.act.as_str(), act.actor.as_str(), act.reason.as_str()))
        .collect();
    assert_eq!(acts, [("discard", "user-001", "a test")]);
}

#[tokio::test]
async fn a_conflict_is_shown_beside_the_accepted_event() {
    let site = Site::new().await;
    let other =
        usage_of(site.coderd.deployment, "usage-1", site.coderd.now().await + TimeDelta::hours(1));
    site.log.append(Topic::AgentUsage, vec![other]).await.unwrap();
    site.consume().await;
    let explained = explained(&site, "usage-1").await;
    assert!(explained.accepted.is_some());
    assert_eq!(
        explained.refusals.iter().map(|refusal| refusal.disposition.as_str()).collect::<Vec<_>>(),
        ["conflict"]
    );
}

#[tokio::test]
async fn an_unknown_id_is_not_found_and_the_searched_places_are_listed() {
    let site = Site::new().await;
    let missing = explain(&site, "no-such-usage", None).await.unwrap_err();
    let address =
        coderd::Database::new(&site.coderd.database.url, Duration::from_secs(1)).unwrap().address();
    let incarnation = site.ledger.run(snapshots::head).await.unwrap().incarnation.to_string();
    assert!(matches!(missing, OperationError::NotFound(_)));
    for words in ["no-such-usage", "tallyline.agent-usage.v1", "rejects", &incarnation, &address] {
        assert!(missing.to_string().contains(words), "{words} is not in {missing}");
    }
    // an event that only coderd has is reported, without a life yet
    let now = site.coderd.now().await;
    site.coderd.usage("usage-new", "dc_managed_agents_v1", json!({"count": 1}), now).await;
    let new = explained(&site, "usage-new").await;
    assert_eq!(
        (new.source.state, new.accepted, new.refusals),
        (SourceState::NotAccepted, None, Vec::new())
    );
}

#[tokio::test]
async fn the_command_shows_a_page_and_the_same_as_json() {
    let site = Site::new().await;
    introduced_long_ago(&site).await;
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("pipeline.toml");
    let settings = format!(
        "roles = ['consume']\nledger.url = '{}'\nsource.coderd_url = '{}'\nsource.deployment_id = '{}'\n",
        site.database.url, site.coderd.database.url, site.coderd.deployment
    );
    std::fs::write(&file, settings).unwrap();
    let run = async |id: &str, more: &[&str]| {
        run_tallyline(&[&["explain", id, "--pipeline", file.to_str().unwrap()], more].concat(), &[])
            .await
    };
    let id = format!("workspace_build_completed:{}", site.creation);
    let page = run(&id, &[]).await;
    assert!(page.status.success() && page.stderr.is_empty(), "{page:?}");
    let place = "tallyline.workspace-builds.v1/0@";
    for words in [
        &id,
        "SOURCE",
        "with the same digest",
        place,
        "LEDGER",
        "sequence",
        "METRICS",
        "observed 1 s",
        "AS OF",
    ] {
        assert!(page.stdout.contains(words), "{words:?} is not in\n{}", page.stdout);
    }
    let usage = run("usage-1", &[]).await;
    assert!(
        usage.stdout.contains("PUBLISHED   pending") && usage.stdout.contains("in no file yet"),
        "{usage:?}"
    );
    let answer = run(&id, &["--output", "json"]).await;
    let answer: Explanation = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(answer, explained(&site, &id).await);
    let long = "x".repeat(1025);
    for (id, exit, words) in [
        ("no-such", 4, "is known nowhere"),
        ("prebuild_claimed:7", 2, "event_id: \"7\" after prebuild_claimed: is not a build id"),
        ("", 2, "event_id: is empty"),
        (long.as_str(), 2, "event_id: has 1025 bytes"),
    ] {
        let refused = run(id, &[]).await;
        assert_eq!(
            (refused.status.code(), refused.stdout.as_str()),
            (Some(exit), ""),
            "{refused:?}"
        );
        assert!(refused.stderr.contains(words), "{refused:?}");
    }
}

//! Corrections of accepted events: the ledger is set to coderd's row, its earlier sequences stay as
//! they are, and nothing of a true event can be changed.

mod builds;
mod publications;

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use tallyline::audit::Audit;
use tallyline::coderd;
use tallyline::event::{Event, Payload, PublishMarks, Topic, Usage, UsageQuantity};
use tallyline::export::export_usage;
use tallyline::ledger::{
    LicenseChange, LicenseState, PublicationState, Sequence, UsageRange, licenses, snapshots,
    sources,
};
use tallyline::operations::{
    Actor, Corrected, CorrectionExecution, CorrectionPlan, CorrectionRequest, ExplainRequest,
    LogRange, OperationError, Operations, ReplayExecution, SourceState,
};
use tallyline::projection::{Folded, fold_on, fold_to};
use tallyline::stages::LicensesState;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::audit::{Site, differences};
use crate::support;
use crate::support::ledger::{act, ask, take_lease};
use crate::support::process::run_tallyline;

fn operator() -> Actor {
    Actor { name: "sre-1".into(), reason: "forged before the keys were set".into() }
}

fn operations(site: &Site) -> Operations {
    let coderd = coderd::Database::new(&site.coderd.database.url, Duration::from_secs(30)).unwrap();
    Operations {
        coderd: Some(coderd),
        deployment: Some(site.coderd.deployment),
        ..support::ledger::operations(&site.ledger, &site.log)
    }
}

fn request(ids: &[&str]) -> CorrectionRequest {
    CorrectionRequest {
        event_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        source: None,
        allow_confirmed: false,
    }
}

async fn plan(site: &Site, ids: &[&str]) -> Result<CorrectionPlan, OperationError> {
    ask(&operations(site), &request(ids)).await
}

async fn execute(site: &Site, ids: &[&str], hash: &str) -> Result<Corrected, OperationError> {
    let execution = CorrectionExecution { correction: request(ids), hash: hash.to_owned() };
    act(&operations(site), &execution, &operator()).await
}

/// Plans and executes.
async fn correct(site: &Site, ids: &[&str]) -> Corrected {
    let plan = plan(site, ids).await.unwrap();
    let corrected = execute(site, ids, &plan.hash).await.unwrap();
    assert_eq!(corrected.plan.as_ref(), Some(&plan));
    corrected
}

fn agents(site: &Site, id: &str, count: u64, created_at: DateTime<Utc>) -> Event {
    Event {
        deployment: site.coderd.deployment,
        payload: Payload::Usage(Usage {
            id: id.to_owned(),
            quantity: UsageQuantity::ManagedAgents(count),
            created_at,
            marks: PublishMarks::default(),
        }),
    }
}

/// A foreign producer appends these events, and the ledger accepts what it can.
async fn forge(site: &Site, events: &[Event]) {
    for event in events {
        site.log.append(event.topic(), vec![event.to_message()]).await.unwrap();
    }
    site.consume().await;
}

async fn head(site: &Site) -> Sequence {
    site.ledger.run(snapshots::head).await.unwrap()
}

/// The managed agents at a sequence.
async fn counted(site: &Site, at: i64) -> u128 {
    let folded: Folded<LicensesState> = fold_to(&site.ledger, at).await.unwrap();
    assert_eq!(fold_on::<LicensesState>(&site.ledger, at).await.unwrap(), folded);
    let agents = &folded.state.deployment(site.coderd.deployment).unwrap().agents;
    agents.count(DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC)
}

/// The lines of an export as of a sequence, without the header.
async fn exported(site: &Site, as_of: Sequence) -> Vec<String> {
    let now = site.coderd.now().await;
    let range = UsageRange {
        from: now - TimeDelta::days(20),
        to: now + TimeDelta::days(1),
        source: None,
        as_of,
    };
    let mut bytes = Vec::new();
    export_usage(&site.ledger, &range, &mut bytes).await.unwrap();
    String::from_utf8(bytes).unwrap().lines().skip(1).map(str::to_owned).collect()
}

/// coderd's license for ten years, with the id 1.
async fn add_license(site: &Site) {
    let lease = take_lease(&site.ledger, "collector", "test", Duration::from_secs(30)).await;
    let claims = json!({
        "issued_at": "2020-01-01T00:00:00Z", "not_before": "2020-01-01T00:00:00Z", "license_expires": "2040-01-01T00:00:00Z",
        "expires_at": "2040-01-01T00:00:00Z", "token_id": "1", "account_type": "salesforce", "account_id": "1", "feature_set": "premium",
        "features": { "managed_agent_limit": 100 },
    });
    let change = LicenseChange {
        license_id: 1,
        jwt_sha256: [1; 32],
        uploaded_at: None,
        state: LicenseState::Verified(claims),
    };
    let (lease, deployment) = (lease.unwrap().unwrap(), site.coderd.deployment);
    site.ledger
        .run(async |conn| {
            let source = sources::get(conn, deployment).await.unwrap().unwrap();
            licenses::record(conn, &lease, source.id, &[change], site.ledger.clock.now()).await
        })
        .await
        .unwrap();
}

fn audit(site: &Site) -> Audit {
    let database = coderd::Database::new(&site.coderd.database.url, Duration::from_secs(30));
    Audit {
        ledger: site.ledger.clone(),
        log: site.log.clone(),
        source: Some((database.unwrap(), site.coderd.deployment)),
        patience: Duration::ZERO,
    }
}

/// [`agrees`], and no row was changed by hand.
async fn balances(site: &Site) {
    agrees(site).await;
    let audit = audit(site);
    let chain = audit.chained(audit.head().await.unwrap(), None, |_| ()).await.unwrap();
    assert_eq!(chain.differences, []);
}

/// Nothing differs, with the log and coderd, record by record; every usage event is in one state.
async fn agrees(site: &Site) {
    let audit = audit(site);
    let deep = audit.deep(&audit.rereadable().await.unwrap(), |_| ()).await.unwrap();
    let report = audit.run().await.unwrap().with(deep);
    assert_eq!(differences(&report), []);
    let source = report.joints.iter().find(|joint| joint.name == "source and ledger").unwrap();
    assert_eq!(source.numbers["slices_that_differed_at_first"], 0, "{:?}", source.numbers);
    let vendor = report.joints.iter().find(|joint| joint.name == "ledger and vendor").unwrap();
    let states: i64 =
        PublicationState::ALL.iter().filter_map(|state| vendor.numbers.get(state.as_str())).sum();
    assert_eq!(states, vendor.numbers["accepted_usage"], "{:?}", vendor.numbers);
}

/// Replays all topics; returns records, duplicates and accepted events.
async fn replay(site: &Site) -> (i32, i32, i32) {
    let operations = operations(site);
    let topics = Topic::ALL.map(|topic| topic.name().to_owned()).to_vec();
    let range = LogRange { topics, from: "earliest".into(), until: "latest".into() };
    let plan = ask(&operations, &range).await.unwrap();
    assert!(plan.effect.is_empty(), "{:?}", plan.effect);
    let execution = ReplayExecution { hash: plan.hash, records_per_second: Some(1_000_000) };
    let stop = CancellationToken::new();
    let replayed =
        operations.execute_replay(&execution, &operator(), &|_| {}, &stop).await.unwrap();
    (replayed.records, replayed.duplicates, replayed.accepted)
}

async fn count(site: &Site, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(&site.ledger.pool).await.unwrap()
}

#[tokio::test]
async fn a_forged_event_is_corrected_to_nothing_from_its_sequence_on_and_stays_so() {
    let site = Site::new().await;
    add_license(&site).await;
    let now = site.coderd.now().await;
    forge(&site, &[agents(&site, "forged", 1_000, now)]).await;
    let before = head(&site).await;
    let (file, old_count) = (exported(&site, before).await, counted(&site, before.number).await);
    assert_eq!((file.len(), old_count), (2, 1_001));

    let planned = plan(&site, &["forged"]).await.unwrap();
    let event = &planned.events[0];
    assert_eq!((event.confirmed, &event.after, planned.events.len()), (false, &None, 1));
    assert_eq!(event.before.as_ref().unwrap()["data"], json!({ "count": 1_000 }));
    assert_eq!(
        (event.publication, event.publication_after),
        (Some(PublicationState::Pending), Some(PublicationState::Withdrawn))
    );
    let window = &planned.licenses[0];
    assert_eq!((window.license_id, window.before, window.after), (1, 1_001, 1));
    assert_eq!((planned.metrics.len(), planned.vendor.len()), (0, 0));
    assert_eq!(head(&site).await, before, "a plan writes nothing");

    let corrected = correct(&site, &["forged"]).await;
    assert_eq!(corrected.sequence.number, before.number + 1);
    let after = head(&site).await;
    assert_eq!(counted(&site, after.number).await, 1);
    assert_eq!(counted(&site, before.number).await, 1_001, "as known at an earlier sequence");
    assert_eq!(exported(&site, before).await, file, "the same bytes as of the same sequence");
    let rest: Vec<String> =
        file.iter().filter(|line| !line.contains(",forged,")).cloned().collect();
    assert_eq!(exported(&site, after).await, rest);
    balances(&site).await;

    let (records, duplicates, accepted) = replay(&site).await;
    assert_eq!((records, accepted), (duplicates, 0));
    forge(&site, &[agents(&site, "forged", 1_000, now)]).await;
    assert_eq!(count(&site, "select count(*) from reject").await, 0);
    assert_eq!(counted(&site, i64::MAX).await, 1);
    assert_eq!(exported(&site, head(&site).await).await, rest);
    balances(&site).await;

    let explained = ExplainRequest { event_id: "forged".into(), source: None };
    let explained = ask(&operations(&site), &explained).await.unwrap();
    let accepted = explained.accepted.unwrap();
    let [correction] = &accepted.corrections[..] else { panic!("{:?}", accepted.corrections) };
    assert_eq!(
        (correction.sequence, correction.actor.as_str(), &correction.corrected),
        (Some(corrected.sequence), "sre-1", &None)
    );
    assert_eq!(correction.refused_digest.as_ref(), Some(&accepted.digest));
    assert_eq!(explained.source.state, SourceState::Gone);
    assert_eq!(accepted.license_windows, []);
    assert_eq!(accepted.publication.unwrap().state, PublicationState::Withdrawn);
}

#[tokio::test]
async fn an_event_with_other_content_gets_coderds_and_its_record_becomes_a_duplicate() {
    let mut site = Site::new().await;
    let now = site.coderd.now().await;
    forge(&site, &[agents(&site, "usage-2", 500, now - TimeDelta::days(25))]).await;
    site.coderd.usage("usage-2", "dc_managed_agents_v1", json!({"count": 2}), now).await;
    site.collect().await;
    let true_event = agents(&site, "usage-2", 2, now);
    forge(&site, std::slice::from_ref(&true_event)).await;
    let before = head(&site).await;
    assert_eq!(counted(&site, before.number).await, 501);
    assert_eq!(exported(&site, before).await.len(), 1, "it is dated before the range");

    let corrected = correct(&site, &["usage-2"]).await;
    let event = &corrected.plan.as_ref().unwrap().events[0];
    assert_eq!(event.after, Some(true_event.to_structured()));
    assert_eq!(event.differs, ["count", "time"]);
    let after = head(&site).await;
    assert_eq!((counted(&site, before.number).await, counted(&site, after.number).await), (501, 3));
    let file = exported(&site, after).await;
    let line = file.iter().find(|line| line.contains(",usage-2,")).expect("in the range now");
    assert!(
        line.contains(",dc_managed_agents_v1,2,agents,") && line.contains(",pending,"),
        "{line}"
    );
    assert!(line.ends_with(&format!(",{}", corrected.sequence)), "{line}");
    assert_eq!(exported(&site, before).await.len(), 1);

    let rejects = count(&site, "select count(*) from reject").await;
    forge(&site, &[true_event, agents(&site, "usage-2", 500, now - TimeDelta::days(25))]).await;
    assert_eq!(count(&site, "select count(*) from reject").await, rejects, "both are duplicates");
    forge(&site, &[agents(&site, "usage-2", 501, now)]).await;
    assert_eq!(count(&site, "select count(*) from reject").await, rejects + 1, "a new conflict");
    assert_eq!(counted(&site, i64::MAX).await, 3);
    assert_eq!(replay(&site).await.2, 0);
    balances(&site).await;
}

#[tokio::test]
async fn an_event_that_coderd_has_after_all_returns_and_a_digest_may_become_true() {
    let site = Site::new().await;
    let now = site.coderd.now().await;
    forge(&site, &[agents(&site, "hb:tomorrow", 7, now)]).await;
    correct(&site, &["hb:tomorrow"]).await;
    site.coderd.usage("hb:tomorrow", "dc_managed_agents_v1", json!({"count": 7}), now).await;
    let back = correct(&site, &["hb:tomorrow"]).await.plan.unwrap();
    assert_eq!(
        (back.events[0].publication, back.events[0].publication_after),
        (Some(PublicationState::Withdrawn), Some(PublicationState::Pending))
    );
    assert_eq!(counted(&site, i64::MAX).await, 8);
    let sequence = head(&site).await.number;
    assert_eq!(counted(&site, sequence - 1).await, 1);
    assert_eq!(counted(&site, sequence - 2).await, 8);
    assert_eq!(exported(&site, head(&site).await).await.len(), 2);
    balances(&site).await;
}

#[tokio::test]
async fn a_true_event_an_unknown_id_and_another_source_are_refused() {
    let mut site = Site::new().await;
    let creation = format!("workspace_build_completed:{}", site.creation);
    let refused = async |ids: &[&str], source: Option<Uuid>| {
        let request = CorrectionRequest { source, ..request(ids) };
        ask(&operations(&site), &request).await.unwrap_err()
    };
    let is_forbidden = |error: OperationError, text: &str| matches!(&error, OperationError::Forbidden(message) if message.contains(text));
    for id in ["usage-1", &creation, &format!("prebuild_claimed:{}", site.claim)] {
        assert!(is_forbidden(refused(&[id], None).await, "it is a true event"), "{id}");
    }
    let unknown = refused(&["no such usage"], None).await;
    assert!(
        matches!(&unknown, OperationError::NotFound(message) if message.contains("no such usage")),
        "{unknown}"
    );
    for ids in [&["workspace_build_completed:x"][..], &[""], &[]] {
        let error = refused(ids, None).await;
        assert!(
            matches!(error, OperationError::Invalid { field: "event_ids", .. }),
            "{ids:?}: {error}"
        );
    }
    let many: Vec<String> = (0..1_001).map(|n| format!("usage-{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert!(matches!(refused(&many, None).await, OperationError::Invalid { .. }));

    let other = Uuid::from_u128(0xd2);
    assert!(is_forbidden(refused(&["usage-1"], Some(other)).await, "is the database of"));
    site.ledger
        .run(async |conn| {
            sources::register(conn, other, site.ledger.clock.now(), None, site.ledger.clock.now())
                .await
        })
        .await
        .unwrap();
    let foreign =
        Event { deployment: other, ..agents(&site, "foreign", 1, site.coderd.now().await) };
    forge(&site, &[foreign]).await;
    let text = format!("belongs to source {other}");
    assert!(is_forbidden(refused(&["foreign"], None).await, &text));

    // confirmed by an audit, and then removed by coderd: it stays counted
    assert_eq!(site.audit().await.joints.len(), 3);
    site.tamper_source("delete from workspace_builds where id = $1", site.creation).await;
    assert!(is_forbidden(refused(&[&creation], None).await, "has confirmed"));
    let allowed = CorrectionRequest { allow_confirmed: true, ..request(&[&creation]) };
    let plan = ask(&operations(&site), &allowed).await.unwrap();
    assert_eq!((plan.events[0].confirmed, &plan.events[0].after), (true, &None));

    let without_reason = Actor { reason: String::new(), ..operator() };
    let execution = CorrectionExecution { correction: allowed, hash: plan.hash };
    let error = act(&operations(&site), &execution, &without_reason).await.unwrap_err();
    assert!(matches!(error, OperationError::Invalid { field: "reason", .. }), "{error}");
    assert_eq!(count(&site, "select count(*) from correction").await, 0);
    site.collect().await;
}

#[tokio::test]
async fn only_the_planned_effect_is_executed() {
    let site = Site::new().await;
    let now = site.coderd.now().await;
    forge(&site, &[agents(&site, "forged", 5, now), agents(&site, "other", 5, now)]).await;
    let planned = plan(&site, &["forged"]).await.unwrap();
    let changed = |result: Result<Corrected, OperationError>| matches!(result, Err(OperationError::Forbidden(message)) if message.contains("plan again"));
    assert!(changed(execute(&site, &["forged"], "ce23").await));
    assert!(changed(execute(&site, &["forged", "other"], &planned.hash).await), "other events");

    site.coderd.usage("forged", "dc_managed_agents_v1", json!({"count": 3}), now).await;
    assert!(changed(execute(&site, &["forged"], &planned.hash).await), "coderd's row has changed");
    let planned = plan(&site, &["forged"]).await.unwrap();
    site.tamper("update publication set unanswered = true where event_id = 'forged'").await;
    assert!(changed(execute(&site, &["forged"], &planned.hash).await), "it may have been sent");
    assert_eq!(count(&site, "select count(*) from correction").await, 0);
    assert_eq!(counted(&site, i64::MAX).await, 11);
    correct(&site, &["forged", "other", "forged"]).await;
    assert_eq!(counted(&site, i64::MAX).await, 4);
}

#[tokio::test]
async fn an_executed_plan_is_not_found_once_its_content_is_corrected_again() {
    let site = Site::new().await;
    let now = site.coderd.now().await;
    forge(&site, &[agents(&site, "hb:tomorrow", 7, now)]).await;
    let first = correct(&site, &["hb:tomorrow"]).await;
    let hash = first.plan.unwrap().hash;
    let repeated = execute(&site, &["hb:tomorrow"], &hash).await.unwrap();
    assert_eq!((repeated.sequence, repeated.plan), (first.sequence, None));
    site.coderd.usage("hb:tomorrow", "dc_managed_agents_v1", json!({"count": 7}), now).await;
    correct(&site, &["hb:tomorrow"]).await;
    assert!(execute(&site, &["hb:tomorrow"], &hash).await.is_err(), "it is true now");
    sqlx::query("delete from usage_events where id = 'hb:tomorrow'")
        .execute(&site.coderd.database.pool)
        .await
        .unwrap();
    let plan = plan(&site, &["hb:tomorrow"]).await;
    assert!(matches!(plan, Err(OperationError::Forbidden(_))), "a corrected event is confirmed");
}

#[tokio::test]
async fn the_command_plans_first_and_executes_that_plan() {
    let site = Site::new().await;
    let now = site.coderd.now().await;
    forge(&site, &[agents(&site, "forged", 5, now)]).await;
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("pipeline.toml");
    let settings = format!(
        "roles = ['consume']\nledger.url = '{}'\nsource.coderd_url = '{}'\nsource.deployment_id = '{}'\n",
        site.database.url, site.coderd.database.url, site.coderd.deployment
    );
    std::fs::write(&file, settings).unwrap();
    let run = async |words: &[&str]| {
        let first = ["events", "correct", "forged", "--pipeline", file.to_str().unwrap()];
        run_tallyline(&[&first[..], words].concat(), &[]).await
    };
    let page = run(&[]).await;
    assert!(page.status.success(), "{page:?}");
    for words in [
        "IN CODERD",
        "\"count\":5",
        "pending, then withdrawn",
        "execute  tallyline events correct forged",
    ] {
        assert!(page.stdout.contains(words), "{words:?} is not in {}", page.stdout);
    }
    let plan = run(&["--output", "json"]).await;
    let plan: serde_json::Value = serde_json::from_str(&plan.stdout).unwrap();
    let hash = plan["hash"].as_str().unwrap();
    let without_reason = run(&["--plan", hash]).await;
    assert_eq!(without_reason.status.code(), Some(2), "{without_reason:?}");
    assert_eq!(counted(&site, i64::MAX).await, 6);

    let done = run(&["--plan", hash, "--reason", "forged", "--as", "sre-1"]).await;
    assert!(
        done.status.success() && done.stdout.contains("1 corrected, from ledger sequence"),
        "{done:?}"
    );
    assert_eq!(counted(&site, i64::MAX).await, 1);
    // its answer may have been lost
    let again = run(&["--plan", hash, "--reason", "forged"]).await;
    assert!(again.status.success(), "{again:?}");
    let from = |stdout: &str| stdout.split("from ledger sequence").last().map(str::to_owned);
    assert_eq!(from(&again.stdout), from(&done.stdout), "{again:?}");
    assert_eq!(count(&site, "select count(*) from correction").await, 1);
    let plan = run(&[]).await;
    assert_eq!(plan.status.code(), Some(4), "{plan:?}");
    assert!(plan.stderr.contains("is corrected already"), "{plan:?}");
}

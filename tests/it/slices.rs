//! The audit of source and ledger by slices: equal slices are not read, and each kind of difference
//! is found.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use tallyline::audit::{Audit, AuditTelemetry, Continuous};
use tallyline::clock::Clock;
use tallyline::coderd;
use tallyline::event::PREBUILDS_USER;
use tallyline::ledger::{Finding, findings, late_audits};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::audit::{LOG, SOURCE, Site, differences, number, open, remarks};
use crate::support::coderd::Build;
use crate::support::eventually;

const SOON: Duration = Duration::from_secs(60);
const DIFFERED: &str = "slices_that_differed_at_first";

/// A continuous audit in the background, with its own clock.
struct Audits {
    clock: Clock,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Audits {
    fn start(site: &Site, every: Duration) -> Audits {
        Audits::start_with(site, every, 1_000)
    }

    /// Audits that are late after this number of intervals.
    fn start_with(site: &Site, every: Duration, late_after: u32) -> Audits {
        let clock = Clock::manual(site.ledger.clock.now());
        let mut ledger = site.ledger.clone();
        ledger.clock = clock.clone();
        let database =
            coderd::Database::new(&site.coderd.database.url, Duration::from_secs(30)).unwrap();
        let audit = Audit {
            ledger,
            log: site.log.clone(),
            source: Some((database, site.coderd.deployment)),
            patience: Duration::from_secs(20),
        };
        let telemetry = AuditTelemetry::register(&prometheus::Registry::new(), true).unwrap();
        let continuous = Continuous { audit, every, late_after, holder: "test".into(), telemetry };
        let stop = CancellationToken::new();
        let signal = stop.clone();
        let running = tokio::spawn(async move { continuous.run(&signal).await });
        Audits { clock, stop, running }
    }

    async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(SOON, self.running).await.expect("it ends").unwrap();
    }
}

async fn finding(site: &Site) -> Option<Finding> {
    let found = site.ledger.run(findings::list).await.unwrap();
    found.into_iter().find(|finding| finding.joint == SOURCE)
}

/// Kinds and ids of the source's findings.
async fn items(site: &Site) -> Vec<(String, String)> {
    sqlx::query_as("select kind, id from audit_item where joint = $1 and not is_open order by 1, 2")
        .bind(SOURCE)
        .fetch_all(&site.ledger.pool)
        .await
        .unwrap()
}

/// Lets passes and consumers run beside the audit until its findings are these.
async fn until_found(site: &mut Site, expected: &[(&str, &str)]) {
    let until = tokio::time::Instant::now() + SOON;
    loop {
        site.collect().await;
        let found = items(site).await;
        let found: Vec<(&str, &str)> =
            found.iter().map(|(kind, id)| (kind.as_str(), id.as_str())).collect();
        if finding(site).await.is_some() && found == expected {
            return;
        }
        assert!(tokio::time::Instant::now() < until, "{found:?} instead of {expected:?}");
    }
}

/// A build completed that long ago.
async fn old_build(site: &Site, age: TimeDelta) -> Uuid {
    let completed_at = site.coderd.now().await - age;
    let workspace = site.coderd.workspace().await;
    site.coderd.build(&Build { completed_at, ..site.coderd.first_start(workspace).await }).await
}

fn event_id(build: Uuid) -> String {
    format!("workspace_build_completed:{build}")
}

/// Each kind of row that is an event: stages, the fallback for claims, jobs without a start, each
/// transition and status, each type of usage.
async fn each_kind(site: &Site) {
    let coderd = &site.coderd;
    for (stage, initiator) in
        [(2, coderd.owner), (2, PREBUILDS_USER), (0, PREBUILDS_USER), (0, coderd.owner)]
    {
        let workspace = coderd.workspace().await;
        let first = coderd.first_start(workspace).await;
        let pool = if stage == 2 { 1 } else { 0 };
        coderd.build(&Build { initiator: PREBUILDS_USER, stage: pool, ..first.clone() }).await;
        coderd.build(&Build { number: 2, stage, initiator, ..first.clone() }).await;
        for (number, transition) in [(3, "stop"), (4, "start"), (5, "delete")] {
            coderd.build(&Build { number, transition, ..first.clone() }).await;
        }
    }
    for (worker, canceled, error) in
        [(None, true, None), (Some(coderd.worker), false, Some("no capacity"))]
    {
        let first = coderd.first_start(coderd.workspace().await).await;
        coderd.build(&Build { worker, canceled, error, ..first }).await;
    }
    let hour = DateTime::from_timestamp(coderd.now().await.timestamp() / 3600 * 3600, 0).unwrap();
    for (id, event_type, data) in [
        ("Ä seat", "hb_ai_seats_v1", json!({"count": 0})),
        ("many", "dc_managed_agents_v1", json!({"count": 999_999_999_999_999_999_u64})),
        ("runtime", "hb_agent_runtime_v1", json!({"runtime_ms": 3_600_000})),
    ] {
        coderd.usage(id, event_type, data, hour).await;
    }
}

#[tokio::test]
async fn rows_of_equal_slices_are_not_read() {
    let mut site = Site::new().await;
    each_kind(&site).await;
    site.collect().await;
    let report = site.audit().await;
    assert_eq!((differences(&report), open(&report)), (vec![], vec![]));
    assert_eq!((number(&report, SOURCE, "slices"), number(&report, SOURCE, DIFFERED)), (3, 0));
    assert_eq!(number(&report, SOURCE, "source_builds"), 25);
    assert_eq!(number(&report, SOURCE, "source_usage"), 4);
    // Equal rows are confirmed, as rows that are read.
    let unconfirmed = "select (select count(*) from workspace_build where confirmed_at is null)
         + (select count(*) from prebuild_claim where confirmed_at is null) + (select count(*) from usage_event where confirmed_at is null)";
    let unconfirmed: i64 =
        sqlx::query_scalar(unconfirmed).fetch_one(&site.ledger.pool).await.unwrap();
    assert_eq!(unconfirmed, 0);
}

#[tokio::test]
async fn a_row_that_the_ledger_lost_is_found_and_fetched() {
    let mut site = Site::new().await;
    let build = old_build(&site, TimeDelta::days(100)).await;
    let at = site.coderd.now().await - TimeDelta::days(60);
    site.coderd.usage("old", "dc_managed_agents_v1", json!({"count": 1}), at).await;
    sweep(&mut site).await;
    let audits = Audits::start(&site, Duration::from_millis(100));
    until_found(&mut site, &[]).await;
    for statement in [
        "delete from workspace_build where build_id = $1::uuid",
        "delete from usage_event where id = 'old' and $1 <> ''",
        "delete from publication where event_id = 'old' and $1 <> ''",
    ] {
        sqlx::query(statement).bind(build.to_string()).execute(&site.ledger.pool).await.unwrap();
    }
    // the next turn, in days
    audits.clock.set(audits.clock.now() + TimeDelta::days(31));
    let back = "select (select count(*) from workspace_build where build_id = $1) + (select count(*) from usage_event where id = 'old')";
    let until = tokio::time::Instant::now() + SOON;
    while sqlx::query_scalar::<_, i64>(back).bind(build).fetch_one(&site.ledger.pool).await.unwrap()
        < 2
    {
        assert!(tokio::time::Instant::now() < until, "{:?}", items(&site).await);
        site.collect().await;
    }
    until_found(&mut site, &[]).await;
    audits.stop().await;
}

/// Requests a sweep and lets the collector do it.
async fn sweep(site: &mut Site) {
    sqlx::query("insert into sweep_request (source_id) select id from source")
        .execute(&site.ledger.pool)
        .await
        .unwrap();
    site.collect().await;
}

/// Deletes a build from the ledger while audits run and no pass comes. Returns once an audit has
/// found that it is missing.
async fn lose_without_passes(site: &Site, build: Uuid, audits: &Audits) {
    let lose = "delete from workspace_build where build_id = $1";
    sqlx::query(lose).bind(build).execute(&site.ledger.pool).await.unwrap();
    audits.clock.set(audits.clock.now() + TimeDelta::days(31));
    let found =
        "select count(*) > 0 from audit_progress where joint = $1 and progress->'in_flight' ? $2";
    eventually(SOON, "the build is missing", async || {
        sqlx::query_scalar(found)
            .bind(SOURCE)
            .bind(event_id(build))
            .fetch_one(&site.ledger.pool)
            .await
            .unwrap()
    })
    .await;
}

#[tokio::test]
async fn a_missing_row_is_judged_in_a_later_step_by_any_process() {
    let mut site = Site::new().await;
    let build = old_build(&site, TimeDelta::days(100)).await;
    sweep(&mut site).await;
    let audits = Audits::start(&site, Duration::from_millis(100));
    until_found(&mut site, &[]).await;
    lose_without_passes(&site, build, &audits).await;
    audits.stop().await;
    assert_eq!(items(&site).await, [], "it may be in flight");
    // the next audit is due in an hour, but the awaited pass comes
    let audits = Audits::start(&site, Duration::from_secs(3600));
    let id = event_id(build);
    until_found(&mut site, &[("missing", &id)]).await;
    audits.stop().await;
}

/// Whether the source's audit is late.
async fn is_late(site: &Site) -> bool {
    let late = site.ledger.run(late_audits::list).await.unwrap();
    late.into_iter().any(|late| late.joint == SOURCE)
}

#[tokio::test]
async fn without_passes_a_source_with_missing_rows_becomes_late_and_delays_no_other_joint() {
    let mut site = Site::new().await;
    let build = old_build(&site, TimeDelta::days(100)).await;
    sweep(&mut site).await;
    let audits = Audits::start_with(&site, Duration::from_millis(100), 10);
    until_found(&mut site, &[]).await;
    lose_without_passes(&site, build, &audits).await;
    eventually(SOON, "the source is late", async || is_late(&site).await).await;
    let audited = async || {
        let found = site.ledger.run(findings::list).await.unwrap();
        found.into_iter().find(|finding| finding.joint == LOG).unwrap().audited_at
    };
    let before = audited().await;
    eventually(SOON, "the log is audited", async || audited().await > before).await;
    assert!(is_late(&site).await && items(&site).await.is_empty());
    // the passes come
    let until = tokio::time::Instant::now() + SOON;
    while is_late(&site).await {
        assert!(tokio::time::Instant::now() < until, "it is still late");
        site.collect().await;
    }
    audits.stop().await;
}

#[tokio::test]
async fn a_row_that_coderd_never_had_is_found_in_the_next_turn() {
    let mut site = Site::new().await;
    old_build(&site, TimeDelta::days(100)).await;
    sweep(&mut site).await;
    let audits = Audits::start(&site, Duration::from_millis(100));
    until_found(&mut site, &[]).await;
    let forged = Uuid::new_v4();
    let forge = "insert into workspace_build select (jsonb_populate_record(build, jsonb_build_object('build_id', $1, 'confirmed_at', null))).*
         from workspace_build build order by completed_at limit 1";
    sqlx::query(forge).bind(forged).execute(&site.ledger.pool).await.unwrap();
    let usage = "insert into usage_event select (jsonb_populate_record(u, '{\"id\": \"forged\", \"confirmed_at\": null}')).* from usage_event u limit 1";
    sqlx::query(usage).execute(&site.ledger.pool).await.unwrap();
    audits.clock.set(audits.clock.now() + TimeDelta::days(31));
    let id = event_id(forged);
    until_found(&mut site, &[("not_in_source", "forged"), ("not_in_source", &id)]).await;
    // a finding ends when it is mended
    for statement in [
        "delete from workspace_build where build_id = $1",
        "delete from usage_event where id = 'forged' and $1 is not null",
    ] {
        sqlx::query(statement).bind(forged).execute(&site.ledger.pool).await.unwrap();
    }
    until_found(&mut site, &[]).await;
    audits.stop().await;
}

#[tokio::test]
async fn usage_that_coderd_changed_is_found_in_the_next_turn() {
    let mut site = Site::new().await;
    let audits = Audits::start(&site, Duration::from_millis(100));
    until_found(&mut site, &[]).await;
    let change = "update usage_events set event_data = '{\"count\": 7}' where $1::uuid is not null";
    site.tamper_source(change, site.creation).await;
    audits.clock.set(audits.clock.now() + TimeDelta::hours(25));
    until_found(&mut site, &[("differs", "usage-1")]).await;
    assert_eq!(finding(&site).await.unwrap().recent_usage_differs, 1);
    audits.stop().await;
}

#[tokio::test]
async fn another_process_goes_on_with_a_turn() {
    let mut site = Site::new().await;
    let audits = Audits::start(&site, Duration::from_millis(100));
    until_found(&mut site, &[]).await;
    let now = audits.clock.now();
    audits.stop().await;
    let begun = async || -> String {
        let query =
            "select progress -> 'older_builds' ->> 'begun_at' from audit_progress where joint = $1";
        sqlx::query_scalar(query).bind(SOURCE).fetch_one(&site.ledger.pool).await.unwrap()
    };
    let first = begun().await;
    let audited = finding(&site).await.unwrap().audited_at;
    let audits = Audits::start(&site, Duration::from_millis(100));
    eventually(SOON, "another audit", async || finding(&site).await.unwrap().audited_at > audited)
        .await;
    audits.stop().await;
    assert_eq!(begun().await, first);
    assert!(first.parse::<DateTime<Utc>>().unwrap() <= now);
}

#[tokio::test]
async fn slices_are_equal_after_a_purge_and_a_row_that_comes_back_is_not_gone() {
    let mut site = Site::new().await;
    let old = old_build(&site, TimeDelta::days(100)).await;
    sweep(&mut site).await;
    assert_eq!(differences(&site.audit().await), []);
    sqlx::raw_sql("create table kept_job as table provisioner_jobs; create table kept_build as table workspace_builds")
        .execute(&site.coderd.database.pool)
        .await
        .unwrap();
    for build in [old, site.claim] {
        let purge = "delete from provisioner_jobs where id = (select job_id from workspace_builds where id = $1)";
        site.tamper_source(purge, build).await;
    }
    for differed in [1, 0] {
        let report = site.audit().await;
        assert_eq!(differences(&report), []);
        assert_eq!(number(&report, SOURCE, "source_gone"), 3, "two builds and a claim");
        assert_eq!(remarks(&report).len(), 3);
        assert_eq!(number(&report, SOURCE, DIFFERED), differed);
    }
    for back in [
        "insert into provisioner_jobs (id, created_at, updated_at, started_at, completed_at, organization_id, initiator_id, provisioner,
             storage_method, type, input, worker_id, file_id)
         select id, created_at, updated_at, started_at, completed_at, organization_id, initiator_id, provisioner,
             storage_method, type, input, worker_id, file_id from kept_job where id = (select job_id from kept_build where id = $1)",
        "insert into workspace_builds select * from kept_build where id = $1",
    ] {
        site.tamper_source(back, old).await;
    }
    for differed in [1, 0] {
        let report = site.audit().await;
        assert_eq!(differences(&report), []);
        assert_eq!(number(&report, SOURCE, "source_gone"), 2);
        assert_eq!(number(&report, SOURCE, DIFFERED), differed);
    }
}

#[tokio::test]
async fn usage_is_compared_where_coderd_sorts_ids_in_another_way() {
    let mut site = Site::new().await;
    sqlx::raw_sql("alter table usage_events alter column id type text collate \"en-x-icu\"")
        .execute(&site.coderd.database.pool)
        .await
        .unwrap();
    let now = site.coderd.now().await;
    for id in ["a", "B", "c", "Ä", "ä", "Z", "_", "a-b", "ab", "A-C", "10", "9"] {
        site.coderd.usage(id, "dc_managed_agents_v1", json!({"count": 1}), now).await;
    }
    // the change can cost the collector its prepared statements, and one pass
    site.collector.pass().await.ok();
    site.collect().await;
    let report = site.audit().await;
    assert_eq!((differences(&report), number(&report, SOURCE, DIFFERED)), (vec![], 0));
    for id in ["B", "ä"] {
        sqlx::query("delete from usage_event where id = $1")
            .bind(id)
            .execute(&site.ledger.pool)
            .await
            .unwrap();
    }
    let report = site.audit().await;
    let missing: Vec<&str> = differences(&report)
        .into_iter()
        .filter(|(joint, kind, _)| (*joint, *kind) == (SOURCE, "missing"))
        .map(|(_, _, id)| id)
        .collect();
    assert_eq!(missing, ["B", "ä"]);
}

#[tokio::test]
async fn of_a_slice_with_many_builds_of_one_instant_only_these_are_read() {
    let mut site = Site::new().await;
    let first = old_build(&site, TimeDelta::days(100)).await;
    let later = old_build(&site, TimeDelta::days(90)).await;
    sweep(&mut site).await;
    // more than two slices, which the ledger does not have
    for copy in [
        "create table copied as select gen_random_uuid() as job_id, gen_random_uuid() as build_id, n from generate_series(1, 10001) n where $1 is not null",
        "insert into provisioner_jobs (id, created_at, updated_at, started_at, completed_at, organization_id, initiator_id, provisioner,
             storage_method, type, input, worker_id, file_id)
         select copied.job_id, created_at, updated_at, started_at, completed_at, organization_id, initiator_id, provisioner,
             storage_method, type, input, worker_id, file_id
         from copied, provisioner_jobs where id = (select job_id from workspace_builds where id = $1)",
        "insert into workspace_builds select (jsonb_populate_record(build, jsonb_build_object('id', copied.build_id, 'job_id', copied.job_id,
             'build_number', copied.n + 1))).* from copied, workspace_builds build where build.id = $1",
    ] {
        site.tamper_source(copy, first).await;
    }
    let report = site.audit().await;
    assert_eq!(differences(&report).len(), 10_001);
    assert!(differences(&report).iter().all(|(_, kind, _)| *kind == "missing"));
    // before the instant, the instant, the rest, and two of usage: only the instant's rows are read
    assert_eq!((number(&report, SOURCE, "slices"), number(&report, SOURCE, DIFFERED)), (5, 1));
    assert!(differences(&report).iter().all(|(_, _, id)| *id != event_id(later)));
}

//! Folds along a real ledger: equal at the same sequence in every process, from every start, after
//! every interruption.

use std::time::Duration;

use chrono::TimeDelta;
use sqlx::{Executor as _, PgPool};
use tallyline::event::{Payload, Topic};
use tallyline::ledger::{
    Baseline, BaselineRow, Chain, Ledger, LicenseChange, LicenseState, PartitionLease, Sequence,
    licenses, recoveries, snapshots, sources,
};
use tallyline::license::{LicenseClaims, RuleSet};
use tallyline::projection::{self, Folded, Projection, ProjectionError, ProjectionSettings, View};
use tallyline::stages::{LicensesState, MetricsState, Stage};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::support::ledger::{
    DEPLOYMENT, OTHER_DEPLOYMENT, arrival, build, caught_up_to, event, lease_partition, ledger,
    moved, noon, partition, record_batch, register, take_lease, usage,
};
use crate::support::snapshots::{Pieces, contain, load, pieces, save};
use crate::support::{eventually, setting};

pub const SOON: Duration = Duration::from_secs(30);
/// Neither a periodic snapshot nor a slow poll decides a test.
pub const SETTINGS: ProjectionSettings = ProjectionSettings {
    poll: Duration::from_millis(50),
    snapshot: Duration::from_secs(3600),
    last_snapshot: Duration::from_secs(30),
    progress: Duration::from_secs(3600),
};

/// A running projection, and how to end it.
pub struct Running<S> {
    pub view: View<S>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), ProjectionError>>,
}

impl<S: Stage> Running<S> {
    pub fn start(ledger: &Ledger, settings: ProjectionSettings) -> Self {
        let projection = Projection::<S>::new(ledger.clone(), settings);
        let (view, stop) = (projection.view(), CancellationToken::new());
        let signal = stop.clone();
        Running { view, stop, task: tokio::spawn(async move { projection.run(&signal).await }) }
    }

    pub async fn reaches(&self, sequence: i64) {
        eventually(SOON, "the fold reaches the sequence", || async {
            caught_up_to(&self.view) >= sequence
        })
        .await;
    }

    pub async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }

    pub fn pieces(&self) -> Pieces {
        self.view.with(|state, _| pieces(state)).unwrap()
    }
}

/// Writes `batches` batches of 20 events to two partitions of each topic, with six concurrent
/// writers.
pub async fn write(ledger: &Ledger, batches: std::ops::Range<u32>) {
    let mut writers = JoinSet::new();
    for (topic, number) in Topic::ALL.into_iter().flat_map(|topic| [(topic, 0), (topic, 1)]) {
        let (ledger, batches) = (ledger.clone(), batches.clone());
        writers.spawn(async move {
            let of = partition(topic, i32::try_from(number).unwrap());
            let mut claim = lease_partition(&ledger, of, 0).await.unwrap();
            for batch in batches {
                claim = write_20(&ledger, &claim, topic, number * 100_000 + batch * 20).await;
            }
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended.unwrap();
    }
}

async fn write_20(
    ledger: &Ledger,
    claim: &PartitionLease,
    topic: Topic,
    first: u32,
) -> PartitionLease {
    let from = claim.next_offset;
    let arrivals: Vec<_> = (from..)
        .zip(first..first + 20)
        .map(|(offset, n)| arrival(offset, event(topic, n)))
        .collect();
    register(ledger, &[DEPLOYMENT, OTHER_DEPLOYMENT]).await;
    record_batch(ledger, &Chain::Live(claim.clone()), &arrivals, from + 20).await.unwrap();
    moved(claim, from + 20)
}

/// One batch of one build.
pub async fn write_one(ledger: &Ledger, n: u32) {
    let claim = lease_partition(ledger, partition(Topic::WorkspaceBuilds, 9), 0).await.unwrap();
    let next = claim.next_offset + 1;
    register(ledger, &[DEPLOYMENT]).await;
    record_batch(
        ledger,
        &Chain::Live(claim.clone()),
        &[arrival(claim.next_offset, build(DEPLOYMENT, n))],
        next,
    )
    .await
    .unwrap();
}

pub async fn snapshots<S: Stage>(pool: &PgPool) -> Vec<i64> {
    sqlx::query_scalar("select sequence from snapshot where stage = $1 order by sequence")
        .bind(S::NAME)
        .fetch_all(pool)
        .await
        .unwrap()
}

async fn is_the_same_from_zero_and_from_snapshots<S: Stage>() {
    let (_database, ledger) = ledger().await;
    let steady = Running::<S>::start(&ledger, SETTINGS);
    let mut restarted = Running::<S>::start(&ledger, SETTINGS);
    for batches in [0..8, 8..16, 16..24] {
        // It restarts in the middle of the writing, and after it.
        let writing = tokio::spawn({
            let ledger = ledger.clone();
            async move { write(&ledger, batches).await }
        });
        let before = caught_up_to(&restarted.view);
        restarted.reaches(before + 10).await;
        restarted.end().await;
        let newest = *snapshots::<S>(&ledger.pool).await.last().unwrap();
        restarted = Running::<S>::start(&ledger, SETTINGS);
        eventually(SOON, "the fold begins", || async { restarted.view.freshness().is_some() })
            .await;
        assert!(
            newest >= before + 10 && caught_up_to(&restarted.view) >= newest,
            "it begins at the snapshot"
        );
        writing.await.unwrap();
    }
    let end = ledger.run(snapshots::head).await.unwrap().number;
    // Two introductions, and 24 batches on each of six partitions.
    assert_eq!(end, 2 + 24 * 6);
    steady.reaches(end).await;
    restarted.reaches(end).await;
    let from_zero: Folded<S> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    let from_zero = pieces(&from_zero.state);
    assert!(from_zero.values().flatten().count() > 1000, "there is something to compare");
    assert!(
        steady.pieces() == from_zero && restarted.pieces() == from_zero,
        "a fold depends on where it began"
    );
    steady.end().await;
    restarted.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_bit_for_bit_the_same_from_zero_and_from_snapshots_in_the_middle_of_writing() {
    is_the_same_from_zero_and_from_snapshots::<MetricsState>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn licenses_are_bit_for_bit_the_same_from_zero_and_from_snapshots_in_the_middle_of_writing() {
    is_the_same_from_zero_and_from_snapshots::<LicensesState>().await;
}

#[tokio::test]
async fn a_fold_gives_the_sums_of_the_events_for_each_deployment() {
    let (_database, ledger) = ledger().await;
    write(&ledger, 0..3).await;
    let numbers = || [0_u32, 100_000].into_iter().flat_map(|first| first..first + 60);
    let metrics: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    let licenses: Folded<LicensesState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    for (deployment, of_other) in [(DEPLOYMENT, false), (OTHER_DEPLOYMENT, true)] {
        let own = || numbers().filter(move |n| (n % 6 == 5) == of_other);
        let regular = own().filter(|n| n % 7 != 3 && n % 5 != 0).count() as u64;
        let counted: u64 = metrics
            .state
            .deployment(deployment)
            .unwrap()
            .creations
            .iter()
            .map(|(_, counter)| counter.value)
            .sum();
        assert_eq!(counted, regular);
        let agents: u64 = own().filter(|n| n % 4 != 3).map(|n| u64::from(n % 3) + 1).sum();
        let counted = licenses
            .state
            .deployment(deployment)
            .unwrap()
            .agents
            .count(noon(), noon() + TimeDelta::days(100));
        assert_eq!(counted, u128::from(agents));
    }
}

#[tokio::test]
async fn a_registered_source_starts_with_its_baseline_and_its_current_licenses() {
    let (_database, ledger) = ledger().await;
    let named = |preset: &str, creations| BaselineRow {
        organization_name: "organization-1".into(),
        template_name: "template-1".into(),
        preset_name: preset.into(),
        creations,
    };
    let baseline = Baseline {
        until: noon() - TimeDelta::days(30),
        creations: vec![named("", 700), named("preset-1", 1200)],
        started: Vec::new(),
    };
    let introduced_at = noon() - TimeDelta::days(1);
    let source = ledger
        .run(async |conn| {
            sources::register(conn, DEPLOYMENT, introduced_at, Some(&baseline), ledger.clock.now())
                .await
        })
        .await
        .unwrap();
    let verified = |license_id: i32| {
        LicenseState::Verified(serde_json::to_value(license(i64::from(license_id))).unwrap())
    };
    let change = |license_id: i32, state| LicenseChange {
        license_id,
        jwt_sha256: [license_id.to_le_bytes()[0]; 32],
        uploaded_at: None,
        state,
    };
    let came = [
        change(3, LicenseState::Refused("no such key".into())),
        change(2, verified(2)),
        change(1, verified(1)),
    ];
    let lease =
        take_lease(&ledger, "collector", "test", Duration::from_secs(60)).await.unwrap().unwrap();
    ledger
        .run(async |conn| {
            licenses::record(conn, &lease, source.id, &came, ledger.clock.now()).await
        })
        .await
        .unwrap();
    ledger
        .run(async |conn| {
            licenses::record(
                conn,
                &lease,
                source.id,
                &[change(2, LicenseState::Gone)],
                ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap();
    let claim = lease_partition(&ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let used: Vec<_> =
        (0..).zip([0, 1, 2, 4]).map(|(offset, n)| arrival(offset, usage(DEPLOYMENT, n))).collect();
    record_batch(&ledger, &Chain::Live(claim), &used, 4).await.unwrap();
    write_one(&ledger, 1).await;

    let metrics: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    let metrics = metrics.state.deployment(DEPLOYMENT).unwrap();
    let creations: Vec<_> = metrics
        .creations
        .iter()
        .map(|(labels, counter)| (labels[2].as_str(), counter.value))
        .collect();
    assert_eq!(
        (metrics.introduced_at, creations),
        (introduced_at, vec![("", 700), ("preset-1", 1201)])
    );
    let licenses: Folded<LicensesState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    let licenses = licenses.state.deployment(DEPLOYMENT).unwrap();
    assert_eq!(
        licenses.licenses.iter().map(|license| license.license_id).collect::<Vec<_>>(),
        [1, 3]
    );
    let answer = licenses.entitlements(RuleSet::Y2025M07, noon() + TimeDelta::days(1));
    // The license is valid from the instant of the second of the four, which count 1, 2, 3 and 2.
    assert_eq!(
        (answer.managed_agents().limit, answer.managed_agents().actual),
        (Some(20), Some(7))
    );
    assert_eq!(answer.errors, ["Invalid license (id 3): its token did not verify"]);
}

/// Limits 10 and 20, valid from the instant of usage event 1; issued that many seconds after noon.
fn license(seconds: i64) -> LicenseClaims {
    let Payload::Usage(first) = usage(DEPLOYMENT, 1).payload else { panic!("it is usage") };
    let year = first.created_at + TimeDelta::days(365);
    LicenseClaims {
        issued_at: noon() + TimeDelta::seconds(seconds),
        not_before: first.created_at,
        license_expires: year,
        expires_at: year,
        token_id: None,
        account_type: "salesforce".into(),
        account_id: "account-1".into(),
        deployment_ids: Vec::new(),
        trial: false,
        feature_set: String::new(),
        all_features: false,
        features: [
            ("managed_agent_limit_soft".into(), 10),
            ("managed_agent_limit_hard".into(), 20),
        ]
        .into(),
        addons: Vec::new(),
        require_telemetry: false,
        publish_usage_data: true,
    }
}

#[tokio::test]
async fn a_fold_to_an_earlier_sequence_gives_the_state_of_that_time() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    write_one(&ledger, 2).await;
    let then: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    write_one(&ledger, 4).await;
    let again: Folded<MetricsState> =
        projection::fold_to(&ledger, then.sequence.number).await.unwrap();
    assert_eq!(then, again);
    let now: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    assert_eq!(now.sequence.number, then.sequence.number + 1);
    assert!(now.state != then.state);
}

#[tokio::test]
async fn a_fold_reports_when_it_last_reached_the_ledgers_end() {
    let (_database, ledger) = ledger().await;
    let running = Running::<LicensesState>::start(&ledger, SETTINGS);
    let as_of = || running.view.freshness().and_then(|freshness| freshness.as_of);
    eventually(SOON, "the end is reached", || async { as_of() == Some(noon()) }).await;
    ledger.clock.set(noon() + TimeDelta::seconds(5));
    eventually(SOON, "the end is reached again", || async {
        as_of() == Some(noon() + TimeDelta::seconds(5))
    })
    .await;
    ledger.clock.set(noon());
    write_one(&ledger, 1).await;
    running.reaches(2).await;
    assert_eq!(
        as_of(),
        Some(noon() + TimeDelta::seconds(5)),
        "a clock that steps back does not change it"
    );
    running.end().await;
}

#[tokio::test]
async fn the_last_state_remains_during_a_database_outage_and_the_fold_resumes() {
    let (database, ledger) = ledger().await;
    let running = Running::<MetricsState>::start(&ledger, SETTINGS);
    write_one(&ledger, 1).await;
    running.reaches(2).await;
    let (before, bytes) = (running.view.freshness().unwrap(), running.pieces());

    let server = PgPool::connect(&setting("TALLYLINE_TEST_POSTGRES")).await.unwrap();
    let allow = |allowed: bool| {
        sqlx::AssertSqlSafe(format!("alter database {} allow_connections {allowed}", database.name))
    };
    sqlx::query(allow(false)).execute(&server).await.unwrap();
    let ended = "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1";
    sqlx::query(ended).bind(&database.name).execute(&server).await.unwrap();
    ledger.clock.set(noon() + TimeDelta::seconds(5));
    // It asks every second while the database is away; a few refused attempts are enough.
    eventually(SOON, "its questions are refused", || async {
        ledger.run(snapshots::head).await.is_err()
    })
    .await;
    assert_eq!((running.view.freshness().unwrap(), running.pieces()), (before, bytes));

    sqlx::query(allow(true)).execute(&server).await.unwrap();
    write_one(&ledger, 2).await;
    running.reaches(3).await;
    eventually(SOON, "the end is reached", || async {
        running.view.freshness().and_then(|freshness| freshness.as_of)
            == Some(noon() + TimeDelta::seconds(5))
    })
    .await;
    running.end().await;
}

#[tokio::test]
async fn another_incarnation_restarts_the_fold_without_earlier_snapshots() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    let running = Running::<MetricsState>::start(&ledger, SETTINGS);
    running.reaches(2).await;
    let old = ledger.run(snapshots::head).await.unwrap().incarnation;
    let (at, old_pieces) = (Sequence { incarnation: old, number: 2 }, running.pieces());
    assert!(save::<MetricsState>(&ledger, at, &old_pieces).await);
    assert_eq!(snapshots::<MetricsState>(&ledger.pool).await, [2]);

    // A restored ledger: it has another build under the same sequence.
    ledger
        .pool
        .execute(
            "update workspace_build set template_name = 'restored';
             insert into past_incarnation select incarnation from ledger;
             update ledger set incarnation = gen_random_uuid()",
        )
        .await
        .unwrap();
    let new = ledger.run(snapshots::head).await.unwrap().incarnation;
    eventually(SOON, "the fold restarts", || async {
        running
            .view
            .freshness()
            .is_some_and(|freshness| freshness.sequence == Sequence { incarnation: new, number: 2 })
    })
    .await;
    assert!(contain(&running.pieces(), "restored"));
    assert!(!save::<MetricsState>(&ledger, at, &old_pieces).await, "a state of the old ledger");
    running.end().await;
    assert_eq!(snapshots::<MetricsState>(&ledger.pool).await, [2], "the old ones are deleted");
    let (newest, _) = load::<MetricsState>(&ledger).await.unwrap();
    assert_eq!(newest, Sequence { incarnation: new, number: 2 });
    let of_old = "select count(*) from snapshot_piece where incarnation <> $1";
    let of_old: i64 = sqlx::query_scalar(of_old).bind(new).fetch_one(&ledger.pool).await.unwrap();
    assert_eq!(of_old, 0);
}

#[tokio::test]
async fn a_restored_ledger_is_another_incarnation_and_restarts_the_fold() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    let running = Running::<MetricsState>::start(&ledger, SETTINGS);
    running.reaches(2).await;
    let old = ledger.run(snapshots::head).await.unwrap().incarnation;
    let back = "delete from workspace_build; delete from batch where sequence = 2; update ledger set next_sequence = 2";
    ledger.pool.execute(back).await.unwrap();
    // the act that records it is now its second batch
    eventually(SOON, "the fold restarts", || async {
        running.view.freshness().is_some_and(|freshness| {
            freshness.sequence.incarnation != old && freshness.sequence.number == 2
        })
    })
    .await;
    assert!(!contain(&running.pieces(), "template-1"), "no trace of the lost batch remains");
    let recovering = ledger.run(recoveries::open).await.unwrap().expect("a recovery is open");
    assert!(!recovering.log_ends_known);
    let acts: Vec<(String, String)> = sqlx::query_as("select actor, subject from operator_act")
        .fetch_all(&ledger.pool)
        .await
        .unwrap();
    assert_eq!(acts, [(format!("tallyline {}", env!("CARGO_PKG_VERSION")), "ledger".to_owned())]);
    running.end().await;
}

#[tokio::test]
async fn a_restored_ledger_that_grew_again_is_detected_by_its_batches() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    let running = Running::<MetricsState>::start(&ledger, SETTINGS);
    running.reaches(2).await;
    let old = ledger.run(snapshots::head).await.unwrap().incarnation;
    // in one transaction, so that no reader sees it lower than before
    let regrown = "begin; set constraints all immediate;
        delete from workspace_build; delete from batch where sequence = 2; update ledger set next_sequence = 2;
        insert into batch (kind, recorded_at) values ('licenses', now()), ('licenses', now()), ('licenses', now()); commit";
    sqlx::raw_sql(regrown).execute(&ledger.pool).await.unwrap();
    eventually(SOON, "the fold restarts", || async {
        running.view.freshness().is_some_and(|freshness| {
            freshness.sequence.incarnation != old && freshness.sequence.number == 5
        })
    })
    .await;
    running.end().await;
}

#[tokio::test]
async fn a_hole_ends_the_fold_and_nothing_is_shown() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    write_one(&ledger, 2).await;
    ledger.pool.execute("delete from batch where sequence = 2").await.unwrap();
    let running = Running::<MetricsState>::start(&ledger, SETTINGS);
    let ended = tokio::time::timeout(SOON, running.task).await.unwrap().unwrap();
    assert!(matches!(ended, Err(ProjectionError::Hole { after: 1, found: Some(3) })), "{ended:?}");
    assert_eq!(running.view.freshness(), None);
}

#[tokio::test]
async fn the_series_of_a_source_are_shown_unless_they_are_withheld() {
    let (_database, ledger) = ledger().await;
    let running = Running::<MetricsState>::start(&ledger, SETTINGS);
    write_one(&ledger, 1).await;
    running.reaches(2).await;
    let shown =
        |deployment, withheld| projection::families(&running.view, deployment, withheld).unwrap();
    let with_series = shown(DEPLOYMENT, false);
    assert_eq!(with_series.freshness.sequence.number, 2);
    assert_eq!(with_series.families[0].name(), "coderd_workspace_creation_total");
    assert!(
        shown(DEPLOYMENT, true).families.is_empty()
            && shown(OTHER_DEPLOYMENT, false).families.is_empty()
    );
    running.end().await;
}

#[tokio::test]
async fn a_batch_that_this_version_cannot_read_ends_the_fold() {
    let (_database, ledger) = ledger().await;
    write_one(&ledger, 1).await;
    let insert = "with b as (insert into batch (kind, recorded_at) values ('licenses', now()) returning id)
        insert into license (batch_id, source_id, license_id, jwt_sha256, present, claims)
        select b.id, s.id, 1, decode(repeat('00', 32), 'hex'), true, '{\"a claim of later days\": 1}' from b, source s";
    ledger.pool.execute(insert).await.unwrap();
    let running = Running::<LicensesState>::start(&ledger, SETTINGS);
    let ended = tokio::time::timeout(SOON, running.task).await.unwrap().unwrap();
    assert!(matches!(ended, Err(ProjectionError::LedgerFault { sequence: 3, .. })), "{ended:?}");
}

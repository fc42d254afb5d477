//! The sources for which the recovery of a restored ledger waits, and how an operator excludes one
//! that no longer exists.

use std::time::Duration;

use chrono::TimeDelta;
use tallyline::clock::Clock;
use tallyline::ledger::{
    ActKind, Ledger, NewAct, NewPass, Source, Subject, leases, passes, recoveries, restored,
    retirements, sources,
};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::recover::{
    LedgerEffect, Lost, RecoverEffect, RecoverExecution, RecoverPlan, RecoverRequest,
};
use tallyline::operations::{Actor, ListActs, OperationError, Operations};
use uuid::Uuid;

use crate::support::Database;
use crate::support::ledger::{act, ask, ledger, noon, operations, take_lease};

// Read until the end; 34 days before; 36 days before; never.
const LIVE: Uuid = Uuid::from_u128(1);
const QUIET: Uuid = Uuid::from_u128(2);
const RETIRED: Uuid = Uuid::from_u128(3);
const NEVER: Uuid = Uuid::from_u128(4);
/// No collector reads it.
const GONE: Uuid = Uuid::from_u128(5);

struct Site {
    operations: Operations,
    _database: Database,
}

impl Site {
    /// A ledger with all five, a hundred days after its newest pass: the backup is old.
    async fn restored() -> Site {
        let (database, ledger) = ledger().await;
        let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
        log.create_topics(1).await.unwrap();
        for (deployment, days) in
            [(LIVE, Some(0)), (QUIET, Some(34)), (RETIRED, Some(36)), (NEVER, None), (GONE, None)]
        {
            let source = ledger
                .run(async |conn| {
                    sources::register(conn, deployment, noon(), None, ledger.clock.now()).await
                })
                .await
                .unwrap();
            if let Some(days) = days {
                pass(&ledger, &source, TimeDelta::days(days)).await;
            }
        }
        let act = NewAct {
            actor: "sre-1",
            act: ActKind::Retire,
            subject: Subject::Named("5"),
            reason: "a test",
            detail: serde_json::json!({}),
        };
        assert!(
            ledger
                .run(async |conn| retirements::retire(conn, GONE, &act, ledger.clock.now()).await)
                .await
                .unwrap()
        );
        ledger.clock.set(noon() + TimeDelta::days(100));
        let operations = operations(&ledger, &log);
        Site { operations, _database: database }
    }

    async fn try_plan(
        &self,
        without: &[Uuid],
    ) -> Result<(RecoverPlan, LedgerEffect), OperationError> {
        let request = RecoverRequest { lost: Lost::Ledger, without: without.to_vec() };
        let plan = ask(&self.operations, &request).await?;
        let RecoverEffect::Ledger(effect) = plan.effect.clone() else { panic!("{plan:?}") };
        Ok((plan, *effect))
    }

    async fn plan(&self, without: &[Uuid]) -> (RecoverPlan, LedgerEffect) {
        self.try_plan(without).await.unwrap()
    }

    async fn execute(
        &self,
        plan: &RecoverPlan,
        reason: &str,
    ) -> Result<RecoverPlan, OperationError> {
        let actor = Actor { name: "sre-1".into(), reason: reason.into() };
        let execution = RecoverExecution { hash: plan.hash.clone().expect("a hash") };
        act(&self.operations, &execution, &actor).await
    }
}

/// A full pass that began `before` noon, and which the ledger has.
async fn pass(ledger: &Ledger, source: &Source, before: TimeDelta) {
    let lease = take_lease(ledger, &name(source.deployment_id), "test", Duration::from_secs(30))
        .await
        .unwrap()
        .expect("the test's own");
    let pass = NewPass {
        source_id: source.id,
        started_at: noon() - before,
        full_sweep: true,
        ..NewPass::default()
    };
    ledger.run(async |conn| passes::record(conn, &lease, &pass).await).await.unwrap();
    ledger.run(async |conn| leases::release(conn, lease).await).await.unwrap();
}

fn name(deployment: Uuid) -> String {
    format!("collector:{deployment}")
}

fn not_waited_for(effect: &LedgerEffect) -> Vec<(Uuid, bool)> {
    effect.not_waited_for.iter().map(|source| (source.deployment_id, source.by_this_plan)).collect()
}

fn refused(planned: Result<(RecoverPlan, LedgerEffect), OperationError>) -> String {
    match planned {
        Err(OperationError::Forbidden(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_recovery_waits_for_sources_read_in_the_last_35_days_of_the_ledger() {
    let site = Site::restored().await;
    let (plan, effect) = site.plan(&[]).await;
    assert_eq!(effect.sources_to_read, [LIVE, QUIET, NEVER]);
    assert_eq!(not_waited_for(&effect), [(RETIRED, false)]);
    assert_eq!(effect.not_waited_for[0].last_read_at, Some(noon() - TimeDelta::days(36)));
    site.execute(&plan, "").await.unwrap();
    let recovering =
        site.operations.ledger.run(recoveries::open).await.unwrap().expect("it is open");
    assert_eq!(recovering.sources_to_read, [LIVE, QUIET, NEVER]);
    assert_eq!(
        (recovering.sources_to_compare, recovering.without),
        (recovering.sources_to_read, vec![])
    );
}

#[tokio::test]
async fn a_pass_of_a_fast_clock_does_not_exclude_another_source() {
    let (_database, ledger) = ledger().await;
    let now = Clock::system().now();
    for (deployment, at) in [(LIVE, now), (QUIET, now + TimeDelta::days(40))] {
        let source = ledger
            .run(async |conn| {
                sources::register(conn, deployment, noon(), None, ledger.clock.now()).await
            })
            .await
            .unwrap();
        pass(&ledger, &source, noon() - at).await;
    }
    let (waited_for, others) = ledger.run(restored::sources_to_recover).await.unwrap();
    assert_eq!((waited_for.len(), others), (2, vec![]));
}

#[tokio::test]
async fn a_removed_source_is_excluded_and_the_recovery_ends() {
    let site = Site::restored().await;
    let ledger = &site.operations.ledger;
    let (plan, _) = site.plan(&[]).await;
    site.execute(&plan, "the disk died").await.unwrap();
    let id = ledger.run(recoveries::open).await.unwrap().expect("it is open").id;
    ledger
        .run(async |conn| recoveries::set_targets(conn, id, &[], ledger.clock.now()).await)
        .await
        .unwrap();
    let live = ledger.run(async |conn| sources::get(conn, LIVE).await).await.unwrap().unwrap();
    pass(ledger, &live, TimeDelta::zero()).await;
    ledger
        .run(async |conn| recoveries::record_compared(conn, id, live.id, ledger.clock.now()).await)
        .await
        .unwrap();
    assert!(
        !ledger
            .run(async |conn| recoveries::close(conn, id, ledger.clock.now()).await)
            .await
            .unwrap(),
        "two others are still to be read"
    );

    let (plan, effect) = site.plan(&[QUIET, NEVER]).await;
    assert_eq!(
        (effect.sources_to_read.as_slice(), not_waited_for(&effect)),
        (&[][..], vec![(QUIET, true), (NEVER, true)])
    );
    let unreasoned = site.execute(&plan, " ").await;
    assert!(
        matches!(unreasoned, Err(OperationError::Invalid { field: "reason", .. })),
        "{unreasoned:?}"
    );
    assert!(
        !ledger
            .run(async |conn| recoveries::close(conn, id, ledger.clock.now()).await)
            .await
            .unwrap()
    );
    site.execute(&plan, "switched off in July").await.unwrap();
    let recovering = ledger.run(recoveries::open).await.unwrap().expect("it is open");
    assert_eq!(
        (recovering.sources_to_read.as_slice(), recovering.without.as_slice()),
        (&[][..], &[QUIET, NEVER][..])
    );
    assert!(
        recovering.to_string().contains(&format!("2 abandoned sources ({QUIET}, {NEVER})")),
        "{recovering}"
    );
    let again = site.execute(&plan, "again").await;
    assert!(
        matches!(&again, Err(OperationError::Forbidden(why)) if why.contains("executed before")),
        "{again:?}"
    );
    assert!(
        ledger
            .run(async |conn| recoveries::close(conn, id, ledger.clock.now()).await)
            .await
            .unwrap(),
        "nothing is waited for any more"
    );

    let acts =
        ask(&site.operations, &ListActs { act: Some(ActKind::Recover), ..ListActs::default() })
            .await
            .unwrap()
            .acts;
    let reasons: Vec<&str> = acts.iter().map(|act| act.reason.as_str()).collect();
    assert_eq!(reasons, ["switched off in July", "the disk died"]);
    let given_up = acts[0].detail["not_waited_for"].as_array().unwrap();
    assert_eq!(
        given_up.iter().map(|source| &source["deployment_id"]).collect::<Vec<_>>(),
        [&QUIET.to_string(), &NEVER.to_string()]
    );
}

#[tokio::test]
async fn a_source_can_be_excluded_when_the_recovery_opens() {
    let site = Site::restored().await;
    let (plan, effect) = site.plan(&[NEVER]).await;
    assert_ne!(plan.hash, site.plan(&[]).await.0.hash);
    assert_eq!(effect.sources_to_read, [LIVE, QUIET]);
    assert_eq!(not_waited_for(&effect), [(NEVER, true), (RETIRED, false)]);
    site.execute(&plan, "it never began").await.unwrap();
    let recovering =
        site.operations.ledger.run(recoveries::open).await.unwrap().expect("it is open");
    assert_eq!(
        (recovering.sources_to_read.as_slice(), recovering.without.as_slice()),
        (&[LIVE, QUIET][..], &[NEVER][..])
    );
    // then the plan has nothing to execute, and reports it
    let (nothing, effect) = site.plan(&[]).await;
    assert_eq!((nothing.hash.as_ref(), not_waited_for(&effect)), (None, vec![(NEVER, false)]));
    assert!(nothing.effect.nothing().unwrap().contains("it closes by itself"), "{nothing:?}");
}

#[tokio::test]
async fn a_source_that_is_read_or_not_awaited_cannot_be_excluded() {
    let site = Site::restored().await;
    let unknown = site.try_plan(&[Uuid::from_u128(9)]).await;
    assert!(matches!(unknown, Err(OperationError::NotFound(_))), "{unknown:?}");
    for other in [RETIRED, GONE] {
        assert!(refused(site.try_plan(&[other]).await).contains("does not wait for"));
    }
    let lease = take_lease(&site.operations.ledger, &name(LIVE), "host-1", Duration::from_secs(30))
        .await
        .unwrap()
        .unwrap();
    assert!(refused(site.try_plan(&[LIVE]).await).contains("the collector host-1 reads it"));
    site.operations.ledger.run(async |conn| leases::release(conn, lease).await).await.unwrap();
    let (stale, _) = site.plan(&[LIVE]).await;
    let request = RecoverRequest { lost: Lost::Log, without: vec![LIVE] };
    let elsewhere = ask(&site.operations, &request).await;
    assert!(
        matches!(elsewhere, Err(OperationError::Invalid { field: "without", .. })),
        "{elsewhere:?}"
    );
    // a plan from before the opening of the recovery is stale afterwards
    let (plan, _) = site.plan(&[]).await;
    site.execute(&plan, "").await.unwrap();
    let executed = site.execute(&stale, "too late").await;
    assert!(
        matches!(&executed, Err(OperationError::Forbidden(why)) if why.contains("plan again")),
        "{executed:?}"
    );
    assert!(
        site.operations.ledger.run(recoveries::open).await.unwrap().unwrap().without.is_empty()
    );
}

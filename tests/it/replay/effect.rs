//! The numbers of a plan, and the effect of its execution.

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::event::{
    BuildStatus, Event, InputStage, PREBUILDS_USER, Payload, PrebuildClaimed, PublishMarks, Topic,
    TopicPartition, Usage, UsageQuantity, WorkspaceBuildCompleted,
};
use tallyline::ledger::sources;
use tallyline::operations::{
    FamilyEffect, OperationError, Queued, ReplayExecution, Step, WindowEffect,
};
use tallyline::stages::{LicensesState, MetricsState};
use tokio_util::sync::CancellationToken;

use crate::support::ledger::{DEPLOYMENT, OTHER_DEPLOYMENT, build, claim, noon, usage};
use crate::support::tables::tables;

use super::{Site, actor, license, sum};

fn at(seconds: i64) -> DateTime<Utc> {
    noon() + TimeDelta::seconds(seconds)
}

/// A regular creation of this duration, an hour after the introduction.
fn creation(n: u32, seconds: i64) -> WorkspaceBuildCompleted {
    let Payload::Build(build) = build(DEPLOYMENT, n).payload else { panic!("it is a build") };
    let (completed_at, initiator_id) = (at(3600), uuid::Uuid::from_u128(100));
    WorkspaceBuildCompleted {
        owner_id: initiator_id,
        initiator_id,
        status: BuildStatus::Succeeded,
        stage: None,
        first_build_by_prebuilds_user: false,
        first_build_stage: None,
        first_successful_start: true,
        created_at: completed_at - TimeDelta::hours(1),
        started_at: Some(completed_at - TimeDelta::seconds(seconds)),
        completed_at,
        ..*build
    }
}

fn of(payload: Payload) -> Event {
    Event { deployment: DEPLOYMENT, payload }
}

fn agents(id: &str, count: u64, created_at: DateTime<Utc>) -> Event {
    let quantity = UsageQuantity::ManagedAgents(count);
    of(Payload::Usage(Usage {
        id: id.into(),
        quantity,
        created_at,
        marks: PublishMarks::default(),
    }))
}

/// Appends records that the ledger lacks: four creations (one before the introduction, one of the
/// pool), a claim and usage.
async fn append_missing_events(site: &Site) {
    let early = WorkspaceBuildCompleted {
        completed_at: at(-3600),
        started_at: Some(at(-3660)),
        created_at: at(-7200),
        ..creation(3, 60)
    };
    let pool = WorkspaceBuildCompleted {
        owner_id: PREBUILDS_USER,
        initiator_id: PREBUILDS_USER,
        stage: Some(InputStage::Create),
        first_build_by_prebuilds_user: true,
        first_build_stage: None,
        ..creation(4, 30)
    };
    let builds = [creation(1, 42), creation(2, 100), early, pool]
        .map(|build| of(Payload::Build(Box::new(build))));
    site.append(Topic::WorkspaceBuilds, &builds).await;
    let Payload::Claim(one) = claim(DEPLOYMENT, 9).payload else { panic!("it is a claim") };
    let claimed = PrebuildClaimed {
        status: BuildStatus::Succeeded,
        created_at: at(3500),
        started_at: Some(at(3593)),
        completed_at: at(3600),
        ..*one
    };
    site.append(Topic::PrebuildClaims, &[of(Payload::Claim(Box::new(claimed)))]).await;
    let seats = Usage {
        id: "seats".into(),
        quantity: UsageQuantity::AiSeats(5),
        created_at: at(0),
        marks: PublishMarks::default(),
    };
    let usage = [
        agents("in-1", 1, at(0)),
        agents("in-2", 2, at(1)),
        agents("before", 4, at(-3601)),
        of(Payload::Usage(seats)),
    ];
    site.append(Topic::AgentUsage, &usage).await;
}

fn expected_metrics() -> Vec<FamilyEffect> {
    let family = |family: &str, added, added_seconds| FamilyEffect {
        deployment: DEPLOYMENT,
        family: family.into(),
        added,
        added_seconds,
    };
    vec![
        // 42 + 100 regular, 30 of the pool; the creation before the introduction is counted and not
        // observed
        family("coderd_prebuilt_workspace_claim_duration_seconds", 1, Some(7.0)),
        family("coderd_workspace_creation_duration_seconds", 3, Some(172.0)),
        family("coderd_workspace_creation_total", 3, None),
    ]
}

#[tokio::test]
async fn a_plan_shows_its_later_effect_in_numbers() {
    let site = Site::new().await;
    license(&site.operations.ledger).await;
    append_missing_events(&site).await;
    site.begin_at_the_ends().await;
    site.append(Topic::AgentUsage, &[agents("live", 16, at(5))]).await;
    site.consume().await;

    let plan = site.plan(&[]).await;
    assert_eq!(
        (
            sum(&plan, |one| one.records),
            sum(&plan, |one| one.new_events),
            sum(&plan, |one| one.duplicates)
        ),
        (10, 9, 1)
    );
    let (start, end) = (noon() - TimeDelta::hours(1), noon() + TimeDelta::days(365));
    let window =
        WindowEffect { deployment: DEPLOYMENT, license_id: 7, start, end, before: 16, after: 19 };
    assert_eq!(
        (plan.effect.introduced.as_slice(), plan.effect.licenses.as_slice()),
        (&[][..], &[window][..])
    );
    let queued = |event_type: &str, events, units: &str| Queued {
        deployment: DEPLOYMENT,
        event_type: event_type.into(),
        events,
        units: units.into(),
    };
    assert_eq!(
        plan.effect.publications,
        [queued("dc_managed_agents_v1", 3, "7"), queued("hb_ai_seats_v1", 1, "5")]
    );
    assert_eq!(plan.effect.metrics, expected_metrics());
    assert!(!plan.effect.is_empty());

    // live events outside the plan do not change its effect
    site.append(Topic::AgentUsage, &[agents("live-2", 32, at(6))]).await;
    site.consume().await;
    let executed = site.execute(&plan).await.unwrap();
    assert_eq!((executed.records, executed.accepted, executed.duplicates), (10, 9, 1));
    let licenses = site.state::<LicensesState>().await;
    assert_eq!(licenses.deployment(DEPLOYMENT).unwrap().agents.count(start, end), 16 + 32 + 3);
    let metrics = site.state::<MetricsState>().await;
    let metrics = metrics.deployment(DEPLOYMENT).unwrap();
    let creations: u64 = metrics.creations.iter().map(|(_, counter)| counter.value).sum();
    let seconds: f64 = metrics.creation_seconds.iter().map(|(_, tally)| tally.sum_seconds()).sum();
    let claims: f64 = metrics.claim_seconds.iter().map(|(_, tally)| tally.sum_seconds()).sum();
    assert_eq!((creations, seconds, claims), (3, 172.0, 7.0));
    let pending: Vec<(String, i64, String)> = sqlx::query_as(
        "select usage_event.event_type, count(*), sum(quantity)::text from publication
         join usage_event on usage_event.source_id = publication.source_id and id = event_id group by 1 order by 1",
    )
    .fetch_all(&site.operations.ledger.pool)
    .await
    .unwrap();
    assert_eq!(
        pending,
        [("dc_managed_agents_v1".into(), 5, "55".into()), ("hb_ai_seats_v1".into(), 1, "5".into())]
    );
}

#[tokio::test]
async fn a_replay_whose_effect_has_changed_is_refused_and_writes_nothing() {
    let site = Site::new().await;
    license(&site.operations.ledger).await;
    append_missing_events(&site).await;
    site.begin_at_the_ends().await;
    let plan = site.plan(&[]).await;
    let refused = async |what: &str| {
        let before = tables(&site.operations.ledger.pool).await;
        let executed = site.execute(&plan).await;
        assert!(matches!(executed, Err(OperationError::Forbidden(_))), "{what}: {executed:?}");
        assert!(
            tables(&site.operations.ledger.pool).await == before,
            "{what}: something was written"
        );
    };
    let usage = TopicPartition { topic: Topic::AgentUsage, partition: 0 };
    let pool = &site.operations.ledger.pool;
    let generation =
        "update position set generation = generation + $1 where topic = $2 and partition = 0";
    sqlx::query(generation).bind(1).bind(usage.topic.name()).execute(pool).await.unwrap();
    refused("the partition has another generation").await;
    sqlx::query(generation).bind(-1).bind(usage.topic.name()).execute(pool).await.unwrap();

    // one of its new events comes in live
    site.append(Topic::AgentUsage, &[agents("in-2", 2, at(1))]).await;
    site.consume().await;
    refused("an event of it came in live").await;

    // a new plan has the current effect; a new license changes it, too
    let again = site.plan(&[]).await;
    assert_eq!(sum(&again, |one| one.new_events), 8);
    let missing = OperationError::NotFound(String::new());
    let request = ReplayExecution { hash: "00ff".into(), records_per_second: None };
    let executed = site
        .operations
        .execute_replay(&request, &actor(), &|_: Step| {}, &CancellationToken::new())
        .await;
    assert_eq!(std::mem::discriminant(&executed.unwrap_err()), std::mem::discriminant(&missing));
    site.execute(&again).await.unwrap();
    assert!(site.plan(&[]).await.effect.is_empty());
}

#[tokio::test]
async fn an_event_of_an_unregistered_deployment_is_held_and_the_plan_shows_it() {
    let site = Site::new().await;
    site.append(Topic::AgentUsage, &[usage(OTHER_DEPLOYMENT, 1)]).await;
    let plan = site.plan(&[]).await;
    assert_eq!(
        (
            sum(&plan, |one| one.new_events),
            sum(&plan, |one| one.held),
            sum(&plan, |one| one.new_refused)
        ),
        (0, 1, 1)
    );
    let executed = site.execute(&plan).await.unwrap();
    assert_eq!(
        (executed.accepted, site.operations.ledger.run(sources::list).await.unwrap().len()),
        (0, 1)
    );
}

#[tokio::test]
async fn a_record_that_postgresql_itself_refuses_is_rejected_by_a_replay_too() {
    let site = Site::new().await;
    license(&site.operations.ledger).await;
    site.append(
        Topic::AgentUsage,
        &[agents("one", 1, at(0)), agents("unlucky", 1, at(1)), agents("two", 2, at(2))],
    )
    .await;
    site.begin_at_the_ends().await;
    let refuses = "alter table usage_event add constraint unlucky check (id <> 'unlucky')";
    sqlx::query(refuses).execute(&site.operations.ledger.pool).await.unwrap();
    let first = site.plan(&[]).await;
    assert_eq!(sum(&first, |one| one.new_events), 3, "only PostgreSQL knows");
    let executed = site.execute(&first).await.unwrap();
    assert_eq!((executed.accepted, executed.rejects), (2, 1));
    let again = site.plan(&[]).await;
    assert_eq!(
        (
            sum(&again, |one| one.new_events),
            sum(&again, |one| one.rejects),
            sum(&again, |one| one.new_refused)
        ),
        (0, 1, 0)
    );
    assert!(again.effect.is_empty());
}

//! A ledger in its own database, and events to record in it.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgConnection;
use tallyline::clock::Clock;
use tallyline::event::{
    BuildStatus, Event, InputStage, PREBUILDS_USER, Payload, PrebuildClaimed, PublishMarks,
    RejectCause, Topic, TopicPartition, Transition, Usage, UsageQuantity, WorkspaceBuildCompleted,
};
use tallyline::ledger::{
    ActKind, Arrival, AuditStep, AuditedJoint, Chain, Completeness, Counts, Disposition,
    LICENSE_RULES, LOG_JOINT, Landmark, Lease, Ledger, LedgerSettings, NewAct, PartitionLease,
    RecordError, Refusal, Retention, SOURCE_JOINT, SourceIdentity, Subject, VENDOR_JOINT,
    audit_items, choices, identity, landmarks, leases, passes, positions, record, rejects,
    retirements, snapshots, sources,
};
use tallyline::license::{PublicKeys, RuleSet};
use tallyline::log::Log;
use tallyline::operations::{Actor, Operation, OperationError, Operations};
use tallyline::projection::View;
use tallyline::stages::Stage;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Database;

/// The group of all consumers.
pub const GROUP: &str = "tallyline";

pub const DEPLOYMENT: Uuid = Uuid::from_u128(0xd1);
pub const OTHER_DEPLOYMENT: Uuid = Uuid::from_u128(0xd2);

pub fn noon() -> DateTime<Utc> {
    "2025-08-01T12:00:00Z".parse().expect("a time")
}

/// An empty ledger whose clock is at [`noon`].
pub async fn ledger() -> (Database, Ledger) {
    ledger_at(Clock::manual(noon())).await
}

/// An empty ledger with this clock.
pub async fn ledger_at(clock: Clock) -> (Database, Ledger) {
    let database = migrated().await;
    let ledger = Ledger::open(&LedgerSettings { url: database.url.clone(), connections: 8 }, clock)
        .expect("a ledger");
    (database, ledger)
}

/// A database as `tallyline migrate` leaves it: a copy takes far less time than the migrations.
pub async fn migrated() -> Database {
    let template = TEMPLATE.get_or_init(template).await;
    let database = super::database_like(&super::setting("TALLYLINE_TEST_POSTGRES"), template).await;
    sqlx::query("update ledger set incarnation = gen_random_uuid()")
        .execute(&database.pool)
        .await
        .expect("an incarnation of its own");
    database
}

/// The name of the database that every ledger is a copy of.
static TEMPLATE: OnceCell<String> = OnceCell::const_new();

async fn template() -> String {
    let database = super::database().await;
    let settings = LedgerSettings { url: database.url.clone(), connections: 1 };
    let ledger = Ledger::open(&settings, Clock::manual(noon())).expect("a ledger");
    ledger.migrate().await.expect("migrate");
    ledger.pool.close().await;
    database.into_template().await
}

/// The deployments of [`registered_ledger`].
pub const REGISTERED: [Uuid; 2] = [DEPLOYMENT, OTHER_DEPLOYMENT];

/// Like [`ledger`], with both deployments registered.
pub async fn registered_ledger() -> (Database, Ledger) {
    let (database, ledger) = ledger().await;
    register(&ledger, &REGISTERED).await;
    (database, ledger)
}

/// Registers deployments and binds each unbound one to a separate coderd, as their collectors do.
pub async fn register(ledger: &Ledger, deployments: &[Uuid]) {
    for deployment in deployments.iter().copied() {
        ledger
            .run(async |conn| {
                sources::register(conn, deployment, noon(), None, ledger.clock.now()).await
            })
            .await
            .expect("registered");
        if !ledger
            .run(async |conn| identity::is_bound(conn, deployment).await)
            .await
            .expect("the ledger answers")
        {
            let identity =
                SourceIdentity { deployment_id: deployment, organization_id: deployment };
            ledger
                .run(async |conn| identity::bind(conn, deployment, identity).await)
                .await
                .expect("the ledger answers")
                .expect("bound");
        }
    }
}

/// Registers a deployment and retires it: its events are valid, and nothing waits for it.
pub async fn register_retired(ledger: &Ledger, deployment: Uuid) {
    register(ledger, &[deployment]).await;
    let act = NewAct {
        actor: "sre-1",
        act: ActKind::Retire,
        subject: Subject::Named("a test"),
        reason: "its coderd is gone",
        detail: serde_json::json!({}),
    };
    assert!(
        ledger
            .run(async |conn| retirements::retire(conn, deployment, &act, ledger.clock.now()).await)
            .await
            .expect("the ledger answers")
    );
}

/// Operations without a coderd; everything else is the default.
pub fn operations(ledger: &Ledger, log: &Log) -> Operations {
    Operations {
        ledger: ledger.clone(),
        log: log.clone(),
        group: GROUP.to_owned(),
        partitions: 1,
        coderd: None,
        deployment: None,
        keys: PublicKeys::new(),
        rules: RuleSet::default(),
        retention: Retention::default(),
    }
}

/// Runs an operation of this actor.
pub async fn act<R: Operation>(
    operations: &Operations,
    request: &R,
    actor: &Actor,
) -> Result<R::Answer, OperationError> {
    operations.run(request, actor, &|_| {}, &CancellationToken::new()).await
}

/// Runs an operation that needs no actor.
pub async fn ask<R: Operation>(
    operations: &Operations,
    request: &R,
) -> Result<R::Answer, OperationError> {
    act(operations, request, &Actor::default()).await
}

pub fn partition(topic: Topic, partition: i32) -> TopicPartition {
    TopicPartition { topic, partition }
}

/// A completed build that differs from its neighbours in everything that a fold reads. The same `n`
/// gives the same build.
pub fn build(deployment: Uuid, n: u32) -> Event {
    let completed_at = noon() + TimeDelta::seconds(i64::from(n) * 17 - 200);
    let prebuilt = n.is_multiple_of(5);
    let status = if n % 7 == 3 { BuildStatus::Failed } else { BuildStatus::Succeeded };
    let initiator_id =
        if prebuilt { PREBUILDS_USER } else { Uuid::from_u128(u128::from(n % 11) + 100) };
    let name = |kind: &str, of: u32| format!("{kind}-{}", n % of);
    let build = WorkspaceBuildCompleted {
        build_id: Uuid::from_u128(0xb000_0000 + u128::from(n)),
        workspace_id: Uuid::from_u128(0xa000_0000 + u128::from(n)),
        organization_id: Uuid::from_u128(u128::from(n % 3)),
        template_id: Uuid::from_u128(u128::from(n % 4)),
        template_version_id: Uuid::from_u128(u128::from(n % 8)),
        preset_id: None,
        owner_id: initiator_id,
        initiator_id,
        transition: Transition::Start,
        reason: "initiator".into(),
        status,
        build_number: 1,
        stage: prebuilt.then_some(InputStage::Create),
        first_build_by_prebuilds_user: prebuilt,
        first_build_stage: None,
        first_successful_start: status == BuildStatus::Succeeded,
        has_ai_task: None,
        has_external_agent: None,
        daily_cost: 0,
        created_at: completed_at - TimeDelta::hours(2),
        // from a minute before to an hour before, and sometimes after the end or not at all
        started_at: (n % 13 != 1)
            .then(|| completed_at - TimeDelta::milliseconds(i64::from(n) * 7919 % 3_600_000 - 60)),
        completed_at,
        organization_name: name("organization", 3),
        template_name: name("template", 4),
        template_version_name: "v1".into(),
        preset_name: if n.is_multiple_of(2) { String::new() } else { name("preset", 5) },
        workspace_name: format!("workspace-{n}"),
        owner_name: "user-001".into(),
    };
    Event { deployment, payload: Payload::Build(Box::new(build)) }
}

/// A completed claim, like [`build`].
pub fn claim(deployment: Uuid, n: u32) -> Event {
    let Payload::Build(build) = build(deployment, n).payload else { unreachable!("it is a build") };
    let claim = PrebuildClaimed {
        build_id: Uuid::from_u128(0xc000_0000 + u128::from(n)),
        workspace_id: build.workspace_id,
        organization_id: build.organization_id,
        template_id: build.template_id,
        template_version_id: build.template_version_id,
        preset_id: None,
        claimed_by: Uuid::from_u128(100),
        initiator_id: Uuid::from_u128(100),
        build_number: 2,
        stage: Some(InputStage::Claim),
        status: build.status,
        created_at: build.created_at,
        started_at: Some(build.completed_at - TimeDelta::milliseconds(i64::from(n) * 31 % 300_000)),
        completed_at: build.completed_at,
        organization_name: build.organization_name,
        template_name: build.template_name,
        preset_name: build.preset_name,
    };
    Event { deployment, payload: Payload::Claim(Box::new(claim)) }
}

/// One usage event; every fourth is not managed agents.
pub fn usage(deployment: Uuid, n: u32) -> Event {
    let count = u64::from(n % 3) + 1;
    let quantity = if n % 4 == 3 {
        UsageQuantity::AiSeats(count)
    } else {
        UsageQuantity::ManagedAgents(count)
    };
    let created_at = noon() + TimeDelta::microseconds(i64::from(n) * 7_777_777);
    let usage =
        Usage { id: format!("usage-{n}"), quantity, created_at, marks: PublishMarks::default() };
    Event { deployment, payload: Payload::Usage(usage) }
}

/// The event of that number on that topic, of one of the two deployments.
pub fn event(topic: Topic, n: u32) -> Event {
    let deployment = if n % 6 == 5 { OTHER_DEPLOYMENT } else { DEPLOYMENT };
    match topic {
        Topic::WorkspaceBuilds => build(deployment, n),
        Topic::PrebuildClaims => claim(deployment, n),
        Topic::AgentUsage => usage(deployment, n),
    }
}

/// An event as it comes from the log.
pub fn arrival(offset: i64, event: Event) -> Arrival {
    Arrival {
        offset,
        timestamp: noon(),
        message: event.to_message(),
        event: Ok(event),
        confirmed: false,
    }
}

/// A record that is not an event.
pub fn refused(offset: i64, disposition: Disposition) -> Arrival {
    let mut message = build(DEPLOYMENT, 1).to_message();
    message.payload = Some(b"\0 no JSON".to_vec());
    let refusal = Refusal {
        disposition,
        cause: RejectCause::Json,
        detail: "payload: not a JSON object".into(),
    };
    Arrival { offset, timestamp: noon(), message, event: Err(refusal), confirmed: false }
}

/// The last batch in the view's state; 0 before the fold starts.
pub fn caught_up_to<S: Stage>(view: &View<S>) -> i64 {
    view.freshness().map_or(0, |freshness| freshness.sequence.number)
}

/// The lease after the batch that it wrote.
pub fn moved(claim: &PartitionLease, next_offset: i64) -> PartitionLease {
    PartitionLease { next_offset, ..claim.clone() }
}

/// Takes the lease of a partition whose log begins at `log_start`.
pub async fn lease_partition(
    ledger: &Ledger,
    partition: TopicPartition,
    log_start: i64,
) -> Result<PartitionLease, sqlx::Error> {
    let now = ledger.clock.now();
    ledger.run(async |conn| positions::lease(conn, partition, log_start, now).await).await
}

/// Records one batch.
pub async fn record_batch(
    ledger: &Ledger,
    chain: &Chain,
    arrivals: &[Arrival],
    next_offset: i64,
) -> Result<Counts, RecordError> {
    let now = ledger.clock.now();
    ledger.run(async |conn| record::batch(conn, chain, arrivals, next_offset, now).await).await
}

/// The newest batch of the ledger.
pub async fn newest_landmark(ledger: &Ledger) -> Landmark {
    let head = ledger.run(snapshots::head).await.expect("the ledger answers").number;
    let landmark = ledger.run(async |conn| landmarks::of_batch(conn, head).await).await;
    landmark.expect("the ledger answers").expect("a batch")
}

pub async fn take_lease(
    ledger: &Ledger,
    name: &str,
    holder: &str,
    length: Duration,
) -> Result<Option<Lease>, sqlx::Error> {
    ledger.run(async |conn| leases::take(conn, name, holder, length).await).await
}

/// Keeps all audits from beginning, until [`go_on`].
pub async fn stop_audits(ledger: &Ledger) -> Lease {
    super::eventually(Duration::from_secs(30), "no audit runs", || async {
        take_lease(ledger, "audit", "test", Duration::from_secs(600)).await.expect("it").is_some()
    })
    .await;
    let lease = take_lease(ledger, "audit", "test", Duration::from_secs(600)).await;
    lease.expect("the ledger").expect("it is this holder's")
}

pub async fn go_on(ledger: &Ledger, audits: Lease) {
    ledger.run(async |conn| leases::release(conn, audits).await).await.expect("released");
}

/// Records audits without differences, of the ledger and of these deployments, so that publishing
/// does not wait for an audit.
pub async fn audited(ledger: &Ledger, deployments: &[Uuid]) {
    let lease = take_lease(ledger, "audit", "fixture", Duration::from_secs(60)).await;
    let lease = lease.expect("the ledger").expect("no other audit");
    let sequence = ledger.run(snapshots::head).await.expect("the ledger");
    let sources = deployments.iter().map(|deployment| (SOURCE_JOINT, Some(*deployment)));
    for (joint, deployment) in [(LOG_JOINT, None), (VENDOR_JOINT, None)].into_iter().chain(sources)
    {
        let joint = AuditedJoint {
            joint,
            deployment,
            sequence,
            seconds: 0.0,
            good_for: Duration::from_secs(86_400),
            recent_since: ledger.clock.now(),
        };
        let step = AuditStep::default();
        ledger
            .run(async |conn| audit_items::record(conn, &lease, &joint, &step).await)
            .await
            .expect("recorded");
    }
    ledger.run(async |conn| leases::release(conn, lease).await).await.expect("released");
}

pub async fn completeness_of(ledger: &Ledger, source_id: i16) -> Result<Completeness, sqlx::Error> {
    ledger.run(async |conn| passes::completeness(conn, source_id).await).await
}

/// Chooses these license rules, as an operator does after a rehearsal.
pub async fn choose_license_rules(ledger: &Ledger, rules: &str) {
    let act = new_act(ActKind::Rebuild, Subject::Named(LICENSE_RULES));
    let set = async |conn: &mut PgConnection| {
        choices::set(conn, LICENSE_RULES, rules, &act, ledger.clock.now()).await
    };
    ledger.run(set).await.expect("chosen");
}

/// Marks every reject as discarded, by one act.
pub async fn discard_all(ledger: &Ledger) {
    let act = new_act(ActKind::Discard, Subject::Reject(1));
    let begin =
        async |conn: &mut PgConnection| rejects::begin_acts(conn, &[act], ledger.clock.now()).await;
    let acts = ledger.run(begin).await.expect("an act");
    sqlx::query("update reject set state = 'discarded', act_id = $1")
        .bind(acts[0])
        .execute(&ledger.pool)
        .await
        .expect("discarded");
}

fn new_act(act: ActKind, subject: Subject<'_>) -> NewAct<'_> {
    NewAct { actor: "user-001", act, subject, reason: "a test", detail: serde_json::json!({}) }
}

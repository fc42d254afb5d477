//! Replays have exactly the effect of their plan.

mod effect;
mod interrupted;

use std::time::Duration;

use chrono::TimeDelta;
use serde_json::json;
use tallyline::consumer;
use tallyline::event::{Event, Message, Payload, Topic, TopicPartition, UsageQuantity};
use tallyline::ledger::{Chain, Ledger, LicenseChange, LicenseState, licenses, sources};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::{
    Actor, LogRange, OperationError, Operations, ReplayExecution, ReplayPlan, Replayed, Step,
};
use tallyline::projection;
use tallyline::stages::{LicensesState, MetricsState, Stage};
use tokio_util::sync::CancellationToken;

use crate::support::Database;
use crate::support::ledger::{
    DEPLOYMENT, ask, build, claim, lease_partition, ledger, noon, operations, record_batch,
    register, take_lease, usage,
};
use crate::support::snapshots::pieces;
use crate::support::tables::tables;

const SOON: Duration = Duration::from_secs(60);

/// A ledger and a log with two partitions a topic, in one database.
struct Site {
    operations: Operations,
    _database: Database,
}

impl Site {
    async fn new() -> Site {
        let (database, ledger) = ledger().await;
        let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
        log.create_topics(2).await.unwrap();
        register(&ledger, &[DEPLOYMENT]).await;
        Site { operations: operations(&ledger, &log), _database: database }
    }

    async fn append(&self, topic: Topic, events: &[Event]) {
        self.operations
            .log
            .append(topic, events.iter().map(Event::to_message).collect())
            .await
            .unwrap();
    }

    /// Records unread records of the log, as a consumer does.
    async fn consume(&self) {
        for topic in Topic::ALL {
            for partition in self.operations.log.partitions(topic).await.unwrap() {
                let partition = TopicPartition { topic, partition };
                let claim = lease_partition(&self.operations.ledger, partition, 0).await.unwrap();
                let records =
                    self.operations.log.read(partition, claim.next_offset, 10_000).await.unwrap();
                let Some(last) = records.last() else { continue };
                let next_offset = last.offset + 1;
                let arrivals: Vec<_> = records.into_iter().map(consumer::read).collect();
                record_batch(&self.operations.ledger, &Chain::Live(claim), &arrivals, next_offset)
                    .await
                    .unwrap();
            }
        }
    }

    /// The ledger begins to read at the log's ends: earlier records are missing in it.
    async fn begin_at_the_ends(&self) {
        for topic in Topic::ALL {
            for partition in self.operations.log.partitions(topic).await.unwrap() {
                let partition = TopicPartition { topic, partition };
                let (_, end) = self.operations.log.watermarks(partition).await.unwrap();
                lease_partition(&self.operations.ledger, partition, end).await.unwrap();
            }
        }
    }

    async fn plan(&self, topics: &[&str]) -> ReplayPlan {
        let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
        let range = LogRange { topics, from: "earliest".into(), until: "latest".into() };
        ask(&self.operations, &range).await.unwrap()
    }

    async fn execute(&self, plan: &ReplayPlan) -> Result<Replayed, OperationError> {
        let request =
            ReplayExecution { hash: plan.hash.clone(), records_per_second: Some(1_000_000) };
        self.operations
            .execute_replay(&request, &actor(), &|_: Step| {}, &CancellationToken::new())
            .await
    }

    /// At ten a second an execution waits after the first ten records; this stops it there.
    async fn interrupt(&self, plan: &ReplayPlan) {
        let (stop, request) = (
            CancellationToken::new(),
            ReplayExecution { hash: plan.hash.clone(), records_per_second: Some(10) },
        );
        let signal = stop.clone();
        let stopping = move |step: Step| {
            if step.doing == "replaying" {
                signal.cancel();
            }
        };
        let interrupted =
            self.operations.execute_replay(&request, &actor(), &stopping, &stop).await;
        assert!(matches!(interrupted, Err(OperationError::Interrupted)), "{interrupted:?}");
    }

    async fn state<S: Stage>(&self) -> S {
        projection::fold_to::<S>(&self.operations.ledger, i64::MAX).await.unwrap().state
    }
}

fn actor() -> Actor {
    Actor { name: "sre-1".into(), reason: "a test".into() }
}

fn sum(plan: &ReplayPlan, of: impl Fn(&tallyline::operations::PlannedPartition) -> i32) -> i32 {
    plan.partitions.iter().map(of).sum()
}

/// Valid from an hour before noon until a year later.
async fn license(ledger: &Ledger) {
    let source = ledger
        .run(async |conn| {
            sources::register(conn, DEPLOYMENT, noon(), None, ledger.clock.now()).await
        })
        .await
        .unwrap();
    let (start, end) = (noon() - TimeDelta::hours(1), noon() + TimeDelta::days(365));
    let claims = json!({
        "issued_at": start, "not_before": start, "license_expires": end, "expires_at": end, "account_type": "salesforce",
        "account_id": "1", "feature_set": "enterprise", "features": {"managed_agent_limit_soft": 10, "managed_agent_limit_hard": 20}
    });
    let change = LicenseChange {
        license_id: 7,
        jwt_sha256: [7; 32],
        uploaded_at: None,
        state: LicenseState::Verified(claims),
    };
    let lease = take_lease(ledger, "collector", "test", SOON).await.unwrap().unwrap();
    ledger
        .run(async |conn| {
            licenses::record(conn, &lease, source.id, &[change], ledger.clock.now()).await
        })
        .await
        .unwrap();
}

#[tokio::test]
async fn a_whole_topic_replay_changes_nothing_and_its_plan_shows_that() {
    let site = Site::new().await;
    license(&site.operations.ledger).await;
    site.append(
        Topic::WorkspaceBuilds,
        &(0..400).map(|n| build(DEPLOYMENT, n)).collect::<Vec<_>>(),
    )
    .await;
    site.append(Topic::PrebuildClaims, &(0..200).map(|n| claim(DEPLOYMENT, n)).collect::<Vec<_>>())
        .await;
    site.append(Topic::AgentUsage, &(0..300).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>())
        .await;
    // one event twice, one with other content, an invalid one, one of a later version's type
    let Payload::Usage(mut other) = usage(DEPLOYMENT, 1).payload else { panic!("it is usage") };
    other.quantity = UsageQuantity::ManagedAgents(99);
    let mut later = usage(DEPLOYMENT, 5000).to_message();
    for (name, value) in &mut later.headers {
        if name == "ce_type" {
            *value = Some(b"dc_later_v1".to_vec());
        }
    }
    let odd = vec![
        usage(DEPLOYMENT, 1).to_message(),
        Event { deployment: DEPLOYMENT, payload: Payload::Usage(other) }.to_message(),
        Message { payload: Some(b"{}".to_vec()), ..Message::default() },
        later,
    ];
    site.operations.log.append(Topic::AgentUsage, odd).await.unwrap();
    site.consume().await;
    // one is published, the others wait
    let settled = "with b as (insert into batch (kind, recorded_at) values ('verdicts', now()) returning id),
        p as (update publication set state = 'published' where event_id = 'usage-2' returning source_id, event_id, state)
        insert into settlement (source_id, event_id, batch_id, state) select source_id, event_id, id, state from p, b";
    sqlx::query(settled).execute(&site.operations.ledger.pool).await.unwrap();

    let (metrics, licenses) =
        (site.state::<MetricsState>().await, site.state::<LicensesState>().await);
    let families = format!("{:?}", metrics.deployment(DEPLOYMENT).unwrap().families());
    let before = tables(&site.operations.ledger.pool).await;
    let plan = site.plan(&[]).await;
    let counts = [
        sum(&plan, |one| one.records),
        sum(&plan, |one| one.new_events),
        sum(&plan, |one| one.duplicates),
        sum(&plan, |one| one.conflicts),
        sum(&plan, |one| one.rejects),
        sum(&plan, |one| one.held),
        sum(&plan, |one| one.new_refused),
    ];
    assert_eq!(counts, [904, 0, 901, 1, 1, 1, 0]);
    assert!(plan.effect.is_empty(), "{:?}", plan.effect);
    assert!(
        plan.effect.introduced.is_empty()
            && plan.effect.publications.is_empty()
            && plan.effect.metrics.is_empty()
    );
    // the window begins an hour before the first usage and contains all: each three of four are 1
    // to 3 agents
    let agents: u64 = (0..300_u64).filter(|n| n % 4 != 3).map(|n| n % 3 + 1).sum();
    let window: Vec<_> = plan
        .effect
        .licenses
        .iter()
        .map(|window| (window.license_id, window.before, window.after))
        .collect();
    assert_eq!(window, [(7, agents, agents)]);

    let executed = site.execute(&plan).await.unwrap();
    assert_eq!(
        (executed.resumed_after, executed.records, executed.accepted, executed.duplicates),
        (None, 904, 0, 901)
    );
    let after = site.state::<MetricsState>().await;
    assert!(
        pieces(&after) == pieces(&metrics)
            && format!("{:?}", after.deployment(DEPLOYMENT).unwrap().families()) == families
    );
    assert!(pieces(&site.state::<LicensesState>().await) == pieces(&licenses));
    let now = tables(&site.operations.ledger.pool).await;
    let changed: Vec<&String> = now
        .iter()
        .filter(|(name, rows)| before.get(*name) != Some(rows))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(
        changed,
        [
            "batch",
            "batch_content",
            "batch_part",
            "chained_row",
            "ledger",
            "operator_act",
            "plan",
            "replay"
        ],
        "its own batches with their digests, its act and its plan"
    );
    let acts: Vec<(String, String, String, String)> =
        sqlx::query_as("select actor, act, subject, reason from operator_act")
            .fetch_all(&site.operations.ledger.pool)
            .await
            .unwrap();
    assert_eq!(acts, [("sre-1".into(), "replay".into(), plan.hash.clone(), "a test".into())]);
    assert!(matches!(site.execute(&plan).await, Err(OperationError::Forbidden(_))), "once");
}

#[tokio::test]
async fn a_replay_reads_at_most_the_requested_records_a_second() {
    let site = Site::new().await;
    site.append(Topic::AgentUsage, &(0..60).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>())
        .await;
    let plan = site.plan(&[]).await;
    let request = ReplayExecution { hash: plan.hash, records_per_second: Some(40) };
    let begun = std::time::Instant::now();
    site.operations
        .execute_replay(&request, &actor(), &|_: Step| {}, &CancellationToken::new())
        .await
        .unwrap();
    // 60 records at 40 a second; a busy machine only takes longer
    assert!(begun.elapsed() >= Duration::from_millis(1490), "{:?}", begun.elapsed());
}

//! Replays: what a plan says is what then comes, and nothing else.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use tallyline::audit::Audit;
use tallyline::clock::Clock;
use tallyline::consumer;
use tallyline::event::{
    BuildStatus, Event, InputStage, Message, PREBUILDS_USER, Payload, PrebuildClaimed, PublishMarks, Topic, TopicPartition, Usage,
    UsageQuantity, WorkspaceBuildCompleted,
};
use tallyline::ledger::{Chain, Ledger, LedgerSettings, LicenseChange, LicenseState};
use tallyline::log::{KafkaSettings, Log, PostgresLogSettings};
use tallyline::operations::{
    Actor, Desk, FamilyEffect, LogRange, OperationError, Queued, ReplayExecution, ReplayPlan, Replayed, Step, WindowEffect,
};
use tallyline::projection;
use tallyline::stages::{LicensesState, MetricsState, Stage};
use tokio_util::sync::CancellationToken;

use crate::support::ledger::{DEPLOYMENT, build, claim, desk, ledger, noon, usage};
use crate::support::process::{Process, tallyline};
use crate::support::tables::tables;
use crate::support::{self, Database, database, eventually};

const SOON: Duration = Duration::from_secs(60);

/// A ledger and a log of two partitions a topic, in one database.
struct Site {
    desk: Desk,
    _database: Database,
}

impl Site {
    async fn new() -> Site {
        let (database, ledger) = ledger().await;
        let log = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
        log.create_topics(2).await.unwrap();
        Site { desk: desk(&ledger, &log), _database: database }
    }

    async fn append(&self, topic: Topic, events: &[Event]) {
        self.desk.log.append(topic, events.iter().map(Event::to_message).collect()).await.unwrap();
    }

    /// Records what the log holds behind the ledger's positions, as a consumer does.
    async fn consume(&self) {
        for topic in Topic::ALL {
            for partition in self.desk.log.partitions(topic).await.unwrap() {
                let partition = TopicPartition { topic, partition };
                let claim = self.desk.ledger.claim(partition, 0).await.unwrap();
                let records = self.desk.log.read(partition, claim.next_offset, 10_000).await.unwrap();
                let Some(last) = records.last() else { continue };
                let next_offset = last.offset + 1;
                let arrivals: Vec<_> = records.into_iter().map(consumer::read).collect();
                self.desk.ledger.record(&Chain::Live(claim), &arrivals, next_offset).await.unwrap();
            }
        }
    }

    /// The ledger begins to read at the log's ends: what is before is missing in it.
    async fn begin_at_the_ends(&self) {
        for topic in Topic::ALL {
            for partition in self.desk.log.partitions(topic).await.unwrap() {
                let partition = TopicPartition { topic, partition };
                let (_, end) = self.desk.log.watermarks(partition).await.unwrap();
                self.desk.ledger.claim(partition, end).await.unwrap();
            }
        }
    }

    async fn plan(&self, topics: &[&str]) -> ReplayPlan {
        let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
        let range = LogRange { topics, from: "earliest".into(), until: "latest".into() };
        self.desk.plan_replay(&range, |_: Step| {}, &CancellationToken::new()).await.unwrap()
    }

    async fn execute(&self, plan: &ReplayPlan) -> Result<Replayed, OperationError> {
        let request = ReplayExecution { hash: plan.hash.clone(), records_per_second: Some(1_000_000) };
        self.desk.execute_replay(&request, &actor(), |_: Step| {}, &CancellationToken::new()).await
    }

    /// At ten a second an execution waits after the first ten, and is stopped there.
    async fn interrupt(&self, plan: &ReplayPlan) {
        let (stop, request) = (CancellationToken::new(), ReplayExecution { hash: plan.hash.clone(), records_per_second: Some(10) });
        let heard = stop.clone();
        let stopping = move |step: Step| {
            if step.doing == "replaying" {
                heard.cancel();
            }
        };
        let interrupted = self.desk.execute_replay(&request, &actor(), stopping, &stop).await;
        assert!(matches!(interrupted, Err(OperationError::Interrupted)), "{interrupted:?}");
    }

    async fn state<S: Stage>(&self) -> S {
        projection::fold_to::<S>(&self.desk.ledger, i64::MAX).await.unwrap().state
    }
}

fn actor() -> Actor {
    Actor { name: "sre-1".into(), reason: "a test".into() }
}

fn sum(plan: &ReplayPlan, of: impl Fn(&tallyline::operations::PlannedPartition) -> i32) -> i32 {
    plan.partitions.iter().map(of).sum()
}

/// From an hour before noon to a year later.
async fn license(ledger: &Ledger) {
    let source = ledger.register_source(DEPLOYMENT, noon(), None).await.unwrap();
    let (start, end) = (noon() - TimeDelta::hours(1), noon() + TimeDelta::days(365));
    let claims = json!({
        "issued_at": start, "not_before": start, "license_expires": end, "expires_at": end, "account_type": "salesforce",
        "account_id": "1", "feature_set": "enterprise", "features": {"managed_agent_limit_soft": 10, "managed_agent_limit_hard": 20}
    });
    let change = LicenseChange { license_id: 7, jwt_sha256: [7; 32], uploaded_at: None, state: LicenseState::Verified(claims) };
    let lease = ledger.take_lease("collector", "test", SOON).await.unwrap().unwrap();
    ledger.record_licenses(&lease, source.id, &[change]).await.unwrap();
}

#[tokio::test]
async fn a_whole_topic_replay_changes_nothing_and_its_plan_said_so() {
    let site = Site::new().await;
    license(&site.desk.ledger).await;
    site.append(Topic::WorkspaceBuilds, &(0..400).map(|n| build(DEPLOYMENT, n)).collect::<Vec<_>>()).await;
    site.append(Topic::PrebuildClaims, &(0..200).map(|n| claim(DEPLOYMENT, n)).collect::<Vec<_>>()).await;
    site.append(Topic::AgentUsage, &(0..300).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>()).await;
    // one event twice, one with another content, one that is none, one of a type of later days
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
    site.desk.log.append(Topic::AgentUsage, odd).await.unwrap();
    site.consume().await;
    // one is published, the others wait
    let settled = "with b as (insert into batch (kind, recorded_at) values ('verdicts', now()) returning id)
        update publication set state = 'published', settled_batch_id = b.id from b where event_id = 'usage-2'";
    sqlx::query(settled).execute(&site.desk.ledger.pool).await.unwrap();

    let (metrics, licenses) = (site.state::<MetricsState>().await, site.state::<LicensesState>().await);
    let families = format!("{:?}", metrics.deployment(DEPLOYMENT).unwrap().families());
    let before = tables(&site.desk.ledger.pool).await;
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
    assert!(plan.effect.introduced.is_empty() && plan.effect.publications.is_empty() && plan.effect.metrics.is_empty());
    // the window begins an hour before the first usage and holds all: those that are no fourth, 1 to 3 agents each
    let agents: u64 = (0..300_u64).filter(|n| n % 4 != 3).map(|n| n % 3 + 1).sum();
    let window: Vec<_> = plan.effect.licenses.iter().map(|window| (window.license_id, window.before, window.after)).collect();
    assert_eq!(window, [(7, agents, agents)]);

    let executed = site.execute(&plan).await.unwrap();
    assert_eq!((executed.resumed_after, executed.records, executed.accepted, executed.duplicates), (None, 904, 0, 901));
    let bytes = |state: &MetricsState| serde_json::to_vec(state).unwrap();
    let after = site.state::<MetricsState>().await;
    assert!(bytes(&after) == bytes(&metrics) && format!("{:?}", after.deployment(DEPLOYMENT).unwrap().families()) == families);
    assert!(serde_json::to_vec(&site.state::<LicensesState>().await).unwrap() == serde_json::to_vec(&licenses).unwrap());
    let now = tables(&site.desk.ledger.pool).await;
    let changed: Vec<&String> = now.iter().filter(|(name, rows)| before.get(*name) != Some(rows)).map(|(name, _)| name).collect();
    assert_eq!(changed, ["batch", "ledger", "operator_act", "plan", "replay"], "its own batches, its act and its plan");
    let acts: Vec<(String, String, String, String)> =
        sqlx::query_as("select actor, act, subject, reason from operator_act").fetch_all(&site.desk.ledger.pool).await.unwrap();
    assert_eq!(acts, [("sre-1".into(), "replay".into(), plan.hash.clone(), "a test".into())]);
    assert!(matches!(site.execute(&plan).await, Err(OperationError::Forbidden(_))), "once");
}

fn at(seconds: i64) -> DateTime<Utc> {
    noon() + TimeDelta::seconds(seconds)
}

/// A regular creation an hour after the introduction that took so many seconds.
fn creation(n: u32, seconds: i64) -> WorkspaceBuildCompleted {
    let Payload::Build(build) = build(DEPLOYMENT, n).payload else { panic!("it is a build") };
    let (completed_at, initiator_id) = (at(3600), uuid::Uuid::from_u128(100));
    WorkspaceBuildCompleted {
        owner_id: initiator_id,
        initiator_id,
        status: BuildStatus::Succeeded,
        stage: None,
        first_build_by_prebuilds_user: false,
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
    of(Payload::Usage(Usage { id: id.into(), quantity, created_at, marks: PublishMarks::default() }))
}

/// What the ledger misses: two creations by the introduction's rules and one before it, one of the pool, a claim, and usage in and out of the window.
async fn append_what_is_missing(site: &Site) {
    let early = WorkspaceBuildCompleted { completed_at: at(-3600), started_at: Some(at(-3660)), created_at: at(-7200), ..creation(3, 60) };
    let pool = WorkspaceBuildCompleted {
        owner_id: PREBUILDS_USER,
        initiator_id: PREBUILDS_USER,
        stage: Some(InputStage::Create),
        first_build_by_prebuilds_user: true,
        ..creation(4, 30)
    };
    let builds = [creation(1, 42), creation(2, 100), early, pool].map(|build| of(Payload::Build(Box::new(build))));
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
    let seats = Usage { id: "seats".into(), quantity: UsageQuantity::AiSeats(5), created_at: at(0), marks: PublishMarks::default() };
    let usage = [agents("in-1", 1, at(0)), agents("in-2", 2, at(1)), agents("before", 4, at(-3601)), of(Payload::Usage(seats))];
    site.append(Topic::AgentUsage, &usage).await;
}

fn expected_metrics() -> Vec<FamilyEffect> {
    let family = |family: &str, added, added_seconds| FamilyEffect { deployment: DEPLOYMENT, family: family.into(), added, added_seconds };
    vec![
        // 42 + 100 regular, 30 of the pool; the one before the introduction is counted and not observed
        family("coderd_prebuilt_workspace_claim_duration_seconds", 1, Some(7.0)),
        family("coderd_workspace_creation_duration_seconds", 3, Some(172.0)),
        family("coderd_workspace_creation_total", 3, None),
    ]
}

#[tokio::test]
async fn a_plan_says_in_numbers_what_then_comes() {
    let site = Site::new().await;
    license(&site.desk.ledger).await;
    append_what_is_missing(&site).await;
    site.begin_at_the_ends().await;
    site.append(Topic::AgentUsage, &[agents("live", 16, at(5))]).await;
    site.consume().await;

    let plan = site.plan(&[]).await;
    assert_eq!((sum(&plan, |one| one.records), sum(&plan, |one| one.new_events), sum(&plan, |one| one.duplicates)), (10, 9, 1));
    let (start, end) = (noon() - TimeDelta::hours(1), noon() + TimeDelta::days(365));
    let window = WindowEffect { deployment: DEPLOYMENT, license_id: 7, start, end, before: 16, after: 19 };
    assert_eq!((plan.effect.introduced.as_slice(), plan.effect.licenses.as_slice()), (&[][..], &[window][..]));
    let queued = |event_type: &str, events, units: &str| Queued {
        deployment: DEPLOYMENT,
        event_type: event_type.into(),
        events,
        units: units.into(),
    };
    assert_eq!(plan.effect.publications, [queued("dc_managed_agents_v1", 3, "7"), queued("hb_ai_seats_v1", 1, "5")]);
    assert_eq!(plan.effect.metrics, expected_metrics());
    assert!(!plan.effect.is_empty());

    // what comes in live beside it and is none of its own does not change its effect
    site.append(Topic::AgentUsage, &[agents("live-2", 32, at(6))]).await;
    site.consume().await;
    let executed = site.execute(&plan).await.unwrap();
    assert_eq!((executed.records, executed.accepted, executed.duplicates), (10, 9, 1));
    let licenses = site.state::<LicensesState>().await;
    assert_eq!(licenses.deployment(DEPLOYMENT).unwrap().agents().count(start, end), 16 + 32 + 3);
    let metrics = site.state::<MetricsState>().await;
    let metrics = metrics.deployment(DEPLOYMENT).unwrap();
    let creations: u64 = metrics.creations().iter().map(|(_, counter)| counter.value).sum();
    let seconds: f64 = metrics.creation_seconds().iter().map(|(_, tally)| tally.sum_seconds()).sum();
    let claims: f64 = metrics.claim_seconds().iter().map(|(_, tally)| tally.sum_seconds()).sum();
    assert_eq!((creations, seconds, claims), (3, 172.0, 7.0));
    let pending: Vec<(String, i64, String)> = sqlx::query_as(
        "select usage_event.event_type, count(*), sum(quantity)::text from publication
         join usage_event on usage_event.source_id = publication.source_id and id = event_id group by 1 order by 1",
    )
    .fetch_all(&site.desk.ledger.pool)
    .await
    .unwrap();
    assert_eq!(pending, [("dc_managed_agents_v1".into(), 5, "55".into()), ("hb_ai_seats_v1".into(), 1, "5".into())]);
}

#[tokio::test]
async fn a_replay_whose_effect_has_changed_is_refused_and_writes_nothing() {
    let site = Site::new().await;
    license(&site.desk.ledger).await;
    append_what_is_missing(&site).await;
    site.begin_at_the_ends().await;
    let plan = site.plan(&[]).await;
    let refused = async |what: &str| {
        let before = tables(&site.desk.ledger.pool).await;
        let executed = site.execute(&plan).await;
        assert!(matches!(executed, Err(OperationError::Forbidden(_))), "{what}: {executed:?}");
        assert!(tables(&site.desk.ledger.pool).await == before, "{what}: something was written");
    };
    let usage = TopicPartition { topic: Topic::AgentUsage, partition: 0 };
    let pool = &site.desk.ledger.pool;
    let generation = "update position set generation = generation + $1 where topic = $2 and partition = 0";
    sqlx::query(generation).bind(1).bind(usage.topic.name()).execute(pool).await.unwrap();
    refused("the partition was begun anew").await;
    sqlx::query(generation).bind(-1).bind(usage.topic.name()).execute(pool).await.unwrap();

    // one of its new events comes in live
    site.append(Topic::AgentUsage, &[agents("in-2", 2, at(1))]).await;
    site.consume().await;
    refused("an event of it came in live").await;

    // planned again it is as it is now; a new license changes the effect, too
    let again = site.plan(&[]).await;
    assert_eq!(sum(&again, |one| one.new_events), 8);
    let missing = OperationError::NotFound(String::new());
    let request = ReplayExecution { hash: "00ff".into(), records_per_second: None };
    let executed = site.desk.execute_replay(&request, &actor(), |_: Step| {}, &CancellationToken::new()).await;
    assert_eq!(std::mem::discriminant(&executed.unwrap_err()), std::mem::discriminant(&missing));
    site.execute(&again).await.unwrap();
    assert!(site.plan(&[]).await.effect.is_empty());
}

#[tokio::test]
async fn a_partition_begun_anew_in_the_middle_ends_the_replay() {
    let site = Site::new().await;
    license(&site.desk.ledger).await;
    site.append(Topic::AgentUsage, &(0..40).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>()).await;
    site.begin_at_the_ends().await;
    let plan = site.plan(&["tallyline.agent-usage.v1"]).await;
    site.interrupt(&plan).await;
    let pool = &site.desk.ledger.pool;
    let accepted = async || sqlx::query_scalar::<_, i64>("select count(*) from usage_event").fetch_one(pool).await.unwrap();
    assert_eq!(accepted().await, 10);
    sqlx::query("update position set generation = 2").execute(pool).await.unwrap();
    assert!(matches!(site.execute(&plan).await, Err(OperationError::Forbidden(_))));
    assert_eq!(accepted().await, 10);
    sqlx::query("update position set generation = 1").execute(pool).await.unwrap();
    let done = site.execute(&plan).await.unwrap();
    assert_eq!((done.resumed_after, done.accepted), (Some(10), 40), "it goes on where it was");
}

/// New events, some twice, and one that is none; at ten a second the first part of them is one batch of ten.
#[tokio::test]
async fn a_resumed_replay_answers_for_the_whole_plan() {
    let site = Site::new().await;
    let usage: Vec<_> = (0..20).chain(0..5).map(|n| usage(DEPLOYMENT, n)).collect();
    site.append(Topic::AgentUsage, &usage).await;
    site.desk.log.append(Topic::AgentUsage, vec![Message { payload: Some(b"{}".to_vec()), ..Message::default() }]).await.unwrap();
    let plan = site.plan(&["tallyline.agent-usage.v1"]).await;
    let of = |count: fn(&tallyline::operations::PlannedPartition) -> i32| sum(&plan, count);
    let planned = [of(|one| one.records), of(|one| one.new_events), of(|one| one.duplicates), of(|one| one.rejects)];
    assert_eq!(planned, [26, 20, 5, 1]);

    site.interrupt(&plan).await;
    let done = site.execute(&plan).await.unwrap();
    assert!(done.resumed_after.is_some_and(|before| (1..=10).contains(&before)), "{done:?}");
    assert_eq!([done.records, done.accepted, done.duplicates, done.rejects], planned);
}

#[tokio::test]
async fn a_deployment_that_is_not_known_is_introduced_and_its_plan_says_so() {
    let site = Site::new().await;
    site.append(Topic::WorkspaceBuilds, &[of(Payload::Build(Box::new(creation(1, 42))))]).await;
    site.append(Topic::AgentUsage, &[agents("one", 3, at(0))]).await;
    site.desk.ledger.clock.set(at(7200));
    let plan = site.plan(&[]).await;
    assert_eq!(plan.effect.introduced, [DEPLOYMENT]);
    // introduced now, so that what was completed before is counted and not observed
    let metrics: Vec<_> = plan.effect.metrics.iter().map(|family| (family.family.as_str(), family.added)).collect();
    assert_eq!(metrics, [("coderd_workspace_creation_total", 1)]);
    site.execute(&plan).await.unwrap();
    let state = site.state::<MetricsState>().await;
    assert!(state.deployment(DEPLOYMENT).unwrap().creation_seconds().is_empty());
}

#[tokio::test]
async fn a_record_that_postgresql_itself_refuses_is_rejected_by_a_replay_too() {
    let site = Site::new().await;
    license(&site.desk.ledger).await;
    site.append(Topic::AgentUsage, &[agents("one", 1, at(0)), agents("unlucky", 1, at(1)), agents("two", 2, at(2))]).await;
    site.begin_at_the_ends().await;
    let refuses = "alter table usage_event add constraint unlucky check (id <> 'unlucky')";
    sqlx::query(refuses).execute(&site.desk.ledger.pool).await.unwrap();
    let first = site.plan(&[]).await;
    assert_eq!(sum(&first, |one| one.new_events), 3, "only PostgreSQL knows");
    let executed = site.execute(&first).await.unwrap();
    assert_eq!((executed.accepted, executed.rejects), (2, 1));
    let again = site.plan(&[]).await;
    assert_eq!((sum(&again, |one| one.new_events), sum(&again, |one| one.rejects), sum(&again, |one| one.new_refused)), (0, 1, 0));
    assert!(again.effect.is_empty());
}

/// A pipeline file on this database, with these lines more.
fn pipeline(database: &Database, more: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("pipeline.toml");
    let lines = format!("roles = ['consume']\nledger.url = '{}'\nledger.connections = 4\nlog.partitions = 2\n{more}", database.url);
    std::fs::write(&path, lines).unwrap();
    let file = path.to_str().unwrap().to_owned();
    (folder, file)
}

async fn killed_in_the_middle(log: impl FnOnce(&Ledger) -> (Log, String)) {
    let database = database().await;
    let ledger = Ledger::open(&LedgerSettings { url: database.url.clone(), connections: 4 }, Clock::system()).unwrap();
    ledger.migrate().await.unwrap();
    let (log, more) = log(&ledger);
    log.create_topics(2).await.unwrap();
    let site = Site { desk: desk(&ledger, &log), _database: database };
    site.desk.ledger.register_source(DEPLOYMENT, noon(), None).await.unwrap();
    let missing: Vec<_> = (0..1000).map(|n| usage(DEPLOYMENT, n)).collect();
    site.append(Topic::AgentUsage, &missing).await;
    site.begin_at_the_ends().await;
    let (_folder, file) = pipeline(&site._database, &more);
    let mut consumer = tallyline(&["run", "--pipeline", &file], &[]);
    let plan = site.plan(&[]).await;
    assert_eq!(sum(&plan, |one| one.new_events), 1000);

    let pool = &site.desk.ledger.pool;
    let count = async |query: &'static str| sqlx::query_scalar::<_, i64>(query).fetch_one(pool).await.unwrap();
    let replayed = "select coalesce(sum(accepted), 0)::bigint from batch where kind = 'replay'";
    let live = "select coalesce(sum(accepted), 0)::bigint from batch where kind = 'log'";
    let execute =
        |rate: &str| tallyline(&["replay", "execute", "--pipeline", &file, "--plan", &plan.hash, "--rate", rate, "--output", "json"], &[]);
    let mut replay: Process = execute("60");
    eventually(SOON, "some of it is replayed", || async { count(replayed).await > 0 }).await;
    // live events come in while it runs
    site.append(Topic::AgentUsage, &(5000..5200).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>()).await;
    eventually(SOON, "live events are recorded beside it", || async { count(live).await == 200 }).await;
    assert!(replay.runs() && count(replayed).await < 1000, "they were not beside it");
    replay.kill();
    let done = count(replayed).await;
    assert!((1..1000).contains(&done), "{done}");

    let mut again = execute("100000");
    assert!(again.ends_within(SOON).await.success(), "{}", again.stderr());
    let answer: serde_json::Value = serde_json::from_str(&again.stdout()).unwrap();
    let before = answer["resumed_after"].as_i64().unwrap();
    assert_eq!((answer["records"].as_i64(), answer["accepted"].as_i64()), (Some(1000), Some(1000)), "the whole plan: {answer}");
    // what was in hand when it was killed may have been recorded since
    assert!(before >= done && before < 1000, "{done}, then {before}");
    assert_eq!((count(replayed).await, count("select count(*) from usage_event").await), (1000, 1200));
    assert_eq!(count("select count(*) from operator_act where act = 'replay'").await, 1, "one act, however often it was begun");
    assert!(consumer.terminate(SOON).await.success());
    let (ledger, log) = (site.desk.ledger.clone(), site.desk.log.clone());
    let report = Audit { ledger, log, source: None, patience: Duration::ZERO }.run().await.unwrap();
    assert!(report.balanced, "{report:?}");
    let by_state: BTreeMap<String, i64> = site.desk.ledger.publication_counts(1).await.unwrap();
    assert_eq!(by_state, BTreeMap::from([("pending".into(), 1200)]));
}

#[tokio::test]
async fn a_replay_killed_in_the_middle_goes_on_and_live_events_come_in_beside_it() {
    killed_in_the_middle(|ledger| (Log::postgres(ledger.pool.clone(), PostgresLogSettings::default()), String::new())).await;
}

#[tokio::test]
async fn a_replay_killed_in_the_middle_goes_on_on_kafka() {
    killed_in_the_middle(|_| {
        let kafka = support::kafka();
        let log = Log::kafka(KafkaSettings { topic_prefix: kafka.prefix.clone(), ..KafkaSettings::new(&kafka.brokers) }).unwrap();
        let lines = format!("log.kind = 'kafka'\nkafka.brokers = '{}'\nkafka.topic_prefix = '{}'\n", kafka.brokers, kafka.prefix);
        (log, lines)
    })
    .await;
}

#[tokio::test]
async fn a_log_that_is_not_the_one_that_was_read_is_not_replayed() {
    let site = Site::new().await;
    site.append(Topic::AgentUsage, &(0..40).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>()).await;
    site.consume().await;
    let plan = site.plan(&[]).await;
    // as if the topic had been made anew: the same offsets hold other records
    sqlx::query("update log_record set payload = '{}' where payload is not null").execute(&site.desk.ledger.pool).await.unwrap();
    let executed = site.execute(&plan).await.unwrap_err();
    assert!(matches!(&executed, OperationError::Forbidden(message) if message.contains("recover")), "{executed:?}");
    let range = LogRange { topics: vec![], from: "earliest".into(), until: "latest".into() };
    let planned = site.desk.plan_replay(&range, |_: Step| {}, &CancellationToken::new()).await;
    assert!(matches!(planned, Err(OperationError::Forbidden(_))), "{planned:?}");
}

#[tokio::test]
async fn a_log_made_anew_in_the_middle_ends_the_replay() {
    let site = Site::new().await;
    site.append(Topic::AgentUsage, &(0..60).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>()).await;
    site.consume().await;
    let plan = site.plan(&[]).await;
    // at five a second it waits a second after each five
    let request = ReplayExecution { hash: plan.hash, records_per_second: Some(5) };
    let begun = std::sync::Arc::new(tokio::sync::Notify::new());
    let told = begun.clone();
    let progress = move |step: Step| {
        if step.doing == "replaying" {
            told.notify_one();
        }
    };
    let made_anew = async {
        begun.notified().await;
        sqlx::query("update log_record set payload = '{}'").execute(&site.desk.ledger.pool).await.unwrap();
    };
    let (actor, stop) = (actor(), CancellationToken::new());
    let (executed, ()) = tokio::join!(site.desk.execute_replay(&request, &actor, progress, &stop), made_anew);
    let executed = executed.unwrap_err();
    assert!(matches!(&executed, OperationError::Forbidden(message) if message.contains("recover")), "{executed:?}");
    let rejects: i64 = sqlx::query_scalar("select count(*) from reject").fetch_one(&site.desk.ledger.pool).await.unwrap();
    assert_eq!(rejects, 0, "a record of another log was recorded");
}

#[tokio::test]
async fn no_more_records_a_second_are_read_than_was_asked_for() {
    let site = Site::new().await;
    site.append(Topic::AgentUsage, &(0..60).map(|n| usage(DEPLOYMENT, n)).collect::<Vec<_>>()).await;
    let plan = site.plan(&[]).await;
    let request = ReplayExecution { hash: plan.hash, records_per_second: Some(40) };
    let begun = std::time::Instant::now();
    site.desk.execute_replay(&request, &actor(), |_: Step| {}, &CancellationToken::new()).await.unwrap();
    // 60 records at 40 a second; a busy machine only makes it longer
    assert!(begun.elapsed() >= Duration::from_millis(1490), "{:?}", begun.elapsed());
}

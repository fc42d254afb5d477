//! Books that do not balance: every publisher stops, counting goes on, and publishing resumes by
//! itself once they balance.

use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use prometheus::Registry;
use tallyline::audit::{Audit, AuditTelemetry, Continuous};
use tallyline::coderd::Database;
use tallyline::consumer;
use tallyline::event::{Event, Payload, Topic, TopicPartition, Usage};
use tallyline::ledger::{
    Arrival, Chain, Finding, HoldScope, SourceIdentity, findings, holds, identity, leases, sources,
};
use tallyline::log::Log;
use tallyline::publisher::{Condition, Publisher};
use tallyline_sim::coderd::SchemaVersion;
use tempfile::NamedTempFile;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use super::world::{DEPLOYMENT, ORGANIZATION, World, start_time, usage};
use crate::support::coderd::{identify, tables};
use crate::support::ledger::{lease_partition, record_batch};
use crate::support::process::{Ended, run_tallyline};
use crate::support::{eventually, setting};

const OTHER: Uuid = Uuid::from_u128(0xe);
pub const DEADLINE: Duration = Duration::from_secs(30);
const LOG: &str = "log and ledger";
pub const SOURCE: &str = "source and ledger";

/// A world with a real log, and the audits of two processes.
pub struct Audited {
    pub world: World,
    pub log: Log,
    registries: [Registry; 2],
    _audits: DropGuard,
}

impl Audited {
    pub async fn new() -> Audited {
        let world = World::new().await;
        let log = world.log().await;
        let audits = CancellationToken::new();
        let registries = [Registry::new(), Registry::new()];
        for registry in &registries {
            audit(
                &world,
                &log,
                world.settings.coderd.clone().map(|database| (database, DEPLOYMENT)),
                registry,
                &audits,
            );
        }
        let audited = Audited { world, log, registries, _audits: audits.drop_guard() };
        audited.finds(SOURCE, "the source was audited", |finding| finding.differences == 0).await;
        audited.finds(LOG, "the log was audited", |finding| finding.differences == 0).await;
        audited
    }

    /// Usage that coderd and the log have and that the ledger has accepted.
    pub async fn add(&self, usage: Usage) {
        self.world.add_with(&self.log, &[usage]).await;
    }

    async fn tamper(&self, statement: &'static str) {
        sqlx::raw_sql(statement).execute(&self.world.ledger.pool).await.unwrap();
    }

    /// Waits for an audit with this finding.
    pub async fn finds(&self, joint: &str, what: &str, right: impl Fn(&Finding) -> bool) {
        eventually(DEADLINE, what, || async {
            let findings = self.world.ledger.run(findings::list).await.unwrap();
            findings.iter().any(|finding| finding.joint == joint && right(finding))
        })
        .await;
    }

    pub fn gauge(
        &self,
        process: usize,
        name: &str,
        joint: &str,
        source: Option<Uuid>,
    ) -> Option<f64> {
        gauge(&self.registries[process], name, joint, source)
    }

    /// Runs the command, as an operator of this ledger does.
    pub async fn command(&self, words: &[&str]) -> Ended {
        let database: String = sqlx::query_scalar("select current_database()")
            .fetch_one(&self.world.ledger.pool)
            .await
            .unwrap();
        let server = setting("TALLYLINE_TEST_POSTGRES");
        let (server, _) = server.rsplit_once('/').unwrap();
        let pipeline = NamedTempFile::new().unwrap();
        std::fs::write(
            pipeline.path(),
            format!("roles = ['serve']\nledger.url = '{server}/{database}'\n"),
        )
        .unwrap();
        run_tallyline(&[words, &["--pipeline", pipeline.path().to_str().unwrap()]].concat(), &[])
            .await
    }
}

fn gauge(registry: &Registry, name: &str, joint: &str, source: Option<Uuid>) -> Option<f64> {
    let labels = [
        ("joint", joint.to_owned()),
        ("source", source.map(|source| source.to_string()).unwrap_or_default()),
    ];
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name)?;
    let of = |metric: &&prometheus::proto::Metric| {
        metric
            .get_label()
            .iter()
            .map(|label| (label.name(), label.value().to_owned()))
            .eq(labels.clone())
    };
    family.get_metric().iter().find(of).map(|metric| metric.get_gauge().value())
}

/// The continuous audit of one process.
fn audit(
    world: &World,
    log: &Log,
    source: Option<(Database, Uuid)>,
    registry: &Registry,
    stop: &CancellationToken,
) -> JoinHandle<()> {
    let telemetry = AuditTelemetry::register(registry, source.is_some()).unwrap();
    let audit =
        Audit { ledger: world.ledger.clone(), log: log.clone(), source, patience: Duration::ZERO };
    let holder = uuid::Uuid::new_v4().to_string();
    let (every, late_after) = (Duration::from_millis(200), 1_000);
    let continuous = Continuous { audit, every, late_after, holder, telemetry };
    let stop = stop.clone();
    tokio::spawn(async move { continuous.run(&stop).await })
}

async fn nothing_is_sent(publisher: &mut Publisher, world: &World) {
    let cycle = publisher.cycle(&world.stop).await.expect("a cycle");
    let condition = publisher.condition().get();
    assert!(
        cycle.requests == 0 && matches!(&condition, Condition::Held(_)) && !condition.is_healthy(),
        "{cycle:?} {condition}"
    );
    for words in ["held: ", LOG, "`tallyline audit` lists the differences"] {
        assert!(condition.to_string().contains(words), "{words:?} is not in {condition}");
    }
}

#[tokio::test]
async fn an_imbalance_stops_publishing_in_all_processes_and_counting_continues_until_it_is_repaired()
 {
    let site = Audited::new().await;
    let world = &site.world;
    let mut publishers = [world.publisher(), world.publisher()];
    site.add(usage("a", start_time())).await;
    assert_eq!(publishers[0].cycle(&world.stop).await.unwrap().accepted, 1, "the books balance");

    site.tamper("update batch set accepted = accepted + 1, records = records + 1 where topic like '%usage%'").await;
    a_turn_passes(world);
    site.add(usage("b", start_time())).await;
    site.finds(LOG, "the imbalance is found", |finding| {
        finding.differences > 0 && finding.differs_since.is_some()
    })
    .await;
    for publisher in &mut publishers {
        nothing_is_sent(publisher, world).await;
    }
    // counting goes on, and new usage waits
    site.add(usage("c", start_time())).await;
    world.pass(TimeDelta::hours(1));
    for publisher in &mut publishers {
        nothing_is_sent(publisher, world).await;
    }
    assert_eq!(
        (site.world.delivered(), world.number_in("pending").await),
        (vec!["a".to_owned()], 2)
    );
    for process in 0..2 {
        eventually(DEADLINE, "each process shows it", || async {
            site.gauge(process, "tallyline_audit_difference", "log_and_ledger", None)
                .is_some_and(|differences| differences > 0.0)
        })
        .await;
        assert_eq!(
            site.gauge(process, "tallyline_audit_difference", "ledger_and_vendor", None),
            Some(0.0)
        );
        let audited_at = |source| {
            site.gauge(process, "tallyline_audit_timestamp_seconds", "source_and_ledger", source)
        };
        assert!(
            audited_at(Some(DEPLOYMENT)).is_some_and(|at| at > 0.0) && audited_at(None).is_none()
        );
    }

    site.tamper("update batch set accepted = accepted - 1, records = records - 1 where topic like '%usage%' and accepted > 1").await;
    site.finds(LOG, "the books balance again", |finding| {
        finding.differences == 0 && finding.differs_since.is_none()
    })
    .await;
    assert_eq!(publishers[1].cycle(&world.stop).await.unwrap().accepted, 2);
    assert_eq!(publishers[1].condition().get(), Condition::Working);
    assert_eq!(["a", "b", "c"].map(|id| world.times_billed(id)), [1, 1, 1]);
}

#[tokio::test]
async fn in_mode_shadow_no_usage_is_held() {
    let mut site = Audited::new().await;
    site.world.settings.sole = false;
    site.add(usage("a", start_time())).await;
    site.tamper("update batch set accepted = accepted + 1, records = records + 1 where topic like '%usage%'").await;
    site.finds(LOG, "the imbalance is found", |finding| finding.differences > 0).await;
    site.world.coderd_marks("a", Some(start_time()), None).await;
    assert_eq!(site.world.cycle().await.settled.not_ours, 1);
}

#[tokio::test]
async fn an_unreachable_side_changes_no_finding_and_the_other_joints_are_still_audited() {
    let world = World::new().await;
    let log = world.log().await;
    sqlx::query("delete from audit_finding").execute(&world.ledger.pool).await.unwrap();
    let unreachable =
        Database::new("postgres://unknown@127.0.0.1:1/none", Duration::from_secs(1)).unwrap();
    for source in [Some(unreachable), None] {
        let (audits, registry) = (CancellationToken::new(), Registry::new());
        let (reads, own) = (source.is_some(), Some(DEPLOYMENT));
        audit(&world, &log, source.map(|database| (database, DEPLOYMENT)), &registry, &audits);
        let timestamp = |source| {
            gauge(&registry, "tallyline_audit_timestamp_seconds", "source_and_ledger", source)
        };
        assert_eq!(timestamp(None), reads.then_some(0.0), "its deployment is not known yet");
        let audited_at = Arc::new(std::sync::Mutex::new(Vec::new()));
        eventually(DEADLINE, "the log is audited twice", || async {
            let findings = world.ledger.run(findings::list).await.unwrap();
            assert!(findings.iter().all(|finding| finding.joint != SOURCE), "{findings:?}");
            let mut times = audited_at.lock().unwrap();
            times.extend(
                findings
                    .iter()
                    .filter(|finding| finding.joint == LOG)
                    .map(|finding| finding.audited_at),
            );
            times.dedup();
            times.len() >= 2
        })
        .await;
        audits.cancel();
        // a joint that this process should audit and never did is visible; another process shows
        // its own joints
        assert_eq!((timestamp(None), timestamp(own)), (None, reads.then_some(0.0)));
        assert_eq!(gauge(&registry, "tallyline_audit_difference", "source_and_ledger", own), None);
        let hold = world
            .ledger
            .run(async |conn| holds::of_deployment(conn, DEPLOYMENT).await)
            .await
            .unwrap()
            .expect("a source that was never audited is held");
        assert!(hold.scope == HoldScope::Source && hold.why.contains("never audited"), "{hold:?}");
    }
}

/// When the joint was last audited.
async fn audited_at(
    world: &World,
    joint: &str,
    deployment: Option<Uuid>,
) -> Option<chrono::DateTime<chrono::Utc>> {
    sqlx::query_scalar("select max(audited_at) from audit_finding where joint = $1 and deployment_id is not distinct from $2")
        .bind(joint)
        .bind(deployment)
        .fetch_one(&world.ledger.pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn an_audit_that_reads_another_coderd_finds_nothing_and_holds_no_usage() {
    let Audited { world, log, registries: _, _audits: audits } = Audited::new().await;
    let bound = SourceIdentity { deployment_id: DEPLOYMENT, organization_id: ORGANIZATION };
    world
        .ledger
        .run(async |conn| identity::bind(conn, DEPLOYMENT, bound).await)
        .await
        .unwrap()
        .unwrap();
    world.add_with(&log, &[usage("a", start_time())]).await;
    eventually(DEADLINE, "the event is confirmed", || async {
        let confirmed = sqlx::query_scalar("select confirmed_at is not null from usage_event")
            .fetch_one(&world.ledger.pool);
        confirmed.await.unwrap()
    })
    .await;
    drop(audits);
    eventually(DEADLINE, "no audit runs", || async {
        world.ledger.run(async |conn| leases::holder(conn, "audit").await).await.unwrap().is_none()
    })
    .await;
    let age = "update audit_finding set audited_at = audited_at - interval '10 minutes'";
    sqlx::query(age).execute(&world.ledger.pool).await.unwrap();
    let audit_time = audited_at(&world, SOURCE, Some(DEPLOYMENT)).await;

    for reports_its_identity in [true, false] {
        let other = tables(SchemaVersion::Sep2026).await;
        if reports_its_identity {
            identify(&other.pool, OTHER, Uuid::from_u128(0xe0)).await;
        }
        let (registry, stop) = (Registry::new(), CancellationToken::new());
        let reader = Database::new(&other.url, Duration::from_secs(10)).unwrap();
        let task = audit(&world, &log, Some((reader, DEPLOYMENT)), &registry, &stop);
        // each audit compares the source after the log
        for _ in 0..2 {
            let before = audited_at(&world, LOG, None).await;
            eventually(DEADLINE, "an audit runs", || async {
                audited_at(&world, LOG, None).await > before
            })
            .await;
        }
        stop.cancel();
        task.await.unwrap();
        assert_eq!(
            audited_at(&world, SOURCE, Some(DEPLOYMENT)).await,
            audit_time,
            "{reports_its_identity}"
        );
    }
    assert_eq!(
        world.ledger.run(async |conn| holds::of_deployment(conn, DEPLOYMENT).await).await.unwrap(),
        None
    );
    assert_eq!(world.state("a").await, ("pending".to_owned(), None));
    assert_eq!(world.cycle().await.accepted, 1);
}

/// The other deployment's coderd, and the audit of a process that reads it.
struct Second {
    coderd: crate::support::Database,
    registry: Registry,
    audit: JoinHandle<()>,
    stop: DropGuard,
}

/// Batches and confirmed usage are compared again within a day.
pub fn a_turn_passes(world: &World) {
    world.pass(TimeDelta::hours(25));
}

impl Second {
    /// Its usage is in the log and in the ledger, and its coderd has never had it.
    async fn that_differs(site: &Audited) -> Second {
        let world = &site.world;
        world
            .ledger
            .run(async |conn| {
                sources::register(conn, OTHER, start_time(), None, world.ledger.clock.now()).await
            })
            .await
            .unwrap();
        let database = tables(SchemaVersion::Sep2026).await;
        let (registry, audits) = (Registry::new(), CancellationToken::new());
        let reader = Database::new(&database.url, Duration::from_secs(10)).unwrap();
        let audit = audit(world, &site.log, Some((reader, OTHER)), &registry, &audits);
        let event =
            Event { deployment: OTHER, payload: Payload::Usage(usage("elsewhere", start_time())) };
        site.log.append(Topic::AgentUsage, vec![event.to_message()]).await.unwrap();
        let partition = TopicPartition { topic: Topic::AgentUsage, partition: 0 };
        let claim = lease_partition(&world.ledger, partition, 0).await.unwrap();
        let records = site.log.read(partition, claim.next_offset, 10).await.unwrap();
        let next_offset = records.last().unwrap().offset + 1;
        // Unconfirmed usage would hold only itself.
        let arrivals: Vec<_> = records
            .into_iter()
            .map(|record| Arrival { confirmed: true, ..consumer::read(record) })
            .collect();
        assert_eq!(
            record_batch(&world.ledger, &Chain::Live(claim), &arrivals, next_offset)
                .await
                .unwrap()
                .accepted,
            1
        );
        let second = Second { coderd: database, registry, audit, stop: audits.drop_guard() };
        a_turn_passes(world);
        let differs =
            |finding: &Finding| finding.deployment_id == Some(OTHER) && finding.differences == 1;
        site.finds(SOURCE, "the other deployment differs", differs).await;
        second
    }
}

/// The first deployment is audited again, and balances.
async fn the_first_balances_again(site: &Audited) {
    let now: chrono::DateTime<chrono::Utc> = sqlx::query_scalar("select clock_timestamp()")
        .fetch_one(&site.world.ledger.pool)
        .await
        .unwrap();
    let balances = |finding: &Finding| {
        finding.deployment_id == Some(DEPLOYMENT)
            && finding.differences == 0
            && finding.audited_at > now
    };
    site.finds(SOURCE, "the first deployment balances", balances).await;
}

#[tokio::test]
async fn a_source_that_differs_is_held_and_another_source_of_the_ledger_is_published() {
    let site = Audited::new().await;
    let world = &site.world;
    let mut publisher = world.publisher();
    site.add(usage("a", start_time())).await;
    let second = Second::that_differs(&site).await;
    the_first_balances_again(&site).await;
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().accepted, 1);
    assert_eq!((publisher.condition().get(), world.times_billed("a")), (Condition::Working, 1));
    let held = world
        .ledger
        .run(async |conn| holds::of_deployment(conn, OTHER).await)
        .await
        .unwrap()
        .expect("a hold");
    assert_eq!((held.scope, held.deployment_id), (HoldScope::Source, Some(OTHER)));

    let status = site.command(&["status"]).await;
    let line = |words: &[&str]| {
        status.stdout.lines().any(|line| words.iter().all(|words| line.contains(words)))
    };
    assert!(line(&[SOURCE, &OTHER.to_string(), "DIFFERS"]), "{status:?}");
    assert!(line(&[SOURCE, &DEPLOYMENT.to_string(), "balanced"]), "{status:?}");
    assert!(line(&["not_in_source elsewhere: coderd had it and no longer has it"]), "{status:?}");
    assert!(line(&["source", &OTHER.to_string(), "1 of 1 usage events"]), "{status:?}");
    for registry in site.registries.iter().chain([&second.registry]) {
        eventually(DEADLINE, "each process shows both", || async {
            let value =
                |name: &str, source| gauge(registry, name, "source_and_ledger", Some(source));
            ["tallyline_audit_difference", "tallyline_audit_holds_publishing"]
                .iter()
                .all(|name| (value(name, DEPLOYMENT), value(name, OTHER)) == (Some(0.0), Some(1.0)))
        })
        .await;
    }

    sqlx::raw_sql(
        "insert into usage_events (id, event_type, event_data, created_at)
         values ('elsewhere', 'dc_managed_agents_v1', '{\"count\": 1}', '2025-08-01T12:00:00Z')",
    )
    .execute(&second.coderd.pool)
    .await
    .unwrap();
    site.finds(SOURCE, "the other balances", |finding| {
        finding.deployment_id == Some(OTHER) && finding.differences == 0
    })
    .await;
    assert_eq!(
        world.ledger.run(async |conn| holds::of_deployment(conn, OTHER).await).await.unwrap(),
        None
    );
}

#[tokio::test]
async fn findings_of_a_retired_deployment_are_shown_until_an_operator_dismisses_them() {
    let site = Audited::new().await;
    let world = &site.world;
    let second = Second::that_differs(&site).await;
    drop(second.stop);
    second.audit.await.unwrap();
    let retire = format!("tallyline sources retire {OTHER}");
    assert!(!site.command(&["status"]).await.stdout.contains(&retire), "it is audited");
    let age = "update audit_finding set audited_at = audited_at - interval '2 hours' where deployment_id = $1";
    sqlx::query(age).bind(OTHER).execute(&world.ledger.pool).await.unwrap();
    let status = site.command(&["status"]).await;
    assert!(status.stdout.contains(&retire), "{status:?}");

    let words = [
        "sources",
        "retire",
        &OTHER.to_string(),
        "--as",
        "sre-1",
        "--reason",
        "its coderd is gone",
    ];
    let without = site.command(&words[..3]).await;
    assert_eq!(without.status.code(), Some(2), "{without:?}");
    let retired = site.command(&words).await;
    assert!(
        retired.status.success()
            && retired.stdout.contains("neither sent nor expired until it is reinstated: 1"),
        "{retired:?}"
    );
    let again = site.command(&words).await;
    assert!(
        again.status.code() == Some(4)
            && again.stderr.contains(&format!("tallyline sources reinstate {OTHER}")),
        "{again:?}"
    );
    assert_eq!(
        world.ledger.run(async |conn| holds::of_deployment(conn, OTHER).await).await.unwrap(),
        None
    );
    for process in 0..2 {
        eventually(DEADLINE, "no process shows it any more", || async {
            ["difference", "open", "source_gone", "holds_publishing", "timestamp_seconds"]
                .iter()
                .all(|name| {
                    site.gauge(
                        process,
                        &format!("tallyline_audit_{name}"),
                        "source_and_ledger",
                        Some(OTHER),
                    )
                    .is_none()
                })
        })
        .await;
    }
    let act: (String, String, String, i64) = sqlx::query_as(
        "select actor, subject, reason, (detail->'findings'->0->>'differences')::bigint from operator_act where act = 'retire'",
    )
    .fetch_one(&world.ledger.pool)
    .await
    .unwrap();
    assert_eq!(act, ("sre-1".into(), OTHER.to_string(), "its coderd is gone".into(), 1));
}

#[tokio::test]
async fn a_retired_deployment_is_not_audited_until_it_is_reinstated() {
    let site = Audited::new().await;
    let world = &site.world;
    let second = Second::that_differs(&site).await;
    let change = async |act: &str| {
        let changed = site
            .command(&["sources", act, &OTHER.to_string(), "--as", "sre-1", "--reason", "a test"])
            .await;
        assert!(changed.status.success(), "{changed:?}");
    };
    change("retire").await;
    // an audit that had begun before has ended
    the_first_balances_again(&site).await;
    let timestamp = |source| {
        gauge(&second.registry, "tallyline_audit_timestamp_seconds", "source_and_ledger", source)
    };
    eventually(DEADLINE, "its process shows no audit that is due", || async {
        (timestamp(Some(OTHER)), timestamp(None)) == (None, None)
    })
    .await;
    let before = audited_at(world, SOURCE, Some(OTHER)).await;
    for _ in 0..3 {
        the_first_balances_again(&site).await;
    }
    assert_eq!(audited_at(world, SOURCE, Some(OTHER)).await, before);
    assert_eq!((timestamp(Some(OTHER)), timestamp(None)), (None, None));
    change("reinstate").await;
    site.finds(SOURCE, "it is audited again", |finding| {
        finding.deployment_id == Some(OTHER) && finding.differences == 1
    })
    .await;
}

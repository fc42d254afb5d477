//! Books that do not balance: no publisher of any process sends, counting goes on, and publishing goes on by itself once they balance.

use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use prometheus::Registry;
use tallyline::audit::{Audit, AuditTelemetry, Continuous};
use tallyline::coderd::Database;
use tallyline::event::Usage;
use tallyline::ledger::Finding;
use tallyline::log::Log;
use tallyline::publisher::{Condition, Mode, Publisher};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::world::{DEPLOYMENT, World, start_time, usage};
use crate::support::eventually;

const DEADLINE: Duration = Duration::from_secs(30);
const LOG: &str = "log and ledger";
const SOURCE: &str = "source and ledger";

/// A world whose log is a real one, and the audits of two processes beside it.
struct Audited {
    world: World,
    log: Log,
    registries: [Registry; 2],
    _audits: DropGuard,
}

impl Audited {
    async fn new() -> Audited {
        let world = World::new().await;
        let log = world.log().await;
        let audits = CancellationToken::new();
        let registries = [Registry::new(), Registry::new()];
        for registry in &registries {
            audit(&world, &log, world.settings.coderd.clone(), registry, &audits);
        }
        let audited = Audited { world, log, registries, _audits: audits.drop_guard() };
        audited.finds(SOURCE, "the source was audited", |finding| finding.differences == 0).await;
        audited.finds(LOG, "the log was audited", |finding| finding.differences == 0).await;
        audited
    }

    /// Usage that coderd has, that the log holds and that the ledger has accepted.
    async fn add(&self, usage: Usage) {
        self.world.add_with(&self.log, &[usage]).await;
    }

    async fn tamper(&self, statement: &'static str) {
        sqlx::raw_sql(statement).execute(&self.world.ledger.pool).await.unwrap();
    }

    /// Waits for an audit that finds this.
    async fn finds(&self, joint: &str, what: &str, right: impl Fn(&Finding) -> bool) {
        eventually(DEADLINE, what, || async {
            let findings = self.world.ledger.findings().await.unwrap();
            findings.iter().any(|finding| finding.joint == joint && right(finding))
        })
        .await;
    }

    fn gauge(&self, process: usize, name: &str, joint: &str) -> Option<f64> {
        let families = self.registries[process].gather();
        let family = families.iter().find(|family| family.name() == name)?;
        let of = |metric: &&prometheus::proto::Metric| metric.get_label().iter().any(|label| label.value() == joint);
        family.get_metric().iter().find(of).map(|metric| metric.get_gauge().value())
    }
}

/// One process's continuous audit.
fn audit(world: &World, log: &Log, source: Option<Database>, registry: &Registry, stop: &CancellationToken) {
    let source = source.map(|database| (database, DEPLOYMENT));
    let audit = Audit { ledger: world.ledger.clone(), log: log.clone(), source, patience: Duration::ZERO };
    let telemetry = AuditTelemetry::register(registry).unwrap();
    let holder = uuid::Uuid::new_v4().to_string();
    let continuous = Continuous { audit, every: Duration::from_millis(200), holder, telemetry };
    let stop = stop.clone();
    tokio::spawn(async move { continuous.run(&stop).await });
}

async fn nothing_is_sent(publisher: &mut Publisher, world: &World) {
    let cycle = publisher.cycle(&world.stop).await.expect("a cycle");
    let condition = publisher.condition().get();
    assert!(cycle.requests == 0 && matches!(&condition, Condition::Held(_)) && !condition.is_healthy(), "{cycle:?} {condition}");
    for words in ["the books do not balance", LOG, "run `tallyline audit`"] {
        assert!(condition.to_string().contains(words), "{words:?} is not in {condition}");
    }
}

#[tokio::test]
async fn an_imbalance_stops_publishing_in_all_processes_and_counting_goes_on_until_it_is_mended() {
    let site = Audited::new().await;
    let world = &site.world;
    let mut publishers = [world.publisher(), world.publisher()];
    site.add(usage("a", start_time())).await;
    assert_eq!(publishers[0].cycle(&world.stop).await.unwrap().accepted, 1, "the books balance");

    site.tamper("update batch set accepted = accepted + 1, records = records + 1 where topic like '%usage%'").await;
    site.add(usage("b", start_time())).await;
    site.finds(LOG, "the imbalance is found", |finding| finding.differences > 0 && finding.differs_since.is_some()).await;
    for publisher in &mut publishers {
        nothing_is_sent(publisher, world).await;
    }
    // counting goes on, and what is counted waits
    site.add(usage("c", start_time())).await;
    world.pass(TimeDelta::hours(1));
    for publisher in &mut publishers {
        nothing_is_sent(publisher, world).await;
    }
    assert_eq!((site.world.delivered(), world.number_in("pending").await), (vec!["a".to_owned()], 2));
    for process in 0..2 {
        eventually(DEADLINE, "each process shows it", || async {
            site.gauge(process, "tallyline_audit_difference", "log_and_ledger").is_some_and(|differences| differences > 0.0)
        })
        .await;
        assert_eq!(site.gauge(process, "tallyline_audit_difference", "ledger_and_vendor"), Some(0.0));
        assert!(site.gauge(process, "tallyline_audit_timestamp_seconds", "source_and_ledger").is_some_and(|at| at > 0.0));
    }

    site.tamper("update batch set accepted = accepted - 1, records = records - 1 where topic like '%usage%' and accepted > 1").await;
    site.finds(LOG, "the books balance again", |finding| finding.differences == 0 && finding.differs_since.is_none()).await;
    assert_eq!(publishers[1].cycle(&world.stop).await.unwrap().accepted, 2);
    assert_eq!(publishers[1].condition().get(), Condition::Working);
    assert_eq!(["a", "b", "c"].map(|id| world.times_billed(id)), [1, 1, 1]);
}

#[tokio::test]
async fn usage_that_coderd_no_longer_has_so_stops_all_publishing() {
    let site = Audited::new().await;
    let world = &site.world;
    site.add(usage("a", start_time())).await;
    site.add(usage("b", start_time())).await;
    sqlx::raw_sql("update usage_events set event_data = '{\"count\": 2}' where id = 'a'").execute(&world.coderd).await.unwrap();
    site.finds(SOURCE, "the difference is found", |finding| finding.differences == 1 && finding.examples[0].id == "a").await;
    assert_eq!(world.cycle().await.requests, 0);
    sqlx::raw_sql("update usage_events set event_data = '{\"count\": 1}' where id = 'a'").execute(&world.coderd).await.unwrap();
    site.finds(SOURCE, "it balances again", |finding| finding.differences == 0).await;
    assert_eq!(world.cycle().await.accepted, 2);
}

#[tokio::test]
async fn in_mode_shadow_nothing_is_held_because_nothing_leaves() {
    let mut site = Audited::new().await;
    site.world.settings.mode = Mode::Shadow;
    site.add(usage("a", start_time())).await;
    site.tamper("update batch set accepted = accepted + 1, records = records + 1 where topic like '%usage%'").await;
    site.finds(LOG, "the imbalance is found", |finding| finding.differences > 0).await;
    site.world.coderd_marks("a", Some(start_time()), None).await;
    assert_eq!(site.world.cycle().await.settled.not_ours, 1);
}

#[tokio::test]
async fn a_side_that_is_away_changes_no_finding_and_the_other_joints_are_still_audited() {
    let world = World::new().await;
    let log = world.log().await;
    let nobody = Database::new("postgres://nobody@127.0.0.1:1/none", Duration::from_secs(1)).unwrap();
    for source in [Some(nobody), None] {
        let audits = CancellationToken::new();
        audit(&world, &log, source, &Registry::new(), &audits);
        let audited_at = Arc::new(std::sync::Mutex::new(Vec::new()));
        eventually(DEADLINE, "the log is audited twice", || async {
            let findings = world.ledger.findings().await.unwrap();
            assert!(findings.iter().all(|finding| finding.joint != SOURCE), "{findings:?}");
            let mut times = audited_at.lock().unwrap();
            times.extend(findings.iter().filter(|finding| finding.joint == LOG).map(|finding| finding.audited_at));
            times.dedup();
            times.len() >= 2
        })
        .await;
        audits.cancel();
        assert_eq!(world.ledger.imbalance().await.unwrap(), None);
    }
}

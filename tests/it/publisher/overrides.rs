//! Recoveries of usage that differs in coderd: it is held back before, and sent as
//! accepted afterwards.

use std::time::Duration;

use chrono::TimeDelta;
use prometheus::Registry;
use tallyline::audit::{Audit, AuditReport};
use tallyline::event::{Event, Payload, RejectCause, Topic, TopicPartition};
use tallyline::ledger::{
    ActKind, Arrival, Chain, Disposition, NewAct, PassedReject, Refusal, RejectState, Subject,
    event_history, generations, rejects,
};
use tallyline::log::Log;
use tallyline::operations::recover::{Lost, RecoverEffect, RecoverExecution, RecoverRequest};
use tallyline::operations::{Actor, CoderdCutOff};
use tallyline::status;

use super::world::{DEPLOYMENT, World, start_time, usage};
use crate::support::eventually;
use crate::support::ledger::{act, ask, lease_partition, record_batch};

const SOON: Duration = Duration::from_secs(60);

fn held_back(registry: &Registry) -> f64 {
    let families = registry.gather();
    let family = families
        .iter()
        .find(|family| family.name() == "tallyline_publisher_held_back")
        .expect("the gauge");
    family.get_metric()[0].get_gauge().value()
}

async fn audited(world: &World, log: &Log) -> AuditReport {
    let source = world.settings.coderd.clone().map(|database| (database, DEPLOYMENT));
    Audit { ledger: world.ledger.clone(), log: log.clone(), source, patience: Duration::ZERO }
        .run()
        .await
        .expect("audited")
}

/// Plans the recovery of a restored coderd. Returns the number of reused ids, the number of pending
/// ones among them, and the hash.
async fn planned(world: &World, log: &Log) -> (i64, i64, Option<String>) {
    let request = RecoverRequest { lost: Lost::Coderd, without: Vec::new() };
    let plan = ask(&world.operations(log), &request).await.expect("a plan");
    let RecoverEffect::Coderd(effect) = plan.effect else { panic!("{plan:?}") };
    (effect.ids_used_again, effect.ids_used_again_pending, plan.hash)
}

async fn execute_recovery(world: &World, log: &Log, hash: String) {
    let actor = Actor { name: "user-001".to_owned(), reason: "coderd was restored".to_owned() };
    let execution = RecoverExecution { hash };
    act(&world.operations(log), &execution, &actor).await.expect("executed");
}

#[tokio::test]
async fn usage_with_an_id_reused_by_a_restored_coderd_is_shown_and_sent_after_a_recovery() {
    let world = World::new().await;
    let log = world.log().await;
    world.add_with(&log, &["again", "good", "later"].map(|id| usage(id, start_time()))).await;
    assert!(audited(&world, &log).await.balanced, "this confirms them");
    // restored to before it had used the ids, coderd uses two of them again
    for change in [
        "update usage_events set event_data = '{\"count\": 5}', created_at = created_at + interval '3 minutes' where id = 'again'",
        "update usage_events set event_data = '{\"count\": 7}' where id = 'later'",
    ] {
        sqlx::query(change).execute(&world.coderd).await.unwrap();
    }

    let registry = Registry::new();
    let mut publisher = world.publisher_in(&registry);
    for accepted in [1, 0] {
        let cycle = publisher.cycle(&world.stop).await.unwrap();
        assert_eq!((cycle.accepted, cycle.held_back), (accepted, 2));
        world.pass(TimeDelta::minutes(10));
    }
    // the metrics, the status and the event's explanation, each with the next step
    assert_eq!(held_back(&registry), 2.0);
    let status = status::read(&world.ledger, &log, Duration::from_secs(10)).await.unwrap();
    assert_eq!(status.queues[0].held_back, 2);
    let held_events = &status.queues[0].held_back_first;
    assert_eq!(
        held_events.iter().map(|event| event.event_id.as_str()).collect::<Vec<_>>(),
        ["again", "later"]
    );
    assert!(
        held_events[0].why.starts_with("coderd's row is dated 2025-08-01T12:03:00Z"),
        "{held_events:?}"
    );
    assert!(
        held_events[1].why.starts_with(
            "coderd's row has dc_managed_agents_v1 7, the accepted event dc_managed_agents_v1 1"
        ),
        "{held_events:?}"
    );
    let life = world
        .ledger
        .run(async |conn| event_history::publication(conn, world.source.id, "again").await)
        .await
        .unwrap()
        .expect("a publication");
    assert!(
        life.last_message.is_some_and(|message| message.contains("recover plan --lost coderd"))
    );

    assert!(!audited(&world, &log).await.balanced, "and the books differ");
    let (again, pending, hash) = planned(&world, &log).await;
    assert_eq!((again, pending), (2, 2));
    execute_recovery(&world, &log, hash.expect("there is something to do")).await;

    let report = audited(&world, &log).await;
    assert!(report.balanced, "{report:?}");
    // before the cut-off, the restored coderd published its own row under the id: the vendor has
    // that one
    world.coderd_marks("later", Some(start_time()), None).await;
    let registry = Registry::new();
    let mut publisher = world.publisher_in(&registry);
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().requests, 0);
    let actor = Actor {
        name: "user-001".to_owned(),
        reason: "coderd's publisher is disabled again".to_owned(),
    };
    act(&world.operations(&log), &CoderdCutOff { deployment_id: DEPLOYMENT }, &actor)
        .await
        .expect("it has stopped");
    let cycle = publisher.cycle(&world.stop).await.unwrap();
    assert_eq!((cycle.accepted, cycle.settled.not_ours, cycle.held_back), (1, 1, 0));
    assert_eq!(held_back(&registry), 0.0);
    assert_eq!(world.delivered(), ["good", "again"]);
    let books = world.vendor.books();
    let billed = books.billed.iter().find(|billed| billed.id == "again").expect("billed");
    assert_eq!(
        (billed.times, &billed.event_data, billed.created_at),
        (1, &serde_json::json!({ "count": 1 }), start_time())
    );
    let acts: Vec<(String, String)> =
        sqlx::query_as("select actor, reason from operator_act where act = 'recover'")
            .fetch_all(&world.ledger.pool)
            .await
            .unwrap();
    assert_eq!(acts, [("user-001".to_owned(), "coderd was restored".to_owned())]);
    assert_eq!(planned(&world, &log).await.1, 0);
    assert!(audited(&world, &log).await.balanced);
}

#[tokio::test]
async fn a_recovery_ends_the_hold_in_mode_shadow_too() {
    let mut world = World::new().await;
    world.settings.sole = false;
    let log = world.log().await;
    world.add_with(&log, &[usage("again", start_time())]).await;
    assert!(audited(&world, &log).await.balanced, "this confirms it");
    let change = "update usage_events set event_data = '{\"count\": 5}' where id = 'again'";
    sqlx::query(change).execute(&world.coderd).await.unwrap();
    assert_eq!(world.cycle().await.held_back, 1);
    let (_, _, hash) = planned(&world, &log).await;
    execute_recovery(&world, &log, hash.expect("there is something to do")).await;
    world.pass(TimeDelta::minutes(10));
    let cycle = world.cycle().await;
    assert_eq!((cycle.held_back, cycle.waiting), (0, 1));
}

#[tokio::test]
async fn usage_corrected_by_an_operator_is_sent_though_coderds_row_is_invalid() {
    let world = World::new().await;
    // coderd's row cannot be read, and the ledger has accepted an operator's version
    let event =
        Event { deployment: DEPLOYMENT, payload: Payload::Usage(usage("corrected", start_time())) };
    let claim = lease_partition(
        &world.ledger,
        TopicPartition { topic: Topic::AgentUsage, partition: 0 },
        0,
    )
    .await
    .unwrap();
    let refusal = Refusal {
        disposition: Disposition::Rejected,
        cause: RejectCause::Field,
        detail: "count: not a number".into(),
    };
    let arrival = Arrival {
        offset: 0,
        timestamp: start_time(),
        message: event.to_message(),
        event: Err(refusal),
        confirmed: false,
    };
    record_batch(&world.ledger, &Chain::Live(claim), &[arrival], 1).await.unwrap();
    world.add(&["corrected", "broken"].map(|id| usage(id, start_time()))).await;
    sqlx::query("update usage_events set event_data = '{\"count\": \"one\"}'")
        .execute(&world.coderd)
        .await
        .unwrap();
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.held_back), (0, 2), "no override yet");

    let reject: i64 =
        sqlx::query_scalar("select id from reject").fetch_one(&world.ledger.pool).await.unwrap();
    let act = NewAct {
        actor: "user-001",
        act: ActKind::Resubmit,
        subject: Subject::Reject(reject),
        reason: "one is 1",
        detail: serde_json::json!({}),
    };
    let acts = world
        .ledger
        .run(async |conn| rejects::begin_acts(conn, &[act], world.ledger.clock.now()).await)
        .await
        .unwrap();
    let passed = [PassedReject { id: reject, act_id: acts[0], place: None }];
    let generation_now = world.ledger.run(generations::all).await.unwrap();
    world
        .ledger
        .run(async |conn| {
            rejects::end(
                conn,
                &passed,
                &[RejectState::Open],
                RejectState::Resubmitted,
                generation_now,
            )
            .await
        })
        .await
        .unwrap();
    world.pass(TimeDelta::minutes(10));
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.held_back), (1, 1));
    assert_eq!(world.delivered(), ["corrected"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_usage_is_logged_once_with_the_command_that_releases_it() {
    let world = World::new().await;
    let log = world.log().await;
    world.add_with(&log, &["again", "gone", "good"].map(|id| usage(id, start_time()))).await;
    assert!(audited(&world, &log).await.balanced, "this confirms them");
    for change in [
        "update usage_events set event_data = '{\"count\": 5}' where id = 'again'",
        "delete from usage_events where id = 'gone'",
    ] {
        sqlx::query(change).execute(&world.coderd).await.unwrap();
    }
    let mut process = world.process(&world.vendor.ingest_url());
    for _ in 0..2 {
        eventually(SOON, "both are checked", || async {
            let query = "select count(*) from publication where held_for is not null and next_attempt_at > $1";
            let checked = sqlx::query_scalar::<_, i64>(query).bind(start_time() + TimeDelta::minutes(5)).fetch_one(&world.ledger.pool);
            checked.await.unwrap() == 2
        })
        .await;
        // due again at once
        sqlx::query("update publication set next_attempt_at = $1 where state = 'pending'")
            .bind(start_time())
            .execute(&world.ledger.pool)
            .await
            .unwrap();
    }
    assert!(process.terminate(SOON).await.success(), "{}", process.stderr());
    let said = process.stderr();
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("usage held:")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    for words in ["WARN", "events=2", "first=\"again\"", "recover plan --lost coderd"] {
        assert!(lines[0].contains(words), "{words:?} is not in {}", lines[0]);
    }
    assert_eq!(world.delivered(), ["good"]);
}

/// A forged record of usage that coderd never had: no operation on a restored coderd sends it.
#[tokio::test]
async fn usage_that_was_never_confirmed_is_not_released_by_a_recovery() {
    let world = World::new().await;
    let log = world.log().await;
    world.add_with(&log, &["seen", "forged"].map(|id| usage(id, start_time()))).await;
    sqlx::query("delete from usage_events where id = 'forged'")
        .execute(&world.coderd)
        .await
        .unwrap();
    assert!(!audited(&world, &log).await.balanced);
    sqlx::query("delete from usage_events").execute(&world.coderd).await.unwrap();
    assert_eq!(world.cycle().await.held_back, 2);
    let message = world.state("forged").await.1.expect("a message");
    assert!(
        message.contains("not known to have ever had it") && !message.contains("recover"),
        "{message}"
    );

    let request = RecoverRequest { lost: Lost::Coderd, without: Vec::new() };
    let plan = ask(&world.operations(&log), &request).await.expect("a plan");
    let RecoverEffect::Coderd(effect) = &plan.effect else { panic!("{plan:?}") };
    assert_eq!((effect.to_list, effect.unconfirmed), (1, 1), "{effect:?}");
    execute_recovery(&world, &log, plan.hash.expect("there is something to do")).await;
    world.pass(TimeDelta::minutes(10));
    assert_eq!(world.cycle().await.accepted, 1);
    assert_eq!((world.times_billed("seen"), world.times_billed("forged")), (1, 0));
    let report = audited(&world, &log).await;
    let differences: Vec<_> = report
        .joints
        .iter()
        .flat_map(|joint| &joint.differences)
        .map(|one| (&*one.kind, one.id.as_str()))
        .collect();
    assert_eq!(differences, [("not_in_source", "forged")]);
}

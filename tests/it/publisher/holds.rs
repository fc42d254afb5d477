//! How much usage a difference holds: one event, a source, or everything. A build that differs
//! holds none.

use chrono::TimeDelta;
use tallyline::event::{Event, Payload, Topic, TopicPartition, Usage};
use tallyline::ledger::{Chain, HeldFor, HoldScope, holds};
use tallyline::operations::{Actor, ReinstateSource, RetireSource};
use tallyline::publisher::Condition;
use tallyline::{consumer, status};

use super::books::{Audited, DEADLINE, SOURCE, a_turn_passes};
use super::world::{DEPLOYMENT, World, start_time, usage};
use crate::support::ledger::{act, audited, build, lease_partition, record_batch};

/// Adds usage `e-0` and `more` others.
async fn add_many(site: &Audited, more: usize) {
    let usages: Vec<Usage> = (0..=more).map(|n| usage(&format!("e-{n}"), start_time())).collect();
    site.world.add_with(&site.log, &usages).await;
}

async fn change_in_coderd(site: &Audited, ids: &[&str], count: i32) {
    sqlx::query(
        "update usage_events set event_data = jsonb_build_object('count', $2) where id = any($1)",
    )
    .bind(ids)
    .bind(count)
    .execute(&site.world.coderd)
    .await
    .unwrap();
}

/// Adds a forged record: the log and the ledger have it, and coderd does not.
async fn add_to_the_ledger_only(site: &Audited, payload: Payload) {
    let topic = if matches!(payload, Payload::Usage(_)) {
        Topic::AgentUsage
    } else {
        Topic::WorkspaceBuilds
    };
    let partition = TopicPartition { topic, partition: 0 };
    site.log
        .append(topic, vec![Event { deployment: DEPLOYMENT, payload }.to_message()])
        .await
        .unwrap();
    let ledger = &site.world.ledger;
    let claim = lease_partition(ledger, partition, 0).await.unwrap();
    let records = site.log.read(partition, claim.next_offset, 10).await.unwrap();
    let next_offset = records.last().expect("the record").offset + 1;
    let arrivals: Vec<_> = records.into_iter().map(consumer::read).collect();
    assert_eq!(
        record_batch(ledger, &Chain::Live(claim), &arrivals, next_offset).await.unwrap().accepted,
        1
    );
}

async fn differs(site: &Audited, differences: i64) {
    site.finds(SOURCE, "this many differ", |finding| {
        finding.deployment_id == Some(DEPLOYMENT) && finding.differences == differences
    })
    .await;
}

#[tokio::test]
async fn a_usage_event_that_differs_holds_itself_and_the_others_are_published() {
    let site = Audited::new().await;
    let world = &site.world;
    add_many(&site, 99).await;
    change_in_coderd(&site, &["e-0"], 2).await;
    differs(&site, 1).await;
    // by the audit alone: no publisher has checked it yet
    assert_eq!(
        (world.state("e-0").await.0.as_str(), world.held_for("e-0").await),
        ("pending", Some(HeldFor::CoderdDiffers))
    );
    let status = site.command(&["status"]).await;
    let line = |words: &[&str]| {
        status.stdout.lines().any(|line| words.iter().all(|words| line.contains(words)))
    };
    assert!(line(&["event", "e-0", "2025-08-01T12:00:00.000Z", "coderd's row"]), "{status:?}");
    assert!(!line(&["USAGE HELD", "source"]), "{status:?}");

    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.held_back), (99, 1));
    assert_eq!(world.times_billed("e-0"), 0);
    let status_holds = status::read(&world.ledger, &site.log, DEADLINE).await.unwrap().holds;
    assert_eq!(status_holds.len(), 1, "{status_holds:?}");
    assert_eq!(
        (status_holds[0].event_id.as_deref(), status_holds[0].since),
        (Some("e-0"), Some(start_time()))
    );
    assert!(status_holds[0].ends.contains("coderd's row"), "{status_holds:?}");

    change_in_coderd(&site, &["e-0"], 1).await;
    world.pass(TimeDelta::minutes(10));
    assert_eq!(world.cycle().await.accepted, 1);
    assert!(status::read(&world.ledger, &site.log, DEADLINE).await.unwrap().holds.is_empty());
}

#[tokio::test]
async fn over_1_percent_of_a_sources_usage_holds_the_source_until_less_differs() {
    let site = Audited::new().await;
    let world = &site.world;
    add_many(&site, 99).await;
    change_in_coderd(&site, &["e-0", "e-1"], 2).await;
    differs(&site, 2).await;
    let mut publisher = world.publisher();
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().requests, 0);
    let condition = publisher.condition().get();
    assert!(
        matches!(&condition, Condition::Held(_))
            && condition.to_string().contains("2 of 100 usage events"),
        "{condition}"
    );
    let status = site.command(&["status"]).await;
    let is_hold = |line: &str| {
        ["source", &DEPLOYMENT.to_string(), "2 of 100", "at most 1 %"]
            .iter()
            .all(|words| line.contains(words))
    };
    assert!(status.stdout.lines().any(is_hold), "{status:?}");
    // a process shows a finding at its next poll
    crate::support::eventually(DEADLINE, "the hold is shown", || async {
        let hold = "tallyline_audit_holds_publishing";
        site.gauge(0, hold, "source_and_ledger", Some(DEPLOYMENT)) == Some(1.0)
    })
    .await;

    change_in_coderd(&site, &["e-1"], 1).await;
    differs(&site, 1).await;
    world.pass(TimeDelta::minutes(10));
    assert_eq!(
        publisher.cycle(&world.stop).await.unwrap().accepted,
        99,
        "less than that holds only itself"
    );
}

/// One forged event is over 1 % of any source with fewer than 100 events. Only a correction of the event
/// could end that hold.
#[tokio::test]
async fn unconfirmed_usage_holds_itself_and_not_a_small_source() {
    let site = Audited::new().await;
    let world = &site.world;
    add_many(&site, 1).await;
    add_to_the_ledger_only(&site, Payload::Usage(usage("forged", start_time()))).await;
    differs(&site, 1).await;
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.held_back, world.times_billed("forged")), (2, 1, 0));
    let holds = status::read(&world.ledger, &site.log, DEADLINE).await.unwrap().holds;
    assert_eq!(
        holds.iter().map(|hold| hold.event_id.as_deref()).collect::<Vec<_>>(),
        [Some("forged")],
        "{holds:?}"
    );
    assert!(holds[0].ends.contains("`tallyline events correct`"), "{holds:?}");

    // Usage that coderd had is different: coderd deletes none.
    sqlx::query("update usage_event set confirmed_at = now() where id = 'e-1'")
        .execute(&world.ledger.pool)
        .await
        .unwrap();
    sqlx::query("delete from usage_events where id = 'e-1'").execute(&world.coderd).await.unwrap();
    a_turn_passes(world);
    differs(&site, 2).await;
    assert_eq!(
        world
            .ledger
            .run(async |conn| holds::of_deployment(conn, DEPLOYMENT).await)
            .await
            .unwrap()
            .map(|hold| hold.scope),
        Some(HoldScope::Source)
    );
}

#[tokio::test]
async fn usage_that_is_pending_when_its_source_is_retired_is_held_until_it_is_reinstated() {
    let world = World::new().await;
    let log = world.log().await;
    world.add(&[usage("a", start_time())]).await;
    let (operations, deployment_id) = (world.operations(&log), DEPLOYMENT);
    let actor = Actor { name: "sre-1".to_owned(), reason: "moved".to_owned() };
    let holds = async || status::read(&world.ledger, &log, DEADLINE).await.unwrap().holds;
    assert_eq!(act(&operations, &RetireSource { deployment_id }, &actor).await.unwrap().pending, 1);
    let held = holds().await;
    let [hold] = held.as_slice() else { panic!("{held:?}") };
    assert_eq!(
        (hold.scope, hold.deployment_id, hold.since.is_some()),
        (HoldScope::Source, Some(DEPLOYMENT), true)
    );
    assert!(
        hold.why.contains("retired by sre-1 (moved)")
            && hold.ends.contains("tallyline sources reinstate"),
        "{hold:?}"
    );
    assert_eq!((world.cycle().await.requests, world.number_in("pending").await), (0, 1));
    act(&operations, &ReinstateSource { deployment_id }, &actor).await.unwrap();
    audited(&world.ledger, &[DEPLOYMENT]).await;
    assert_eq!(holds().await, []);
    assert_eq!(world.cycle().await.accepted, 1);
}

#[tokio::test]
async fn a_retirement_ends_publishing_before_the_next_request() {
    let mut world = World::new().await;
    world.settings.concurrency = 1;
    let log = world.log().await;
    world.add_many(150).await;
    let (operations, deployment_id) = (world.operations(&log), DEPLOYMENT);
    let actor = Actor { name: "sre-1".to_owned(), reason: "a test".to_owned() };
    act(&operations, &RetireSource { deployment_id }, &actor).await.unwrap();
    act(&operations, &ReinstateSource { deployment_id }, &actor).await.unwrap();
    audited(&world.ledger, &[DEPLOYMENT]).await;
    // the source is retired while the first request is in flight
    sqlx::raw_sql(
        "create function retire() returns trigger language plpgsql as $$ begin
             update source set retired_act_id = (select max(id) from operator_act where act = 'retire'); return new; end $$;
         create trigger retire after insert on publication_request for each row execute function retire()",
    )
    .execute(&world.ledger.pool)
    .await
    .unwrap();
    let cycle = world.cycle().await;
    assert_eq!((cycle.requests, cycle.accepted, world.number_in("pending").await), (1, 100, 50));
}

#[tokio::test]
async fn a_build_that_differs_is_shown_and_holds_no_money() {
    let site = Audited::new().await;
    let world = &site.world;
    add_to_the_ledger_only(&site, build(DEPLOYMENT, 1).payload).await;
    site.add(usage("a", start_time())).await;
    site.finds(SOURCE, "the build differs", |finding| {
        finding.differences == 1 && finding.examples[0].kind == "not_in_source"
    })
    .await;
    let gauge = |name| site.gauge(0, name, "source_and_ledger", Some(DEPLOYMENT));
    crate::support::eventually(DEADLINE, "the build is shown", || async {
        gauge("tallyline_audit_difference") == Some(1.0)
    })
    .await;
    assert_eq!(gauge("tallyline_audit_holds_publishing"), Some(0.0));
    assert_eq!(world.cycle().await.accepted, 1);
    assert!(status::read(&world.ledger, &site.log, DEADLINE).await.unwrap().holds.is_empty());
}

//! How far a difference holds money: one event, a source, or everything. A build that differs holds none.

use chrono::TimeDelta;
use tallyline::event::{Event, Payload, Topic, TopicPartition, Usage};
use tallyline::ledger::Chain;
use tallyline::publisher::Condition;
use tallyline::{consumer, status};

use super::books::{Audited, DEADLINE, SOURCE};
use super::world::{DEPLOYMENT, start_time, usage};
use crate::support::ledger::build;

/// Usage `e-0` and as many more.
async fn add_many(site: &Audited, more: usize) {
    let usages: Vec<Usage> = (0..=more).map(|n| usage(&format!("e-{n}"), start_time())).collect();
    site.world.add_with(&site.log, &usages).await;
}

async fn change_in_coderd(site: &Audited, ids: &[&str], count: i32) {
    sqlx::query("update usage_events set event_data = jsonb_build_object('count', $2) where id = any($1)")
        .bind(ids)
        .bind(count)
        .execute(&site.world.coderd)
        .await
        .unwrap();
}

async fn differs(site: &Audited, differences: i64) {
    site.finds(SOURCE, "this many differ", |finding| {
        finding.deployment_id == Some(DEPLOYMENT) && finding.differences == differences && finding.recent_usage > 0
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
    // by the audit alone: no publisher has looked yet
    let (state, message) = world.state("e-0").await;
    assert!(state == "pending" && message.as_ref().is_some_and(|message| message.starts_with("held back: ")), "{message:?}");
    let status = site.command(&["status"]).await;
    let line = |words: &[&str]| status.stdout.lines().any(|line| words.iter().all(|words| line.contains(words)));
    assert!(line(&["event", "e-0", "2025-08-01T12:00:00.000Z", "coderd's row"]), "{status:?}");
    assert!(!line(&["USAGE HELD", "source"]), "{status:?}");

    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.held_back), (99, 1));
    assert_eq!(world.times_billed("e-0"), 0);
    let told = status::read(&world.ledger, &site.log, DEADLINE).await.unwrap().holds;
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((told[0].event_id.as_deref(), told[0].since), (Some("e-0"), Some(start_time())));
    assert!(told[0].ends.contains("coderd's row"), "{told:?}");

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
    assert!(matches!(&condition, Condition::Held(_)) && condition.to_string().contains("2 of 100 usage events"), "{condition}");
    let status = site.command(&["status"]).await;
    let held = |line: &str| ["source", &DEPLOYMENT.to_string(), "2 of 100", "at most 1 %"].iter().all(|words| line.contains(words));
    assert!(status.stdout.lines().any(held), "{status:?}");
    assert_eq!(site.gauge(0, "tallyline_audit_holds_publishing", "source_and_ledger", Some(DEPLOYMENT)), Some(1.0));

    change_in_coderd(&site, &["e-1"], 1).await;
    differs(&site, 1).await;
    world.pass(TimeDelta::minutes(10));
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().accepted, 99, "less than that holds only itself");
}

#[tokio::test]
async fn a_build_that_differs_is_shown_and_holds_no_money() {
    let site = Audited::new().await;
    let world = &site.world;
    let Event { payload: forged @ Payload::Build(_), .. } = build(DEPLOYMENT, 1) else { unreachable!("it is a build") };
    let forged = Event { deployment: DEPLOYMENT, payload: forged };
    site.log.append(Topic::WorkspaceBuilds, vec![forged.to_message()]).await.unwrap();
    let partition = TopicPartition { topic: Topic::WorkspaceBuilds, partition: 0 };
    let claim = world.ledger.claim(partition, 0).await.unwrap();
    let arrivals: Vec<_> = site.log.read(partition, 0, 10).await.unwrap().into_iter().map(consumer::read).collect();
    assert_eq!(world.ledger.record(&Chain::Live(claim), &arrivals, 1).await.unwrap().accepted, 1);
    site.add(usage("a", start_time())).await;
    site.finds(SOURCE, "the build differs", |finding| finding.differences == 1 && finding.examples[0].kind == "not_in_source").await;
    let gauge = |name| site.gauge(0, name, "source_and_ledger", Some(DEPLOYMENT));
    crate::support::eventually(DEADLINE, "the build is shown", || async { gauge("tallyline_audit_difference") == Some(1.0) }).await;
    assert_eq!(gauge("tallyline_audit_holds_publishing"), Some(0.0));
    assert_eq!(world.cycle().await.accepted, 1);
    assert!(status::read(&world.ledger, &site.log, DEADLINE).await.unwrap().holds.is_empty());
}

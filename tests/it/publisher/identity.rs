//! Nothing is sent from a foreign coderd, nor under a license of another deployment.

use std::time::Duration;

use chrono::TimeDelta;
use prometheus::Registry;
use serde_json::json;
use tallyline::ledger::{
    ActKind, Hold, HoldScope, NewAct, Process, PublishRefusal, SourceIdentity, Subject, identity,
    processes,
};
use tallyline::log::Log;
use tallyline::publisher::Condition;
use tallyline::status;
use tallyline::tallyman::ClientSettings;
use tallyline_sim::tallyman::{Config, Tallyman};
use uuid::Uuid;

use super::books::Audited;
use super::world::{
    DEPLOYMENT, ORGANIZATION, World, first_license, license_for, license_with, start_time, usage,
};
use crate::support::eventually;

/// The gauge of the alert `TallylinePublisherStopped`.
fn stopped(registry: &Registry) -> Option<f64> {
    let families = registry.gather();
    let stopped = families.iter().find(|family| family.name() == "tallyline_publisher_stopped")?;
    stopped.get_metric().first().map(|metric| metric.get_gauge().value())
}

async fn holds(world: &World, log: &Log) -> Vec<Hold> {
    status::read(&world.ledger, log, Duration::from_secs(10)).await.unwrap().holds
}

async fn refusal(world: &World) -> String {
    let registry = Registry::new();
    let mut publisher = world.publisher_in(&registry);
    let cycle = publisher.cycle(&world.stop).await.unwrap();
    let condition = publisher.condition().get();
    assert_eq!((cycle.requests, world.vendor.books().requests), (0, 0));
    assert!(!condition.is_healthy());
    assert_eq!(stopped(&registry), Some(1.0), "TallylinePublisherStopped fires");
    let Condition::Refused(why) = condition else { panic!("{condition}") };
    why
}

#[tokio::test]
async fn nothing_is_sent_from_another_coderd_under_the_sources_id() {
    let mut world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    let bound = SourceIdentity { deployment_id: DEPLOYMENT, organization_id: Uuid::from_u128(0xe) };
    world
        .ledger
        .run(async |conn| identity::bind(conn, DEPLOYMENT, bound).await)
        .await
        .unwrap()
        .unwrap();
    for sole in [true, false] {
        world.settings.sole = sole;
        let why = refusal(&world).await;
        assert!(
            why.contains(&ORGANIZATION.to_string())
                && why.contains(&bound.organization_id.to_string()),
            "{why}"
        );
        assert_eq!(world.state("a").await.0, "pending");
    }
}

#[tokio::test]
async fn another_coderd_is_refused_by_the_one_fact_that_it_reports() {
    let mut world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    let bound = SourceIdentity { deployment_id: DEPLOYMENT, organization_id: Uuid::from_u128(0xe) };
    world
        .ledger
        .run(async |conn| identity::bind(conn, DEPLOYMENT, bound).await)
        .await
        .unwrap()
        .unwrap();
    sqlx::query("delete from site_configs").execute(&world.coderd).await.unwrap();
    for sole in [true, false] {
        world.settings.sole = sole;
        let why = refusal(&world).await;
        assert!(
            why.contains(&ORGANIZATION.to_string())
                && why.contains(&bound.organization_id.to_string()),
            "{why}"
        );
    }
}

#[tokio::test]
async fn a_refusal_is_a_hold_of_the_source_unless_another_process_publishes_it() {
    let site = Audited::new().await;
    let world = &site.world;
    site.add(usage("a", start_time())).await;
    let bound = SourceIdentity { deployment_id: DEPLOYMENT, organization_id: Uuid::from_u128(0xe) };
    world
        .ledger
        .run(async |conn| identity::bind(conn, DEPLOYMENT, bound).await)
        .await
        .unwrap()
        .unwrap();
    let _process = world.process(&world.vendor.ingest_url());
    eventually(Duration::from_secs(60), "the refusal is a hold of the source", || async {
        holds(world, &site.log).await.iter().any(|hold| {
            (hold.scope, hold.deployment_id, hold.since.is_some())
                == (HoldScope::Source, Some(DEPLOYMENT), true)
                && hold.why.contains("sources accept")
        })
    })
    .await;

    sqlx::query("update source set bound_organization_id = $1")
        .bind(ORGANIZATION)
        .execute(&world.ledger.pool)
        .await
        .unwrap();
    let refused = PublishRefusal {
        deployment_id: Some(DEPLOYMENT),
        why: "a second pipeline".to_owned(),
        since: start_time(),
    };
    let (id, host, started_at) = (Uuid::new_v4(), "another".to_owned(), start_time());
    let second = Process { id, host, pid: 1, version: "1", roles: vec!["publish"], started_at };
    let standing = json!({ "publish": { "deployment_id": DEPLOYMENT, "publishes": false, "refused": refused } });
    eventually(
        Duration::from_secs(60),
        "nothing is held, though the second pipeline refuses",
        || async {
            world
                .ledger
                .run(async |conn| processes::record_heartbeat(conn, &second, &standing).await)
                .await
                .unwrap();
            holds(world, &site.log).await.is_empty()
        },
    )
    .await;
    let status = site.command(&["status"]).await;
    assert!(
        status.stdout.contains("A PUBLISHER REFUSES") && !status.stdout.contains("USAGE HELD"),
        "{status:?}"
    );
    assert_eq!(world.times_billed("a"), 1);
}

#[tokio::test]
async fn only_a_publisher_that_sends_denies_that_publishing_has_stopped() {
    let mut world = World::new().await;
    let registry = Registry::new();
    let mut publisher = world.publisher_in(&registry);
    publisher.cycle(&world.stop).await.unwrap();
    assert_eq!(stopped(&registry), Some(0.0));
    sqlx::query("delete from licenses").execute(&world.coderd).await.unwrap();
    publisher.cycle(&world.stop).await.unwrap();
    assert_eq!((publisher.condition().get(), stopped(&registry)), (Condition::NoLicense, None));
    world.settings.sole = false;
    let registry = Registry::new();
    world.publisher_in(&registry).cycle(&world.stop).await.unwrap();
    assert_eq!(stopped(&registry), None);
}

#[tokio::test]
async fn nothing_is_sent_of_a_source_whose_id_is_not_coderds_own() {
    let world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    sqlx::query("update site_configs set value = gen_random_uuid()::text")
        .execute(&world.coderd)
        .await
        .unwrap();
    assert!(refusal(&world).await.contains(&DEPLOYMENT.to_string()));
}

#[tokio::test]
async fn a_wrong_deployment_id_is_refused_though_no_event_of_it_will_ever_come() {
    let mut world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    let wrong = Uuid::from_u128(0xe);
    for sole in [true, false] {
        (world.settings.sole, world.settings.deployment) = (sole, wrong);
        let why = refusal(&world).await;
        assert!(why.contains(&wrong.to_string()) && why.contains(&DEPLOYMENT.to_string()), "{why}");
    }
}

#[tokio::test]
async fn sole_sends_nothing_and_does_not_start_without_a_readable_coderd_identity() {
    let mut world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    sqlx::query("update organizations set is_default = false")
        .execute(&world.coderd)
        .await
        .unwrap();
    let why = refusal(&world).await;
    assert!(why.contains("default organization"), "{why}");
    let log = world.log().await;
    let mut process = world.process(&world.vendor.ingest_url());
    let status = process.ends_within(Duration::from_secs(60)).await;
    assert_eq!(status.code(), Some(4), "{}", process.stderr());
    assert!(process.stderr().contains("publish.mode is sole"), "{}", process.stderr());
    for (minutes, held) in [(0, true), (5, true), (120, false)] {
        let age = "update process set seen_at = clock_timestamp() - make_interval(mins => $1)";
        sqlx::query(age).bind(minutes).execute(&world.ledger.pool).await.unwrap();
        let holds = holds(&world, &log).await;
        let of_source = |hold: &Hold| {
            hold.deployment_id == Some(DEPLOYMENT) && hold.why.contains("publish.mode is sole")
        };
        assert_eq!(holds.iter().any(of_source), held, "{minutes} minutes later: {holds:?}");
    }
    world.settings.sole = false;
    assert_eq!(world.cycle().await.waiting, 1);
}

#[tokio::test]
async fn the_vendor_is_sent_coderds_own_id_after_another_coderd_was_accepted() {
    let mut world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    let bound = SourceIdentity { deployment_id: DEPLOYMENT, organization_id: ORGANIZATION };
    world
        .ledger
        .run(async |conn| identity::bind(conn, DEPLOYMENT, bound).await)
        .await
        .unwrap()
        .unwrap();
    let other = Uuid::from_u128(0xe);
    sqlx::query("update site_configs set value = $1")
        .bind(other.to_string())
        .execute(&world.coderd)
        .await
        .unwrap();
    sqlx::query("delete from licenses").execute(&world.coderd).await.unwrap();
    let license = license_for(start_time() - TimeDelta::days(40), &json!([other]));
    world.add_license(&license).await;
    let config =
        Config { license_keys: vec![license], deployment_ids: vec![other], ..Config::default() };
    let vendor = Tallyman::start(config, world.clock.clone(), world.stop.clone()).await.unwrap();
    world.settings.tallyman = ClientSettings::new(vendor.ingest_url());
    refusal(&world).await;
    let act = NewAct {
        actor: "user-001",
        act: ActKind::Accept,
        subject: Subject::Named("source"),
        reason: "moved",
        detail: serde_json::Value::Null,
    };
    let new_identity = SourceIdentity { deployment_id: other, ..bound };
    world
        .ledger
        .run(async |conn| {
            identity::accept(conn, DEPLOYMENT, new_identity, &act, world.ledger.clock.now()).await
        })
        .await
        .unwrap()
        .unwrap();
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.failure), (1, None));
    assert_eq!(vendor.books().times_billed(other, "a"), 1);
}

#[tokio::test]
async fn a_license_of_other_deployments_does_not_sign() {
    let world = World::new().await;
    world.add(&[usage("a", start_time())]).await;
    sqlx::query("delete from licenses").execute(&world.coderd).await.unwrap();
    let other = Uuid::from_u128(0xe);
    // a license of another deployment without publishing, like one for an air-gapped site, has no
    // effect
    let issued_at = start_time() - TimeDelta::days(40);
    world
        .add_license(&license_with(
            issued_at,
            &[("deployment_ids", json!([other])), ("publish_usage_data", json!(false))],
        ))
        .await;
    let mut publisher = world.publisher();
    publisher.cycle(&world.stop).await.unwrap();
    assert!(
        matches!(publisher.condition().get(), Condition::NoLicense),
        "{}",
        publisher.condition().get()
    );
    world.add_license(&license_for(issued_at, &json!([other]))).await;
    let why = refusal(&world).await;
    assert!(
        why.contains("deployment_ids")
            && why.contains(&other.to_string())
            && why.contains(&DEPLOYMENT.to_string()),
        "{why}"
    );
    world.add_license(&first_license()).await;
    assert_eq!(world.cycle().await.accepted, 1);
}

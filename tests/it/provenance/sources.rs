//! Only registered sources are valid, and retired ones hold up nothing.

use tallyline::event::{Signatures, Topic};
use tallyline::ledger::{Chain, Counts, books, rejects, restored, retirements, sources};
use tallyline::operations::{AdmitRejects, ListSources, ReinstateSource, RetireSource};
use uuid::Uuid;

use super::world::{World, operator};
use crate::support::ledger::{
    DEPLOYMENT, OTHER_DEPLOYMENT, act, arrival, ask, build, claim, lease_partition, partition,
    record_batch, register, registered_ledger, usage,
};

#[tokio::test]
async fn forged_deployments_are_held_and_cost_the_same_however_many_there_are() {
    let (_database, ledger) = registered_ledger().await;
    let position = lease_partition(&ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let forged = (0..1_500)
        .map(|n| arrival(n, usage(Uuid::from_u128(0xf000 + u128::try_from(n).unwrap()), 1)));
    let arrivals: Vec<_> = forged.chain([arrival(1_500, usage(DEPLOYMENT, 1))]).collect();
    let batches = "select count(*) from batch";
    let before: i64 = sqlx::query_scalar(batches).fetch_one(&ledger.pool).await.unwrap();
    let counts = record_batch(&ledger, &Chain::Live(position), &arrivals, 1_501).await.unwrap();
    assert_eq!(counts, Counts { records: 1_501, accepted: 1, held: 1_500, ..Counts::default() });
    let after: i64 = sqlx::query_scalar(batches).fetch_one(&ledger.pool).await.unwrap();
    assert_eq!(
        (after - before, ledger.run(sources::list).await.unwrap().len()),
        (1, 2),
        "nothing is introduced by a record"
    );
    assert_eq!(
        ledger.run(async |conn| rejects::admissible(conn, 0, 10).await).await.unwrap(),
        Vec::<i64>::new()
    );
    assert_eq!(ledger.run(books::add_up).await.unwrap().differences, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registering_a_deployment_admits_its_held_events() {
    let world = World::new().await;
    let events =
        [build(OTHER_DEPLOYMENT, 1), claim(OTHER_DEPLOYMENT, 2), usage(OTHER_DEPLOYMENT, 3)];
    world.produce(events.iter().map(|event| (event.topic(), event.to_message()))).await;
    world.consume(Signatures::default()).await;
    let held = "select count(*) from reject where disposition = 'held' and cause = 'unregistered_source' and state = 'open'";
    let accepted = "select (select count(*) from workspace_build) + (select count(*) from prebuild_claim) + (select count(*) from usage_event)";
    assert_eq!((world.count(held).await, world.count(accepted).await), (3, 0));
    let operations = world.operations(Signatures::default());
    let admit = async || act(&operations, &AdmitRejects {}, &operator()).await.unwrap();
    assert_eq!(admit().await.records, 0);

    register(&world.ledger, &[OTHER_DEPLOYMENT]).await;
    let admitted = admit().await;
    assert_eq!((admitted.records, admitted.refused, admitted.left), (3, 0, 0));
    world.consume(Signatures::default()).await;
    assert_eq!((world.count(held).await, world.count(accepted).await), (0, 3));
}

#[tokio::test]
async fn a_retired_source_is_not_waited_for_until_it_is_reinstated() {
    let (_database, ledger) = registered_ledger().await;
    let log = tallyline::log::Log::postgres(
        ledger.pool.clone(),
        tallyline::log::PostgresLogSettings::default(),
    );
    let operations = crate::support::ledger::operations(&ledger, &log);
    let ids = async || {
        let (waited_for, others) = ledger.run(restored::sources_to_recover).await.unwrap();
        assert!(others.is_empty());
        waited_for.into_iter().map(|source| source.deployment_id).collect::<Vec<_>>()
    };
    let deployment_id = OTHER_DEPLOYMENT;
    act(&operations, &RetireSource { deployment_id }, &operator()).await.unwrap();
    assert_eq!(ids().await, [DEPLOYMENT]);
    let words = ledger
        .run(async |conn| retirements::of_deployment(conn, OTHER_DEPLOYMENT).await)
        .await
        .unwrap()
        .unwrap()
        .to_string();
    for part in
        ["retired by sre-1", "(a test)", &format!("tallyline sources reinstate {OTHER_DEPLOYMENT}")]
    {
        assert!(words.contains(part), "{part} is not in {words}");
    }
    let listed = ask(&operations, &ListSources {}).await.unwrap().sources;
    assert_eq!(
        listed.iter().map(|source| source.retired.is_some()).collect::<Vec<_>>(),
        [false, true]
    );
    act(&operations, &ReinstateSource { deployment_id }, &operator()).await.unwrap();
    assert_eq!(ids().await, [DEPLOYMENT, OTHER_DEPLOYMENT]);
}

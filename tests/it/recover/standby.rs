//! A real standby of the ledger's PostgreSQL is promoted. A loss is found before anything is sent.
//! A failover without loss changes nothing.

use tallyline::ledger::snapshots;

use super::ledger::group_has_committed;
use super::servers::{Pair, Replication};
use super::world::{SOON, World, ends};
use crate::journey::site::Serve;
use crate::support::{self, eventually};

const PENDING: &str = "select count(*) from publication where state = 'pending'";
const OPENED: &str = "select count(*) from recovery";
const CLOSED: &str = "select count(*) from recovery where closed_at is not null";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_to_a_synchronous_standby_withholds_nothing_and_loses_nothing() {
    let mut pair = Pair::start(Replication::Synchronous).await;
    let mut world =
        World::on(support::database_on(&pair.url()).await, Some(support::kafka()), "").await;
    let mut serve = Serve::start(&world.site);
    let mut others =
        [world.collect(), world.site.start("consume", &[]), world.site.start("publish", &[])];
    world.all_is_in().await;
    eventually(SOON, "the series are shown", || async { !serve.domain_lines().await.is_empty() })
        .await;
    let incarnation = world.site.ledger.run(snapshots::head).await.unwrap().incarnation;

    // in the middle of collecting and sending
    world.goes_on_to(0.6).await;
    pair.fail_over().await;
    world.goes_on_to(0.7).await;
    world.all_is_in().await;
    world.everything_is_there().await;
    eventually(SOON, "the series are shown again", || async {
        !serve.domain_lines().await.is_empty()
    })
    .await;
    eventually(SOON * 2, "every event is published", || async { world.count(PENDING).await == 0 })
        .await;
    assert!(world.tallyman.books().billed.iter().all(|billed| billed.times == 1));
    world.balanced().await;
    assert_eq!(
        (
            world.count(OPENED).await,
            world.site.ledger.run(snapshots::head).await.unwrap().incarnation
        ),
        (0, incarnation)
    );
    for process in others.iter_mut().chain([&mut serve.process]) {
        ends(process).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_that_lost_batches_while_no_process_ran_is_found_before_anything_is_sent() {
    let mut pair = Pair::start(Replication::Asynchronous).await;
    let mut world =
        World::on(support::database_on(&pair.url()).await, Some(support::kafka()), "").await;
    let (mut collect, mut consume) = (world.collect(), world.site.start("consume", &[]));
    world.all_is_in().await;
    pair.standby_falls_behind().await;
    let mut publish = world.site.start("publish", &[]);
    world.goes_on_to(0.6).await;
    world.all_is_in().await;
    group_has_committed(&world).await;
    eventually(SOON * 2, "every event is published", || async { world.count(PENDING).await == 0 })
        .await;
    for process in [&mut collect, &mut consume, &mut publish] {
        ends(process).await;
    }
    let (sent, billed) = (world.tallyman.books().requests, world.tallyman.books().billed.len());

    pair.fail_over().await;
    assert!(world.count(PENDING).await > 0, "the standby knows of no request");
    let mut serve = Serve::start(&world.site);
    let mut processes =
        [world.site.start("publish", &[]), world.collect(), world.site.start("consume", &[])];
    eventually(SOON * 2, "the ledger has caught up", || async {
        let requests = world.tallyman.books().requests;
        let done = world.count(CLOSED).await == 1;
        assert!(done || requests == sent, "sent before the ledger has caught up");
        done
    })
    .await;
    let acts = world.acts().await;
    assert!(acts.len() == 1 && acts[0].2.contains("which this ledger lacks"), "{acts:?}");
    world.all_is_in().await;
    world.everything_is_there().await;
    eventually(SOON * 2, "every event is published", || async { world.count(PENDING).await == 0 })
        .await;
    let books = world.tallyman.books();
    assert_eq!(books.billed.len(), billed);
    assert!(books.billed.iter().all(|billed| billed.times == 1));
    world.balanced().await;
    for process in processes.iter_mut().chain([&mut serve.process]) {
        ends(process).await;
    }
}
